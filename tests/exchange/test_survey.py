"""`quantkit inspect` of what other programs have made: by whom, how many bits, which groups."""

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.cli.main import app
from quantkit.exchange.survey import survey

from ..helpers.ggufs import write_gguf
from ..helpers.stored import FORMS, store

SAID = {
    "fp8": ("fp8 8 bits", 8), "fbgemm_fp8": ("fbgemm_fp8 8 bits", 8), "gptq-4": ("gptq 4 bits g32", 4),
    "gptq-3": ("gptq 3 bits g32", 3), "gptq-8-v2": ("gptq 8 bits g32", 8), "auto-round": ("auto-round 2 bits g32", 2),
    "awq": ("awq 4 bits g32", 4), "bnb-4": ("bitsandbytes 4 bits", 4), "bnb-4-nested": ("bitsandbytes 4 bits", 4),
    "bnb-8": ("bitsandbytes 8 bits", 8), "compressed-4": ("compressed-tensors 4 bits g32", 4),
    "compressed-3-whole": ("compressed-tensors 3 bits g32", 3),
    "compressed-3-asym": ("compressed-tensors 3 bits g32", 3), "compressed-fp8": ("compressed-tensors 8 bits", 8),
    "mlx-3": ("mlx 3 bits g32", 3),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, model_folder, tmp_path):
    meant = store(model_folder("llama_even"), form, tmp_path / "stored")
    found = survey(tmp_path / "stored")
    assert {f"{name}.weight" for name in found.layers} == meant.keys()
    label, bits = SAID[form]
    for name, matrix in found.layers.items():
        assert (matrix.format, matrix.bits) == (label, bits)
        assert matrix.shape == tuple(meant[f"{name}.weight"].shape)
        assert bits < matrix.bits_per_weight < bits + 4
    assert found.by and found.packed_nbytes < found.nbytes and found.dense


def test_the_command(model_folder, tokenizer, tmp_path):
    def said(*arguments):
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    plain = model_folder("llama_even")
    assert "is not quantized" in said(plain)
    assert json.loads(said(plain, "--json"))["quantized_by"] is None
    store(plain, "awq", tmp_path / "awq")
    assert "14 matrices quantized by awq: " in said(tmp_path / "awq")
    model = AutoModelForCausalLM.from_pretrained(plain).float()
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "Q4_0")
    text = said(tmp_path / "model.gguf")
    assert "Q4_0" in text and "4.500 bits per weight" in text
    record = json.loads(said(tmp_path / "model.gguf", "--json"))
    assert {row["bits"] for row in record["layers"].values()} == {4}
    (tmp_path / "odd").mkdir()
    for file in plain.iterdir():
        (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x9"}}))
    assert "quantized by x9, whose tensors are not known here" in " ".join(said(tmp_path / "odd").split())
