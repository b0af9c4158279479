"""Commands as whole processes, and commands that fail in this one."""

import logging
import sys

import pytest

from quantkit.cli.main import main

from ..helpers.forks import server

COMMAND = [sys.executable, "-m", "quantkit.cli"]


def run(*arguments):
    """A command in a process of its own, but for the imports; `COMMAND` begins one that imports too."""
    return server().run("quantkit.cli", *arguments)


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
