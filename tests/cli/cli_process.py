"""The command as users run it: real processes, a clean environment, and a daemon that is ready."""

import json
import os
import subprocess
import sys

import fastcbw

COMMAND = [sys.executable, "-m", "fastcbw"]


def clean_environment(**extra):
    """The environment without what would change the command's mind, and with the package that is tested."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCBW_", "LISTEN_"))}
    return kept | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(fastcbw.__file__)))} | extra


class Served:
    """A `fastcbw serve` in the background. lines: what it printed before ready."""

    def __init__(self, folder, *arguments, **environment):
        self.process = subprocess.Popen([*COMMAND, "serve", *map(str, arguments)], cwd=folder, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                        env=clean_environment(**environment))
        self.lines = []
        for line in self.process.stdout:
            if line == "ready\n":
                return
            self.lines.append(line.strip())
        raise AssertionError(f"not ready: {self.lines} {self.process.stderr.read()}")

    def end(self, number):
        """Send a signal and return (exit status, stderr)."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def lines(text):
    """Return the JSON values of a text, one a line."""
    return [json.loads(line) for line in text.splitlines()]
