"""Presets: which method suits so many bits, where, and what the command makes of them."""

import pytest
import torch

from quantkit.advice import presets
from quantkit.advice.presets import way
from quantkit.core.errors import QuantkitError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("preset", "bits", "device", "method", "fisher"),
    [
        ("quality", 2, CPU, "trellis", True),
        ("quality", 3.5, CPU, "trellis", True),
        ("quality", 6, CPU, "gptq", True),
        ("balanced", 3, GPU, "trellis", True),
        ("balanced", 3, CPU, "trellis", True),
        ("balanced", 2.5, CPU, "trellis", True),
        ("balanced", 8, GPU, "gptq", False),
        ("fast", 4, GPU, "gptq", False),
    ],
)
def test_ways(preset, bits, device, method, fisher):
    found = way(preset, bits, device)
    assert (found.method, found.fisher, found.head_bits) == (method, fisher, 6)
    assert found.reason


def test_balanced_without_numba_packs_integers(monkeypatch):
    """Trellis codes are found many times more slowly then."""
    monkeypatch.setattr(presets, "has_numba", lambda: False)
    assert [way("balanced", bits, CPU).method for bits in (3, 2.5)] == ["gptq", "trellis"]
    assert "numba" in way("balanced", 3, CPU).reason


@pytest.mark.parametrize(("preset", "bits"), [("fast", 2.5), ("balanced", 4.5), ("quality", 5.5), ("best", 3)])
def test_what_no_preset_can_do_is_refused(preset, bits):
    with pytest.raises(QuantkitError, match=rf"{bits:g}|preset 'best'"):
        way(preset, bits, CPU)
