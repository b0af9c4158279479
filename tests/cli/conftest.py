"""Commands as whole processes, and commands that fail in this one."""

import logging
import subprocess
import sys

import pytest

from quantkit.cli.main import main

COMMAND = [sys.executable, "-m", "quantkit.cli"]


def run(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def complaint(monkeypatch, capsys):
    """A function: what a command that fails says and exits with, run in this process, which is quicker."""
    logger = logging.getLogger("quantkit")
    before = list(logger.handlers), logger.level, logger.propagate

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    yield run_here
    logger.handlers, logger.level, logger.propagate = before
