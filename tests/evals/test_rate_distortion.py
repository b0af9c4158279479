"""The codes' errors on a Gaussian source, and the run that reports them."""

import json
import sys

import pytest
import torch

from quantkit import VPTQ, Pyramid
from quantkit.core.stats import LayerStats
from quantkit.evals import rate_distortion
from quantkit.kernels.pyramid import index_bits


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(exit code, rows by name and rate, picture) of a quick run with three codebooks, one of them of two stages."""
    folder = tmp_path_factory.mktemp("rate")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rate_distortion, "BOOKS", ((4, (8,)), (8, (8, 8)), (2, (6,))))
        code = rate_distortion.main(
            ["--quick", "--bits", "2", "3", "--json", str(folder / "rows.json"), "--png", str(folder / "picture.png")]
        )
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return code, {(row["family"], row["rate"]): row for row in rows}, folder / "picture.png"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scalars_have_the_textbook_errors(bits):
    assert rate_distortion.lloyd_max(bits) == pytest.approx(rate_distortion.EXPECTED["Lloyd-Max"][bits], rel=1e-3)
    step, error = rate_distortion.best_step(bits)
    if bits > 1:
        assert error == pytest.approx(rate_distortion.EXPECTED["uniform, best step"][bits], rel=1e-3)
        assert step == pytest.approx({2: 0.9957, 3: 0.5860, 4: 0.3352}[bits], abs=1e-4)


def test_an_integral_agrees_with_samples():
    levels = torch.tensor([-1.3, 0.2, 0.9, 2.0], dtype=torch.float64)
    x = rate_distortion.gaussian(1 << 20, 5).double()
    rounded = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert rate_distortion.scalar_error(levels)[0] == pytest.approx(float((x - rounded).square().mean()), rel=0.01)


def test_figures_stay_within_their_bars(quick):
    code, rows, _ = quick
    assert code == 0
    barred = [row for row in rows.values() if row["bar"]]
    assert {row["family"] for row in barred} == {"PVQ D=64", "PVQ D=16", "VQ v4 k256", "trellis L=12", "trellis L=16"}
    assert all(-0.06 < row["deviation"] < 0.02 for row in barred)


def test_nothing_beats_shannon_and_order_is_right(quick):
    _, rows, _ = quick
    assert len(rows) == 25
    assert all(row["to_bound"] > 1.05 for row in rows.values())
    for rate in (2.0, 3.0):
        by_name = {family: row["mse"] for (family, r), row in rows.items() if r == rate}
        assert by_name["trellis L=16"] < by_name["trellis L=12"] < 0.82 * by_name["PVQ D=64"]
        assert by_name["PVQ D=64"] < by_name["PVQ D=16"] < by_name["PVQ D=8"] < by_name["Lloyd-Max"]
        assert by_name["Lloyd-Max"] < by_name["uniform, best step"]
        assert by_name["INT g128 asymmetric, searched"] < by_name["INT g128 asymmetric, min-max"]
    measured = [row for (family, _), row in rows.items() if family not in ("Lloyd-Max", "uniform, best step")]
    assert all(0 < row["standard_error"] < 0.01 * row["mse"] for row in measured)


def test_every_stored_byte_is_counted(quick):
    _, rows, _ = quick
    assert rows["INT g128 asymmetric, searched", 3.0]["bits_per_weight"] == pytest.approx(3.25)
    assert rows["INT g128 symmetric, searched", 2.0]["bits_per_weight"] == pytest.approx(2.125)
    code = Pyramid(2, 64).code
    fields = (index_bits(64, code.pulses) + code.gain_bits) / 64
    levels = 16 * 2**code.gain_bits / 4096**2
    assert rows["PVQ D=64", 2.0]["bits_per_weight"] == pytest.approx(fields + 16 / 4096 + levels)
    vectors = -(-4096 // 6) * 12 / 4096  # the last vector of a column is padded
    assert VPTQ(2, 6).layout(4096, 4096).bits_per_weight == pytest.approx(vectors + 16 * 6 * 4096 / 4096**2)


def test_the_error_is_that_of_packed_weights():
    """A layer whose inputs are white has no feedback: packed, it loses what the table says."""
    weight = rate_distortion.gaussian(4096 * 8, 11).view(8, 4096).T.contiguous()
    packed = Pyramid(2, 64, refit=False).quantize(weight, LayerStats(torch.eye(8), None, 8, "white"))
    lost = (weight - packed.dequantize()).square().mean(0)
    expected = rate_distortion.pyramid_errors(2, 64, weight.T.flatten())
    torch.testing.assert_close(lost, expected, rtol=1e-3, atol=0)


def test_the_picture_is_small(quick):
    _, _, path = quick
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 20_000 < path.stat().st_size < 150_000


def test_a_missing_matplotlib_is_said_in_one_line_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(rate_distortion, "measure", lambda *_: pytest.fail("measured first"))
    with pytest.raises(SystemExit, match="pip install matplotlib") as caught:
        rate_distortion.main(["--quick", "--png", str(tmp_path / "no.png")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("factor", "code"), [(1.03, 1), (1.01, 0), (0.9, 0)])
def test_a_missed_bar_ends_in_exit_code_1(monkeypatch, capsys, factor, code):
    error = 0.0979 * factor
    monkeypatch.setattr(rate_distortion, "pyramid_errors", lambda rate, dimension, samples: torch.full((4,), error))
    monkeypatch.setattr(rate_distortion, "trellis_errors", lambda *_: torch.full((4,), 0.01))
    monkeypatch.setattr(rate_distortion, "BOOKS", ())
    monkeypatch.setattr(rate_distortion, "PYRAMIDS", (64,))
    assert rate_distortion.main(["--quick", "--bits", "2"]) == code
    assert ("missed: PVQ D=64 at 2 bits" in capsys.readouterr().err) == bool(code)
