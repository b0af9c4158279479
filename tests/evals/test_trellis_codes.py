"""The tables that the trellis code was chosen by."""

import json
import os
import subprocess
import sys

import pytest
import torch

from quantkit.evals import trellis_codes
from quantkit.kernels import trellis, viterbi


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A quick run; ahead-of-time compilation wants a process without the interpreter."""
    path = tmp_path_factory.mktemp("codes") / "rows.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "quantkit.evals.trellis_codes", "--quick", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| values | L | K | MSE | cost |" in done.stdout
    return json.loads(path.read_text())


def test_the_code_costs_least_and_is_as_good_as_any(tables):
    rows = {(row["what"], row["bits"]): row for row in tables["values"]}
    ours = next(iter(trellis_codes.FAMILIES))
    assert all(row["mse"] < 1.04 * rows[what, bits]["mse"] for what, bits in rows for row in [rows[ours, bits]])
    costs = {what: row["cost"] for (what, bits), row in rows.items() if bits == 2}
    assert costs[ours] == min(costs.values()) < 0.8 * min(cost for what, cost in costs.items() if what != ours)


def test_rings_cost_no_more_than_the_bits_that_they_save(tables):
    """Free ends take L - K bits more, 2^-2b of the error for b bits a number."""
    rows = {(row["what"], row["bits"]): row["mse"] for row in tables["rings"]}
    for bits in (1, 2, 3, 4):
        for length, pieces in ((512, (512, 256)), (2048, (2048, 512, 256))):
            worth = 4 ** ((12 - bits) / length)
            for piece in pieces:
                ring = rows[f"rings of {length}, pieces of {piece}", bits]
                few = 1.0 if length == 512 else 1.01  # a quick run has four of the long ones, and their chance
                assert ring < 1.01 * few * worth * rows[f"free ends, {length}", bits]


def test_states_beat_a_beam_of_as_many(tables):
    rows = {(row["what"], row["bits"]): row["mse"] for row in tables["searches"]}
    for bits in (2, 3):
        assert rows["all of 2^12 states", bits] < rows["all of 2^10 states", bits] < rows["all of 2^8 states", bits]
        assert rows["all of 2^10 states", bits] < rows["a beam of 2^10", bits] < rows["a beam of 2^8", bits]


def test_a_beam_of_all_states_is_the_exact_search():
    x, values = torch.randn(3, 40), trellis.table(8, torch.device("cpu"))
    exact = values[viterbi.search(x, values, 2).long()]
    torch.testing.assert_close(trellis_codes.beam(x, values, 2, 8), exact)
