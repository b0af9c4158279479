"""The check at a run's end: its figures are those of the two models, and packed bytes do not know of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, RTN, BlockTuning, Calibration, LowRank, Recipe, Rotation
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import token_kl, token_nll
from quantkit.run import check as checks
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.text import calibration_sequences, sequences_apart

from ..helpers.checkpoints import digest, interrupted

ONES = ("README.md", "quantkit_report.html")
"""Files that have the check's figures."""


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def measured(full, packed, tokens):
    """(KL, agreement, perplexity before, after) of two whole models."""
    before, after = (model(tokens).logits[:, :-1] for model in (full, packed))
    agree = (before.argmax(-1) == after.argmax(-1)).double().mean()
    nll = [token_nll(logits, tokens[:, 1:]).mean().exp() for logits in (before, after)]
    return [float(value) for value in (token_kl(before, after).mean(), agree, *nll)]


def found(check):
    return [check.kl, check.top1_agreement, check.baseline_perplexity, check.perplexity]


CASES = {
    "gptq": ("llama", Recipe(GPTQ(3, 64))),
    "rtn reads no text": ("llama_tied", Recipe(RTN(3, 64))),
    "no second stream": ("gpt2", Recipe(GPTQ(3, 64), target_shift=0)),
    "stored in another form": ("neox", Recipe(GPTQ(3, 32))),
    "head and embedding": ("llama_small", Recipe(GPTQ(3, 32), head_bits=3)),
    "head and embedding as one": ("llama_tied_small", Recipe(GPTQ(3, 32), head_bits=3)),
    "head alone": ("llama_tied", Recipe(RTN(4, 64), {"lm_head": GPTQ(2, 64)})),
    "rotated": ("llama_even", Recipe(GPTQ(3, 64), rotation=Rotation(), head_bits=4)),
    "tuned blocks": ("llama_small", Recipe(GPTQ(2, 32), tuner=BlockTuning(3))),
    "ranks by budget": ("llama_small", Recipe(LowRank(GPTQ(2, 32), 1), low_rank_bits=0.2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_two_models(case, model_folder, text_file, tmp_path, monkeypatch):
    """From shards and in memory, with logits in pieces; what is written is what is written without."""
    architecture, plain = CASES[case]
    folder, text = model_folder(architecture), Calibration(str(text_file), 3, 64)
    monkeypatch.setattr(checks, "LOGITS", 2048 * 20)
    recipe = Recipe(**{**vars(plain), "calibration": text, "check": 4})
    report = quantize_checkpoint(folder, recipe, tmp_path / "checked")
    tokenizer, full = AutoTokenizer.from_pretrained(folder), load(folder)
    tokens, held_out = text.sequences_apart(tokenizer, full, 4)
    assert torch.equal(tokens, text.sequences(tokenizer, full))
    assert report.check.sequences == 4 and report.check.tokens == 4 * 63
    expected = measured(full, quantkit.load(tmp_path / "checked", dtype=torch.float32).eval(), held_out)
    # one runs in bf16, where first choices are often equals; one adds up in another order: two of 252 tokens may differ
    abs_tol = {"stored in another form": 0.03, "rotated": 0.008}.get(case, 0)
    assert found(report.check) == pytest.approx(expected, rel=2e-3, abs=abs_tol)
    assert report.check.kl > 1e-4 and report.check.kl_se > 0
    quantize_checkpoint(folder, Recipe(**vars(recipe) | {"check": 0}), tmp_path / "plain")
    hashes, others = digest(tmp_path / "checked"), digest(tmp_path / "plain")
    assert all(hashes.pop(name) != others.pop(name) for name in ONES)
    assert hashes == others
    if case != "stored in another form":
        model = quantkit.quantize(
            load(folder), tokenizer, method=recipe.quantizer, rules=recipe.rules, head_bits=recipe.head_bits, check=4,
            calibration=text, target_shift=recipe.target_shift, rotate_model=recipe.rotation is not None,
            tune_blocks=recipe.tuner or 0, low_rank_bits=recipe.low_rank_bits,
        )  # fmt: skip
        assert found(model.quantkit_report.check) == pytest.approx(measured(full, model, held_out), rel=2e-3)


@pytest.mark.parametrize("architecture", ["llama_small", "llama_tied_small"])
def test_a_resumed_run_says_the_same(architecture, model_folder, text_file, tmp_path):
    recipe = Recipe(GPTQ(3, 32), calibration=Calibration(str(text_file), 3, 64), check=3, head_bits=4)
    folder = model_folder(architecture)
    whole = quantize_checkpoint(folder, recipe, tmp_path / "whole")
    interrupted(folder, Recipe(**vars(recipe) | {"check": 0}), tmp_path / "resumed", after=1)
    again = quantize_checkpoint(folder, recipe, tmp_path / "resumed", resume=True)
    assert found(again.check) == found(whole.check)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "whole")


def test_held_out_sequences_are_other_text(tokenizer, texts):
    drawn = calibration_sequences(texts, tokenizer, 6, 64, seed=0)
    tokens, held_out = sequences_apart(texts, tokenizer, 6, 64, 0, 5)
    assert torch.equal(tokens, drawn) and held_out.shape == (5, 64) and held_out.dtype == torch.int64
    assert torch.equal(held_out[:3], sequences_apart(texts, tokenizer, 6, 64, 0, 3)[1])
    rows = {tuple(row) for row in torch.cat([tokens, held_out]).tolist()}
    assert len(rows) == 11
    assert sequences_apart(texts, tokenizer, 6, 64, 0, 0)[1].shape == (0, 64)


def test_of_short_text_the_rest_is_held_out():
    """Each token is its place: nothing is read twice."""
    ids = list(range(100))
    tokenizer = lambda text, **_: {"input_ids": [1]}  # noqa: E731
    tokens, held_out = sequences_apart([ids], tokenizer, 3, 8, 0, 20)
    read = [*tokens.flatten().tolist(), *held_out.flatten().tolist()]
    assert tokens.shape == (3, 8) and len(read) == len(set(read)) == 96
    tokens, held_out = sequences_apart([ids[:30], ids[30:60], ids[60:100]], tokenizer, 1, 8, 1, 2)
    assert len({*tokens.flatten().tolist(), *held_out.flatten().tolist()}) == 24
    assert abs(int(held_out[0, 0]) - int(held_out[1, 0])) > 8, "each from a piece of its own"


def test_too_little_text_is_said(model_folder, tmp_path, text_file):
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:1500])
    folder = model_folder("llama_small")
    recipe = Recipe(GPTQ(3, 32), calibration=Calibration(str(short), 100, 64), check=8)
    report = quantize_checkpoint(folder, recipe, tmp_path / "gptq")
    assert report.check is None and report.samples is None
    assert "the check was left out: the text holds nothing beside the" in report.notes[-1]
    report = quantize_checkpoint(folder, Recipe(**vars(recipe) | {"quantizer": RTN(3, 32)}), tmp_path / "rtn")
    assert 0 < report.check.sequences <= 8, "nothing calibrates, and all is held out"


