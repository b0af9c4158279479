"""Ranks by budget: the best use of extra bits, on spectra that are known and on a model."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, LowRank, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats
from quantkit.quantizers.target_shift import TargetShift
from quantkit.run.estimate import estimate
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.ranks import Spectrum, Survey, allocate_ranks, summary, with_ranks


def spectrum(values, rows=64, columns=64):
    return Spectrum(torch.tensor(values, dtype=torch.float64), (rows, columns), 16 * (rows + columns))


def test_a_flat_spectrum_is_better_served_by_weight_bits():
    assert spectrum([1.0] * 64).worth() == 0
    steep = spectrum([100.0, 50.0] + [0.1] * 62)
    assert steep.worth() == 2
    ranks = allocate_ranks({"flat": spectrum([1.0] * 64), "steep": steep}, 8.0)
    assert ranks == {"flat": 0, "steep": 2}
    text = summary({"flat": spectrum([1.0] * 64), "steep": steep}, ranks, 8.0)
    assert "1 the same bits serve better as weight bits (flat)" in text


def test_the_best_ranks_of_all_that_the_budget_allows():
    generator = torch.Generator().manual_seed(3)
    spectra = {}
    for name in "abc":
        values = (torch.rand(4, generator=generator, dtype=torch.float64) * 8).exp().sort(descending=True).values
        spectra[name] = Spectrum(values, (400, 400), 16 * 800)
    bits = 5 * 16 * 800 / (3 * 400 * 400)  # five ranks
    ranks = allocate_ranks(spectra, bits)
    assert sum(ranks.values()) == 5

    def gain(chosen):
        return sum(float(spectra[name].values[:rank].sum()) for name, rank in zip("abc", chosen, strict=True))

    best = max((c for c in itertools.product(range(5), repeat=3) if sum(c) <= 5), key=gain)
    assert gain([ranks[name] for name in "abc"]) == pytest.approx(gain(best))
    assert sum(allocate_ranks(spectra, 0.9 * 16 * 800 / (3 * 400 * 400)).values()) == 0


def test_the_spectrum_is_what_a_correction_removes():
    weight = torch.randn(24, 40)
    inputs = torch.randn(500, 40) * torch.linspace(0.1, 3, 40)
    stats = LayerStats(inputs.T @ inputs / 500, None, 500, "layer")
    for inner, shape in ((RTN(2, 20), weight), (RTN(2, 12), weight.T.contiguous())):
        stats = stats if shape.shape[1] == 40 else LayerStats(torch.eye(24) + 0.5, None, 500, "layer")
        survey = Survey({"layer": LowRank(inner, 5), "other": inner})
        assert survey.needs("layer") == Needs.HESSIAN and survey.needs("other") == Needs.NOTHING
        packed = survey("layer", shape, stats).weight
        assert survey("other", shape, None).weight.state().keys() == packed.state().keys()
        corrected = LowRank(inner, 5).quantize(shape, stats)
        size = quantkit.core.metrics.proxy_loss(shape, stats.hessian)
        before, after = (
            quantkit.core.metrics.proxy_loss(shape - w.dequantize(), stats.hessian) / size for w in (packed, corrected)
        )
        (values,) = (spectrum.values for spectrum in survey.spectra.values())
        assert float(values.sum()) == pytest.approx(before, rel=1e-4)
        assert float(values[5:].sum()) == pytest.approx(after, rel=1e-2)
        assert len(values) == 24


def test_plans_get_their_ranks_wherever_the_correction_is():
    plan = {"a": TargetShift(Hadamard(LowRank(GPTQ(2), 1, adapter_bits=8)), 0.7), "b": LowRank(RTN(3), 1), "c": RTN(2)}
    changed = with_ranks(plan, {"a": 3, "b": 0})
    assert changed == {
        "a": TargetShift(Hadamard(LowRank(GPTQ(2), 3, adapter_bits=8)), 0.7),
        "b": RTN(3),
        "c": RTN(2),
    }
    with pytest.raises(QuantkitError, match="the plan has none"):
        Survey({"c": RTN(2)})


def test_a_model_gets_the_budget_in_memory_and_from_disk(short_reference, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(short_reference, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(short_reference)
    text = Calibration("stdlib", 4, 64)
    plain = quantkit.quantize(copy.deepcopy(teacher), tokenizer, 2, method="rtn")
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, 2, method="rtn", low_rank_bits=0.5, calibration=text)
    report = model.quantkit_report
    assert plain.quantkit_report.bits_per_weight < report.bits_per_weight <= plain.quantkit_report.bits_per_weight + 0.5
    assert any("of 0.5 extra bits a weight are spent" in note and "of 14 layers" in note for note in report.notes)
    recipe = Recipe(LowRank(RTN(2), 1), calibration=text, low_rank_bits=0.5)
    expected = estimate(short_reference, recipe).bits_per_weight
    assert expected == pytest.approx(plain.quantkit_report.bits_per_weight + 0.5)
    seen = []
    other = quantize_checkpoint(
        short_reference, recipe, tmp_path / "packed", progress=lambda done, total, name: seen.append(name)
    )
    assert [(layer.name, layer.format) for layer in other.layers] == [(x.name, x.format) for x in report.layers]
    assert "ranks: model.layers.0" in seen
    loaded = quantkit.load(tmp_path / "packed", dtype=torch.float32)
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(QuantkitError, match="give 0"):
        quantkit.quantize(teacher, tokenizer, 2, low_rank_bits=-1, calibration=text)


def test_a_rotated_or_shifted_correction_is_surveyed_in_its_own_terms():
    """A rotation changes no eigenvalue, and what a shifted target aims at is what was lost."""
    weight, inputs = torch.randn(24, 64), torch.randn(500, 64) * torch.linspace(0.1, 3, 64)
    stats = LayerStats(inputs.T @ inputs / 500, inputs.T @ inputs / 480, 500, "layer")
    for wrapped in (Hadamard(LowRank(RTN(2, 64), 5)), TargetShift(Hadamard(LowRank(RTN(2, 64), 5)), 0.7)):
        survey = Survey({"layer": wrapped})
        result = survey("layer", weight, stats)
        lost = float(survey.spectra["layer"].values.sum())
        assert lost == pytest.approx(result.relative_error, rel=1e-3)
