"""A program run in a fork of a process that has imported what it needs, which takes longer than most runs."""

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn


def become(module: str, arguments: Sequence[str], output: Path | str, errors: Path | str) -> NoReturn:
    """In a fork: `python -m MODULE ARGUMENTS...`, whose end is the process' end.

    Args:
        module: with a `__main__`, or to run as such.
        arguments: of the program.
        output, errors: files to which it says what it says; they may be one.
    """
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, path, way in ((0, os.devnull, os.O_RDONLY), (1, output, written), (2, errors, written)):
        os.dup2(os.open(path, way, 0o644), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = [module, *arguments]
    leave(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def leave(work: Callable[[], object]) -> NoReturn:
    """In a fork: does its work, and ends the process as a program of that alone would end."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