def test_a_run_that_reads_no_text_does_not_fail_for_it(model_folder, tmp_path, monkeypatch):
    folder, missing = model_folder("llama_small"), Calibration("missing.txt", 3, 64)
    report = quantize_checkpoint(folder, Recipe(RTN(3, 32), calibration=missing, check=8), tmp_path / "out")
    assert report.check is None
    assert report.notes[-1].startswith("the check was left out: no file 'missing.txt'")
    model = quantkit.quantize(load(folder), method="rtn", bits=4, group_size=32, check=8)
    assert "the check was left out: this run reads calibration text" in model.quantkit_report.notes[-1]
    with pytest.raises(QuantkitError, match="no file"):
        quantize_checkpoint(folder, Recipe(GPTQ(3, 32), calibration=missing, check=8), tmp_path / "no")
    with pytest.raises(QuantkitError, match=r"check=-1 sequences: give 0 \(off\)"):
        Recipe(RTN(3, 32), check=-1)


def test_a_model_that_predicts_nan_has_no_figures(model_folder, text_file, tmp_path):
    model = load(model_folder("llama_small"))
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    text = Calibration(str(text_file), 2, 64)
    quantkit.quantize(
        model, AutoTokenizer.from_pretrained(model_folder("llama_small")), method="rtn", bits=4, group_size=32,
        calibration=text, check=2,
    )  # fmt: skip
    assert model.quantkit_report.check is None
    assert "a model predicts NaN or Inf" in model.quantkit_report.notes[-1]


def test_the_report_has_the_figures_and_no_samples(model_folder, text_file, tmp_path):
    folder = model_folder("llama_small")
    recipe = Recipe(RTN(3, 32), calibration=Calibration(str(text_file), 2, 64), check=2)
    report = quantize_checkpoint(folder, recipe, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert told["check"]["kl"] == report.check.kl and told["check"]["source"] == str(text_file)
    assert "samples" not in told and report.samples is not None
    assert len(report.samples.continuations) == 2
    assert "check" not in json.dumps(told["settings"]), "packed bytes do not depend on it"
