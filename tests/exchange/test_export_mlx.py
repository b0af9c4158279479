"""`quantkit.export` to MLX, read by MLX and run by mlx-lm."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
)

import quantkit
from quantkit.core.errors import QuantkitError

from ..helpers.experts import EXPERTS
from ..helpers.exports import LLAMAS, SIZES, TEXT, TOKENS, close


@pytest.mark.parametrize("bits, symmetric", [(2, True), (3, False), (4, True), (6, False), (8, True)])
def test_mlx(bits, symmetric, packed, tmp_path):
    mlx = pytest.importorskip("mlx.core")
    import numpy as np

    folder = packed(bits, symmetric=symmetric)
    made = quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert made.error < 1e-6
    stored, model = {}, quantkit.load(folder, dtype=torch.float32, unpack=False)
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    for name, layer in model.named_modules():
        if hasattr(layer, "packed"):
            codes = mlx.array(stored[f"{name}.weight"].view(torch.int32).numpy().view(np.uint32))
            scales, offsets = (mlx.array(stored[f"{name}.{part}"].numpy()) for part in ("scales", "biases"))
            read = torch.from_numpy(np.array(mlx.dequantize(codes, scales, offsets, group_size=64, bits=bits)))
            torch.testing.assert_close(read, layer.packed.dequantize(), rtol=1e-6, atol=1e-6)


def test_mlx_runs_the_model(packed, tmp_path):
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    import numpy as np

    folder = packed(3, head_bits=6)
    made = quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert made.dense == () and made.layers >= 15
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    found = torch.from_numpy(np.array(model(mlx.array(TOKENS.numpy())).astype(mlx.float32)))
    close(found, folder)
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(folder).encode(TEXT)


OTHERS = ["deepseek_v3", "glm4_moe", *(name for name in LLAMAS if name != "llama")]


@pytest.mark.parametrize("kind", OTHERS)
def test_mlx_runs_others(kind, model_of, packed, tmp_path):
    """Experts stacked under mlx-lm's own names; rotary positions as config.json said them before transformers 5."""
    mlx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    import numpy as np

    config = AutoConfig.for_model(kind.split(",")[0], **SIZES | LLAMAS[kind]) if kind in LLAMAS else EXPERTS[kind]
    folder = packed(4, model_of(kind, config), group_size=32)
    made = quantkit.export(folder, tmp_path / "out", to="mlx", dtype="float32")
    assert made.layers and all(name.endswith("kv_b_proj") for name in made.dense)  # DeepSeek's, which mlx-lm remakes
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    close(torch.from_numpy(np.array(model(mlx.array(TOKENS.numpy())).astype(mlx.float32))), folder, 1e-4)


def test_mlx_refuses_what_mlx_lm_has_otherwise(model_of, packed, tmp_path):
    """Convolutions, which it turns; and where nothing stays packed."""
    convolved = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    with pytest.raises(QuantkitError, match=r"conv.* is a convolution, which mlx-lm has in another order in lfm2"):
        quantkit.export(packed(4, model_of("lfm2", convolved), group_size=32), tmp_path / "out", to="mlx")
    source = model_of("qwen3", AutoConfig.for_model("qwen3", **SIZES | LLAMAS["qwen3"]))
    quantkit.quantize(
        source, output=tmp_path / "head", bits=4, method="rtn", rules={"model.layers.*": None}, head_bits=7
    )
    for to in ("mlx", "compressed-tensors", "gptq"):
        with pytest.raises(QuantkitError, match=f"no layer that {to} holds is packed"):
            quantkit.export(tmp_path / "head", tmp_path / "out", to=to)
