"""The teacher's predictions, asked for and cached."""

import copy

import pytest
import torch

import quantkit
from quantkit import GPTQ, Calibration, PVSettings, TuningSettings
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.io.run_folder import RunFolder
from quantkit.run.teacher import CachedTeacher, Predictions, predict

TEXT = Calibration("stdlib", 70, 32)  # two files of a cache


@pytest.fixture(scope="module")
def windows(teacher, tokenizer):
    return TEXT.sequences(tokenizer, teacher)


def silent(_done, _total):
    pass


@torch.no_grad()
def test_what_is_cached_understates_the_kl_and_less_with_more_successors(teacher, windows, tmp_path):
    numbers = torch.tensor([0, 63, 64, 69])
    wanted = predict(teacher, windows[numbers])
    found = Predictions(wanted.logits + 0.5 * torch.randn_like(wanted.logits), wanted.hidden)
    full = token_kl(wanted.logits, found.logits)
    gaps = []
    for top in (8, 256, 2048):
        cache = CachedTeacher.fill(RunFolder(tmp_path / str(top), "a cache"), teacher, windows, top, silent)
        kl, hidden = cache.divergence(windows[numbers], numbers, found)
        assert hidden is None
        gaps.append(float((full - kl).mean() / full.mean()))
    assert gaps[0] > gaps[1] > abs(gaps[2])
    assert gaps[0] > 0.05
    assert abs(gaps[2]) < 0.02, "all successors, but for fp16"
    kl, _ = cache.divergence(windows[numbers], numbers, wanted)
    assert float(kl.abs().max()) < 2e-3


def test_an_interrupted_cache_is_completed(teacher, windows, tmp_path):
    seen = []
    CachedTeacher.fill(
        RunFolder(tmp_path / "cache", "a cache"), teacher, windows, 4, lambda done, total: seen.append((done, total))
    )
    assert seen == [(64, 70), (70, 70)]
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    first, second = (path.read_bytes() for path in files)
    files[1].unlink()
    CachedTeacher.fill(RunFolder(tmp_path / "cache", "a cache"), teacher, windows, 4, silent)
    assert (files[0].read_bytes(), files[1].read_bytes()) == (first, second)
    with pytest.raises(QuantkitError, match="other settings: top is 5, and was 4"):
        CachedTeacher.fill(RunFolder(tmp_path / "cache", "a cache"), teacher, windows, 5, silent)
    with pytest.raises(QuantkitError, match="keep at least 1"):
        CachedTeacher.fill(RunFolder(tmp_path / "other", "a cache"), teacher, windows, 0, silent)


def test_tuning_by_a_cache(teacher, tokenizer, tmp_path):
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=GPTQ(2), calibration=TEXT)
    settings = TuningSettings(6, 4, 4, evaluate_every=3, held_out=8, top=256, pv=PVSettings("continuous", lr=2e-3))
    quantkit.tune(model, teacher, tokenizer, calibration=TEXT, settings=settings, cache=tmp_path / "cache")
    first, *_, last = model.quantkit_tuning
    assert 0.5 * first["full_kl"] < first["kl"] < first["full_kl"]
    assert last["kl"] < first["kl"]
    with pytest.raises(QuantkitError, match="no hidden states"):
        hidden = TuningSettings(1, held_out=2, hidden=1.0)
        quantkit.tune(model, teacher, tokenizer, calibration=TEXT, settings=hidden, cache=tmp_path / "cache")


def test_a_damaged_cache_is_named(teacher, windows, tmp_path):
    folder = tmp_path / "cache"

    def filled():
        return CachedTeacher.fill(RunFolder(folder, "a cache"), teacher, windows, 4, silent)

    filled()
    path = folder / "teacher-00000.safetensors"
    whole, numbers = path.read_bytes(), torch.arange(2)
    found = predict(teacher, windows[numbers])
    for content in (b"", whole[:-1], whole[:100], bytes(8) + whole[8:], whole[:-9] + b"\x55" + whole[-8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"teacher-00000\.safetensors is "):
            filled().divergence(windows[numbers], numbers, found)
    path.unlink()
    filled().divergence(windows[numbers], numbers, found)
    assert path.read_bytes() == whole


def test_a_packed_teacher_is_refused_before_anything_is_done(teacher, tokenizer, reference, tmp_path):
    packed = quantkit.quantize(copy.deepcopy(teacher), method="rtn", bits=3)
    with pytest.raises(QuantkitError, match=r"the teacher is a packed model.*give the full-precision model"):
        quantkit.tune(packed, packed, tokenizer, calibration=TEXT)
    packed.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(QuantkitError, match=r"the teacher .*packed is a packed model"):
        quantkit.tune(tmp_path / "packed", tmp_path / "packed", output=tmp_path / "out", calibration=TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
