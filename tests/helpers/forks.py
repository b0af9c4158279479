"""Processes that begin with everything imported: forks of one that has done nothing else.

Importing torch, transformers and the rest takes longer than most commands do. A `Server` imports them in a process of
its own and forks that for each command. Programs whose imports are the point (tests/test_lazy.py) are none of these.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

from quantkit.evals.benchmarks.forks import become

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    "accelerate", "numba", "torch._dynamo", "transformers.models.llama.modeling_llama", "quantkit.cli.main",
    "quantkit.evals.decode", "quantkit.evals.kv_quality", "quantkit.evals.perplexity", "quantkit.evopress.session",
    "quantkit.kernels.int_group_numba", "quantkit.kernels.hadamard_numba", "quantkit.quantizers.sparse",
    "quantkit.run.pipeline", "quantkit.tuning.end_to_end", "matplotlib.figure", "matplotlib.backends.backend_svg",
    "huggingface_hub",
]  # fmt: skip


class Server:
    """Runs commands one by one, as `subprocess.run` would `python -m MODULE ARGUMENTS...`."""

    def __init__(self, folder):
        """folder: for what commands print."""
        self.folder, self.count = Path(folder), 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, module, *arguments, cwd=None, path=()):
        """What a command printed and the exit code that it ended with, minus a signal's number where that ended it.

        path: folders of packages that it finds beside the installed ones.
        """
        self.count += 1
        output, errors = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        request = module, [*map(str, arguments)], str(cwd or os.getcwd()), [*map(str, path)], str(output), str(errors)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess([module, *arguments], code, output.read_text(), errors.read_text())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@cache
def server():
    """The server of this process, which ends with it."""
    folder = tempfile.TemporaryDirectory()
    found = Server(folder.name)
    atexit.register(lambda: (found.close(), folder.cleanup()))
    return found


def _become(module, arguments, folder, path, output, errors):
    """In a fork: the command, in a folder of its own and with packages of its own."""
    os.chdir(folder)
    sys.path += path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *path])
    runpy.run_path(str(Path(__file__).with_name("shortcuts.py")))["take"]()
    become(module, arguments, output, errors)


def _serve():
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in the place of this file's folder
    _serve()
