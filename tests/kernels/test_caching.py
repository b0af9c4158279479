"""Tables that are made under inference mode serve training later."""

import pytest
import torch

from quantkit.kernels import hadamard, pyramid, pyramid_matmul, trellis
from quantkit.kernels.caching import kept

CPU = torch.device("cpu")
TABLES = {
    "paley": lambda: hadamard.paley(12),
    "points": lambda: pyramid_matmul.point_table(2, CPU),
    "norms": lambda: pyramid_matmul._inverse_norms(4, CPU),
    "counts": lambda: pyramid._tables(4, 3, CPU)[0],
    "values": lambda: trellis.table(8, CPU),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_tables_outlive_the_mode_in_which_they_were_made(make):
    for function in (
        hadamard.paley,
        pyramid_matmul.point_table,
        pyramid_matmul._inverse_norms,
        pyramid._tables,
        trellis.table,
    ):
        function.cache_clear()
    with torch.inference_mode():
        made = make()
    assert not made.is_inference()
    assert make() is made


def test_it_is_made_once():
    calls = []

    @kept
    def ones(count):
        """Ones."""
        calls.append(count)
        return torch.ones(count)

    assert ones(3) is ones(3) and calls == [3] and ones.__doc__ == "Ones."
