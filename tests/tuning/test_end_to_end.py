"""End-to-end tuning: it helps, it is exact to resume, and it refuses what cannot work."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import AutoTokenizer

import quantkit
from quantkit import GPTQ, VPTQ, Calibration, Hadamard, LowRank, PVSettings, Pyramid, TuningSettings
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.checkpoint import read_config
from quantkit.io.run_folder import RunFolder
from quantkit.models.linear import QuantizedLinear
from quantkit.run.teacher import Teacher
from quantkit.tuning.end_to_end import _Run
from quantkit.tuning.pv import TunedLinear

SHORT = TuningSettings(
    6,
    batch=4,
    micro_batch=4,
    evaluate_every=2,
    held_out=8,
    pv=PVSettings(lr=2e-3, code_lr=0.2, fraction=0.1, trust=0.1),
)


@pytest.fixture(scope="module")
def quantized(teacher, tokenizer):
    """(packed model, teacher, tokenizer, text) at 2 bits."""
    text = Calibration("stdlib", 24, 64, seed=2)
    return (
        quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=GPTQ(2), calibration=text),
        teacher,
        tokenizer,
        text,
    )


@pytest.fixture
def models(quantized):
    """The same, with a packed model that a test may change."""
    model, *others = quantized
    return copy.deepcopy(model), *others


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_tuning_helps_and_keeps_the_size(models):
    model, teacher, tokenizer, text = models
    before = states(model)
    seen = []
    tuned = quantkit.tune(
        model, teacher, tokenizer, calibration=text, settings=SHORT, progress=lambda p: seen.append((p.step, p.kl))
    )
    assert tuned is model
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    history = model.quantkit_tuning
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    assert min(entry["kl"] for entry in history) < history[0]["kl"]
    after = states(model)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("codes"))
    assert all(
        isinstance(model.get_submodule(n), QuantizedLinear) for n, m in model.named_modules() if hasattr(m, "packed")
    )


def test_what_is_kept_is_the_best_state(models):
    """The kept model has, packed, the least KL of the history."""
    model, teacher, tokenizer, text = models
    wild = TuningSettings(
        6, 2, 2, evaluate_every=1, held_out=2, pv=PVSettings(lr=0.3, code_lr=0.5, fraction=1.0, trust=1.0)
    )
    quantkit.tune(model, teacher, tokenizer, calibration=text, settings=wild)
    best = min(entry["kl"] for entry in model.quantkit_tuning)
    run = _Run(model, Teacher(teacher), text.sequences(tokenizer, model), wild)
    run.begin()
    assert run.history[0]["kl"] == pytest.approx(best, rel=1e-2)
    run.finish()


def test_an_interrupted_run_ends_in_the_same_model(models, tmp_path):
    model, teacher, tokenizer, text = models
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    quantkit.tune(whole, teacher, tokenizer, calibration=text, settings=SHORT)

    def stop(now):
        if now.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.tune(broken, teacher, tokenizer, calibration=text, settings=SHORT, state=tmp_path / "s", progress=stop)
    again, steps = copy.deepcopy(model), []
    quantkit.tune(
        again, teacher, tokenizer, calibration=text, settings=SHORT, state=tmp_path / "s",
        progress=lambda now: steps.append(now.step),
    )  # fmt: skip
    assert steps == [5, 6]
    assert again.quantkit_tuning == whole.quantkit_tuning
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())
    other = TuningSettings(7, 2, 1, evaluate_every=2, held_out=2)
    with pytest.raises(QuantkitError, match="other settings"):
        quantkit.tune(copy.deepcopy(model), teacher, tokenizer, calibration=text, settings=other, state=tmp_path / "s")
    path = tmp_path / "s" / "state.pt"
    content = torch.load(path, weights_only=True)
    content["tensors"][0].view(-1)[0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"state\.pt is not as it was written; remove it"):
        quantkit.tune(copy.deepcopy(model), teacher, tokenizer, calibration=text, settings=SHORT, state=tmp_path / "s")
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a tuning run's state"):
        quantkit.tune(copy.deepcopy(model), teacher, tokenizer, calibration=text, settings=SHORT, state=tmp_path / "s")


def test_the_mean_of_the_last_steps_is_measured_too(models, tmp_path):
    model, teacher, tokenizer, text = models
    sequences = text.sequences(tokenizer, model)
    settings = TuningSettings(20, 1, 1, evaluate_every=19, held_out=2, mixed=False, pv=PVSettings(lr=2e-3))

    run, again = (_Run(copy.deepcopy(model), Teacher(teacher), sequences, settings) for _ in range(2))
    for one in (run, again):
        one.begin()
    while run.step < 19:
        run.advance()
    before = [parameter.detach().clone() for parameter in run.optimizer.continuous]
    folder = RunFolder(tmp_path / "state", "a state")
    with folder.begin({"run": "tune"}):
        run.save(folder)
        again.restore(folder)
    taken = {}
    for one in (run, again):
        step = one.optimizer.step

        def stepped(scale, one=one, step=step):
            changed = step(scale)
            taken[one] = [parameter.detach().clone() for parameter in one.optimizer.continuous]
            return changed

        one.optimizer.step = stepped
        one.advance()
        wanted = [(first + last) / 2 for first, last in zip(before, taken[one], strict=True)]
        torch.testing.assert_close(list(one.optimizer.continuous), wanted)
        assert [entry["step"] for entry in one.history] == [0, 19, 20, 20]
        assert one.history[-1]["averaged"] == 2
    assert run.history == again.history
    for one in (run, again):
        one.finish()


@pytest.mark.parametrize(
    "method", [Hadamard(VPTQ(2.0, 2, passes=1)), LowRank(Hadamard(Pyramid(2.0, 8)), 2)], ids=["vptq", "pyramid"]
)
def test_other_formats(models, method, tmp_path):
    """Of one block two layers, all else dense."""
    _, teacher, tokenizer, text = models
    rules = {"model.layers.1.*": None, "*.self_attn.*": None, "*.gate_proj": None}
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=method, calibration=text, rules=rules)
    brief = dataclasses.replace(SHORT, steps=3, evaluate_every=1)
    quantkit.tune(model, teacher, tokenizer, calibration=text, settings=brief)
    assert min(entry["kl"] for entry in model.quantkit_tuning) < model.quantkit_tuning[0]["kl"]
    model.save_pretrained(tmp_path / "tuned")
    tokens = torch.randint(0, 2048, (1, 20))
    with torch.no_grad():
        assert torch.equal(
            quantkit.load(tmp_path / "tuned", dtype=torch.float32, unpack=False).eval()(tokens).logits,
            model(tokens).logits,
        )


def test_a_student_that_is_its_teacher_has_nothing_to_learn(models):
    _, teacher, tokenizer, text = models
    model = quantkit.quantize(copy.deepcopy(teacher), tokenizer, method=GPTQ(8), calibration=text)
    same = copy.deepcopy(model)
    run = _Run(model, Teacher(same), text.sequences(tokenizer, model), SHORT)
    run.begin()
    assert run.history[0]["kl"] == pytest.approx(0, abs=1e-6)
    run.finish()


def test_micro_batches_add_up(models):
    model, teacher, tokenizer, text = models
    found = []
    for micro_batch in (1, 2):
        pv = PVSettings("continuous", lr=1e-3)
        settings = TuningSettings(2, 2, micro_batch, evaluate_every=2, held_out=2, mixed=False, pv=pv)
        other = copy.deepcopy(model)
        quantkit.tune(other, teacher, tokenizer, calibration=text, settings=settings)
        found.append(other.quantkit_tuning[-1]["kl"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_with_the_best_state(models, caplog):
    model, teacher, tokenizer, text = models
    before = states(model)
    broken = copy.deepcopy(teacher)

    calls = []
    forward = broken.forward

    def poisoned(*args, **kwargs):
        calls.append(1)
        output = forward(*args, **kwargs)
        if len(calls) > 2:  # after the first measurement
            output.logits = output.logits * float("nan")
        return output

    broken.forward = poisoned
    quantkit.tune(model, broken, tokenizer, calibration=text, settings=SHORT)
    assert "the loss is nan" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_input(models):
    model, teacher, tokenizer, text = models
    with pytest.raises(QuantkitError, match="no packed layers"):
        quantkit.tune(copy.deepcopy(teacher), teacher, tokenizer, calibration=text, settings=SHORT)
    with pytest.raises(QuantkitError, match="held out: give more text"):
        quantkit.tune(model, teacher, tokenizer, calibration=text, settings=TuningSettings(held_out=24))
    before = states(model)
    narrow = copy.deepcopy(teacher)
    narrow.lm_head = torch.nn.Linear(narrow.config.hidden_size, 100, bias=False)  # its config says otherwise
    with pytest.raises(QuantkitError, match="the teacher's logits are"):
        quantkit.tune(model, narrow, tokenizer, calibration=text, settings=SHORT)
    assert states(model).keys() == before.keys(), "the model is as it was"
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(model).items())
    other = copy.deepcopy(teacher)
    other.config.vocab_size = 5
    with pytest.raises(QuantkitError, match="the teacher's vocab_size is 5 and the model's 2048"):
        quantkit.tune(model, other, tokenizer, calibration=text, settings=SHORT)
    other.config.vocab_size, other.config.model_type = 2048, "gpt2"
    with pytest.raises(QuantkitError, match="the teacher's model_type is gpt2 and the model's llama"):
        quantkit.tune(model, other, tokenizer, calibration=text, settings=SHORT)
    for setting in ("steps", "batch", "micro_batch", "evaluate_every", "held_out", "patience"):
        with pytest.raises(QuantkitError, match=setting):
            TuningSettings(**{setting: 0})


def test_a_full_disk_is_said_and_the_model_keeps_its_best_state(models, tmp_path, monkeypatch):
    model, teacher, tokenizer, text = models

    def full(*_args, **_kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(QuantkitError, match="the disk is full"):
        quantkit.tune(model, teacher, tokenizer, calibration=text, settings=SHORT, state=tmp_path / "state")
    assert not list(tmp_path.rglob("state.pt*"))
    assert not any(isinstance(module, TunedLinear) for module in model.modules())


def test_embeddings_and_norms_of_a_half_precision_model_move(models):
    """bf16 has no room for small steps: they add up in fp32."""
    model, teacher, tokenizer, text = models
    model, teacher = model.bfloat16(), copy.deepcopy(teacher).bfloat16()
    before = states(model)
    settings = TuningSettings(
        4, 4, 4, evaluate_every=2, held_out=8, embeddings=True, pv=PVSettings("continuous", lr=2e-3)
    )
    quantkit.tune(model, teacher, tokenizer, calibration=text, settings=settings)
    after = model.state_dict()
    assert after["lm_head.weight"].dtype == torch.bfloat16
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_the_command(models, text_file, tmp_path):
    from typer.testing import CliRunner

    from quantkit.cli.main import app

    model, teacher, tokenizer, _ = models
    model.bfloat16().save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    teacher.save_pretrained(tmp_path / "teacher")
    command = [
        "tune",
        str(tmp_path / "packed"),
        "--teacher",
        str(tmp_path / "teacher"),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--steps", "4", "--batch", "2", "--calibration", str(text_file), "--num-samples", "8", "--seqlen", "64"]
    command += ["--held-out", "2", "--evaluate-every", "2", "--lr", "2e-3", "--code-lr", "0.2"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "held-out KL to the teacher" in result.output
    assert not (tmp_path / "out.partial").exists()
    record = json.loads((tmp_path / "out" / "quantkit_tuning.json").read_text())
    assert record["settings"]["steps"] == 4
    loaded = quantkit.load(tmp_path / "out", dtype=torch.float32, verify=True)
    assert "checksums" in read_config(tmp_path / "out")["quantization_config"]
    sizes = {name: sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("packed", "out")}
    assert sizes["out"] == pytest.approx(sizes["packed"], abs=2000), "of the same types, whatever was computed in"
    assert loaded.config.quantization_config is not None
    AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(QuantkitError, match="already exists"):
        CliRunner().invoke(app, command, catch_exceptions=False)
