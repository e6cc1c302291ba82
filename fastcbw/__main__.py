"""``python -m fastcbw`` is ``fastcbw``."""

import sys

from fastcbw.cli.main import main

sys.exit(main())
