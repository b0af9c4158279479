"""Experts of mixtures in other programs' forms, and back."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
)
from transformers.integrations import compressed_tensors

import quantkit
from quantkit import RTN
from quantkit.core.errors import QuantkitError
from quantkit.io.checkpoint import read_config
from quantkit.io.shards import Shards

from ..helpers.experts import EXPERTS
from ..helpers.exports import LLAMAS, SIZES, close, logits


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_experts_go_to_compressed_tensors_and_back(kind, model_of, packed, tmp_path):
    """One by one under the names of the model's files, gate and up apart, as transformers and vLLM look them up."""
    source = model_of(kind, EXPERTS[kind])
    folder = packed(4, source, group_size=32)
    quantkit.export(folder, tmp_path / "out", to="compressed-tensors", dtype="float32")
    dense, stored = Shards(source).specs, Shards(tmp_path / "out").specs
    assert {name.replace("_packed", "") for name in stored if not name.endswith(("_scale", "_shape"))} == set(dense)
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert any(name.endswith(".mlp.gate") for name in quantization["ignore"])  # routers
    quantkit.import_model(tmp_path / "out", tmp_path / "again")
    close(logits(quantkit.load(tmp_path / "again", dtype=torch.float32)), folder)
    if hasattr(compressed_tensors, "CompressedTensorsDequantize"):  # newer than 5.17
        unpacked = CompressedTensorsConfig(dequantize=True)
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, quantization_config=unpacked
        )
        close(logits(theirs), folder)
    quantkit.export(tmp_path / "again", tmp_path / "twice", to="compressed-tensors", dtype="float32")
    first, twice = (dict(shards.read(shards.specs)) for shards in map(Shards, (tmp_path / "out", tmp_path / "twice")))
    assert first.keys() == twice.keys() and all(torch.equal(first[name], twice[name]) for name in first)


@pytest.mark.parametrize("bits, of_experts", [(8, 4), (4, 8)])
def test_experts_have_a_width_of_their_own(bits, of_experts, model_of, packed, tmp_path):
    """transformers finds the experts' scheme by a pattern, and else takes the first one."""
    source = model_of("qwen3_moe", EXPERTS["qwen3_moe"])
    folder = packed(bits, source, group_size=32, experts_bits=of_experts)
    quantkit.export(folder, tmp_path / "out", to="compressed-tensors", dtype="float32")
    groups = read_config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    (own,) = (group for group in groups if any("experts" in target for target in group["targets"]))
    assert own["weights"]["num_bits"] == of_experts and own["targets"] == [r"re:.*\.experts\.\d+\..*"]
    if hasattr(compressed_tensors, "CompressedTensorsDequantize"):  # newer than 5.17
        unpacked = CompressedTensorsConfig(dequantize=True)
        load = AutoModelForCausalLM.from_pretrained
        close(logits(load(tmp_path / "out", dtype=torch.float32, quantization_config=unpacked)), folder)


def test_experts_that_readers_would_not_have_are_refused(model_of, packed, tmp_path):
    folder = packed(4, model_of("gpt_oss", EXPERTS["gpt_oss"]), group_size=32)
    for to in ("compressed-tensors", "gptq", "mlx"):
        with pytest.raises(QuantkitError, match="experts that the model's files have all in one tensor; `--to dense`"):
            quantkit.export(folder, tmp_path / "out", to=to)
    source = model_of("qwen3_moe", EXPERTS["qwen3_moe"])
    with pytest.raises(QuantkitError, match="experts one by one; `--to compressed-tensors` has them"):
        quantkit.export(packed(4, source, group_size=32), tmp_path / "out", to="gptq")
    with pytest.raises(QuantkitError, match="experts with zeros"):
        quantkit.export(packed(4, source, group_size=32, symmetric=False), tmp_path / "out", to="compressed-tensors")
    wider = {"*experts.1.down_proj": RTN(8, group_size=32)}
    quantkit.quantize(source, output=tmp_path / "wider", bits=4, method="rtn", group_size=32, rules=wider)
    for to in ("compressed-tensors", "mlx", "gguf"):
        with pytest.raises(QuantkitError, match=r"experts\.0\.down_proj and .*experts\.1\.down_proj are .* two ways"):
            quantkit.export(tmp_path / "wider", tmp_path / "out.gguf", to=to)


@pytest.mark.parametrize("kept", ["*experts*", "*layers.0.*experts*"])
def test_dense_experts_in_gguf(kept, model_of, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    source = model_of("qwen3_moe", AutoConfig.for_model("qwen3_moe", **SIZES | LLAMAS["qwen3_moe"]))
    folder = tmp_path / "packed"
    quantkit.quantize(source, output=folder, bits=4, method="rtn", group_size=32, rules={kept: None})
    quantkit.export(folder, tmp_path / "model.gguf", to="gguf", dtype="float32")
    quantkit.import_model(tmp_path / "model.gguf", tmp_path / "again")
    close(logits(quantkit.load(tmp_path / "again", dtype=torch.float32)), folder, 1e-3)  # whose ends are in fp16
    quantkit.export(folder, tmp_path / "mlx", to="mlx", dtype="float32")
    quantkit.import_model(tmp_path / "mlx", tmp_path / "mine")
    close(logits(quantkit.load(tmp_path / "mine", dtype=torch.float32)), folder)
