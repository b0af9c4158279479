"""Runs a script in this process, or in several that share its work."""

import json
import os
import runpy
import subprocess
import sys

from ..conftest import ROOT
from .forks import server


def run(script, processes, output, *arguments, launched=False):
    """The records that each process wrote to `output`, after `python script ARGUMENTS... output`.

    launched: several are started by `torch.distributed.run` and import all for themselves; otherwise they are forks.
    """
    output.mkdir()
    if processes == 1:  # this one
        runpy.run_path(str(script))["main"](*map(str, arguments), str(output))
        return [json.loads((output / "0.json").read_text())]
    if not launched:
        done = server().run("tests.helpers.ranks", script, processes, *arguments, output, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((output / f"{number}.json").read_text()) for number in range(processes)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch, str(script), *map(str, arguments), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"{number}.json").read_text()) for number in range(processes)]
