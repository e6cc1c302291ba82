"""What all tests share: the folder of tests is where `model` and `leaks` are imported from."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
