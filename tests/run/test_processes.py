"""The device of a process among several."""

from types import SimpleNamespace

import pytest
import torch

from quantkit.run import processes


@pytest.mark.parametrize(("said", "device"), [("cpu:0", "cpu"), ("cuda:1", "cuda:1")])
def test_processors_have_no_number(said, device, monkeypatch):
    """torch copies a tensor that goes from cpu to cpu:0, and a parameter's copy is none."""
    two = SimpleNamespace(num_processes=2, device=torch.device(said))
    monkeypatch.setattr(processes, "PartialState", lambda **_: two)
    assert processes.begin_processes("auto") == (two, torch.device(device))
