"""Corrections that are trained on frozen packed weights: by any loop, by Trainer, by peft, and against a teacher."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import quantkit
from quantkit import RTN, Calibration, Hadamard, LowRank, PVSettings, TuningSettings
from quantkit.core.errors import QuantkitError
from quantkit.formats.low_rank import LowRankWeight
from quantkit.models.linear import QuantizedLinear
from quantkit.tuning.adapters import AdaptedLinear, correction_outside

TOKENS = torch.arange(40).view(2, 20) * 37 % 2048


def quantized(teacher, tokenizer, method, text=Calibration("stdlib", 4, 64)):  # noqa: B008
    return quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=method, calibration=text)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def train(model, folder, **settings):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[], save_steps=3, use_cpu=True, **settings
    )
    Trainer(model, arguments, train_dataset=rows).train()


@pytest.mark.parametrize(
    "method", [RTN(3), Hadamard(RTN(2)), LowRank(RTN(2), 4, adapter_bits=8)], ids=["int", "rotated", "low"]
)
def test_a_packed_model_trains_saves_and_reloads(method, teacher, tokenizer, tmp_path):
    model = quantized(teacher, tokenizer, method)
    before = logits(model)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.int32}
    assert quantkit.finetune(model, rank=4) is model
    torch.testing.assert_close(logits(model), before, atol=5e-3, rtol=0)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {
        f"{n}.{f}" for n, m in model.named_modules() if isinstance(m, AdaptedLinear) for f in ("up", "down")
    }
    train(model, tmp_path, learning_rate=2e-3, gradient_checkpointing=True)
    trained = logits(model)
    assert float((trained - before).abs().max()) > 0.02
    loaded = quantkit.load(tmp_path / "checkpoint-3", dtype=torch.float32, unpack=False)
    torch.testing.assert_close(logits(loaded), trained, atol=2e-3 * float(trained.abs().max()), rtol=0)  # saved in fp16
    quantkit.finished(model)
    assert {type(module) for module in model.modules()} & {QuantizedLinear, AdaptedLinear} == {QuantizedLinear}
    assert torch.equal(logits(model), logits(loaded))
    found = model.state_dict()
    assert codes
    assert all(torch.equal(tensor, found[name if name in found else _inside(name)]) for name, tensor in codes.items())


def _inside(name):
    layer, tensor = name.rsplit("_proj.", 1)
    return f"{layer}_proj.base.{tensor}"


def test_peft_on_packed_layers(teacher, tokenizer, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = quantized(teacher, tokenizer, RTN(3))
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    train(adapted, tmp_path, learning_rate=1e-2)
    trained = logits(adapted)
    assert float((trained - before).abs().max()) > 0.02
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantized(teacher, tokenizer, RTN(3)), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, atol=5e-3, rtol=0)


@pytest.fixture(scope="module")
def whole_teacher(reference):
    """All blocks: one that does not predict the text well is not met by learning from the text."""
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corrected(whole_teacher, tokenizer):
    return quantized(whole_teacher, tokenizer, LowRank(RTN(2), 4))


@pytest.mark.parametrize("loss", [{"kl": 1.0}, {"kl": 0.0, "ce": 1.0, "hidden": 1.0}], ids=["kl", "others"])
def test_corrections_learn_from_the_teacher(loss, corrected, whole_teacher, tokenizer):
    text = Calibration("stdlib", 40, 64, seed=1)
    model = copy.deepcopy(corrected)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith((".up", ".down"))}
    settings = TuningSettings(
        6, batch=8, micro_batch=8, evaluate_every=3, held_out=8, corrections=True, pv=PVSettings(lr=2e-2), **loss
    )
    quantkit.tune(model, whole_teacher, tokenizer, calibration=text, settings=settings)
    history = model.quantkit_tuning
    assert min(entry["kl"] for entry in history) < history[0]["kl"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in frozen.items())


def test_corrections_inside_a_rotation_are_trained_in_front_of_it(teacher, tokenizer, tmp_path):
    """The same product before, up to the rounding of factors."""
    model = quantized(teacher, tokenizer, Hadamard(LowRank(RTN(2), 4)))
    layer = model.model.layers[0].mlp.up_proj.packed
    outside = correction_outside(layer)
    assert type(outside) is LowRankWeight and outside.rank == 4
    torch.testing.assert_close(outside.dequantize(), layer.dequantize(), rtol=0, atol=2e-3)
    settings = TuningSettings(2, 4, 4, evaluate_every=2, held_out=2, corrections=True, pv=PVSettings(lr=2e-2))
    quantkit.tune(model, teacher, tokenizer, calibration=Calibration("stdlib", 6, 64), settings=settings)
    assert type(model.model.layers[0].mlp.up_proj.packed) is LowRankWeight
    model.save_pretrained(tmp_path)
    loaded = quantkit.load(tmp_path, dtype=torch.float32, unpack=False)
    assert torch.equal(logits(loaded), logits(model)), "saved as what it is now, not as what it was quantized to"


def test_recomputed_activations_give_the_same_gradients(teacher, tokenizer):
    text = Calibration("stdlib", 6, 64)
    model = quantized(teacher, tokenizer, LowRank(RTN(2), 2))
    found = []
    for recompute in (False, True):
        settings = TuningSettings(2, 4, 4, evaluate_every=2, held_out=2, corrections=True, recompute=recompute)
        student = copy.deepcopy(model)
        quantkit.tune(student, teacher, tokenizer, calibration=text, settings=settings)
        found.append(student.quantkit_tuning[-1]["kl"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_bad_input(teacher, tokenizer):
    with pytest.raises(QuantkitError, match="no packed layers"):
        quantkit.finetune(copy.deepcopy(teacher))
    model = quantized(teacher, tokenizer, RTN(3))
    with pytest.raises(QuantkitError, match="rank=0"):
        quantkit.finetune(model, 0)
    with pytest.raises(QuantkitError, match="quantize it with `low_rank`"):
        settings = TuningSettings(1, held_out=2, corrections=True)
        quantkit.tune(model, teacher, tokenizer, calibration=Calibration("stdlib", 4, 64), settings=settings)
    quantkit.finetune(model)
    with pytest.raises(QuantkitError, match="being trained already"):
        quantkit.finetune(model)
    with pytest.raises(QuantkitError, match="none may be negative"):
        TuningSettings(kl=0.0)
