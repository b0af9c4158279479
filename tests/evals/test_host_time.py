"""The host time's command: it runs without a GPU, and plans take a fraction of what operators take."""

import json
import os
import subprocess
import sys


def test_plans_take_a_fraction_of_the_operators_time(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "times.json"
    command = [sys.executable, "-m", "quantkit.evals.host_time", "--repeats", "20", "--json", str(file)]
    subprocess.run(command, env=environment, check=True)
    rows = json.loads(file.read_text())
    assert {row["layer"].partition(" ")[0].strip(",") for row in rows} == {"int4", "trellis", "codebook", "pyramid"}
    for row in rows:
        assert row["plan"] < row["operator"] / 2, row
