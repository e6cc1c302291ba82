"""Fixtures: the command, an image, a daemon."""

import os
import subprocess

import pytest
from cli_process import COMMAND, Served, clean_environment

LENGTH = 4 << 20


@pytest.fixture
def run(tmp_path):
    """run(*arguments) -> CompletedProcess, in tmp_path."""

    def run(*arguments, **environment):
        return subprocess.run([*COMMAND, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env=clean_environment(**environment), stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def image(tmp_path):
    """An image of 4 MiB: data, a hole, data."""
    path = tmp_path / "vm.img"
    with open(path, "wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(LENGTH)
        file.seek(LENGTH - 4096)
        file.write(b"\x5a" * 4096)
    return path


@pytest.fixture
def serve(tmp_path):
    """serve(*arguments) -> Served, ended after the test."""
    running = []

    def serve(*arguments, **environment):
        running.append(Served(tmp_path, *arguments, **environment))
        return running[-1]

    yield serve
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
            served.wait()


@pytest.fixture
def served(serve, image):
    """The daemon of the image, on nbd and nbd.qmp in tmp_path."""
    return serve(image, "--socket", "nbd")
