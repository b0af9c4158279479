"""The comparison of one process with several: what it starts, and what it makes of the figures."""

import pytest

from quantkit.evals import shared_run


@pytest.mark.parametrize(("second", "said"), [(b"same", "equal"), (b"other", "different")])
def test_medians_and_bytes_are_compared(second, said, tmp_path, monkeypatch):
    found = {1: iter([(10.0, 12.0), (30.0, 31.0), (20.0, 22.0)]), 2: iter([(9.0, 14.0), (11.0, 15.0), (13.0, 16.0)])}

    def timed(processes, folder, options, output):
        output.mkdir(exist_ok=True)
        (output / "model.safetensors").write_bytes(b"same" if processes == 1 else second)
        return next(found[processes])

    monkeypatch.setattr(shared_run, "timed", timed)
    row = shared_run.measure(tmp_path, ["--bits", "3"], 2, 3)
    assert row == {
        "processes": 2,
        "bytes": said,
        "seconds": [20.0, 11.0],
        "ratio": 0.55,
        "whole_seconds": [22.0, 15.0],
        "whole_ratio": 15 / 22,
    }


def test_several_are_started_by_torchrun(tmp_path):
    asked = ["quantize", "--bits", "3"]
    alone, two = (shared_run.command(count, tmp_path, asked, tmp_path / "out") for count in (1, 2))
    assert alone[1:4] == ["-m", "quantkit.cli", "quantize"] and "torch.distributed.run" not in alone
    assert two[1:3] == ["-m", "torch.distributed.run"] and two[-8:] == alone[2:]
    searched = shared_run.command(1, tmp_path, ["search", "--avg-bits", "3"], tmp_path / "out")
    assert searched[-2:] == ["--database", str(tmp_path / "out-candidates")]
