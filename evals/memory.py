"""Peak memory of quantizing a large checkpoint from disk, and its independence of depth.

    python -m quantkit.evals.memory --json FILE
    python -m quantkit.evals.memory --blocks 2 4 --method vptq
    python -m quantkit.evals.memory --experts 64 --json FILE
    python -m quantkit.evals.memory --stored --json FILE

Writes an untrained Llama of TinyLlama's shape (1.1 B parameters at 22 blocks), or with `--experts` a mixture of Qwen3's
shape with a file's tensors an expert (3.1 B at 20 blocks of 64), shard by shard, runs `quantkit quantize` on it in a
process of its own, and prints that process's peak resident memory. Methods that calibrate read 4,096 tokens of the
standard library's source. `--stored` does that with smaller blocks and 1,024 tokens for each way to store a model that
is not its own: experts one by one, names that transformers changes, matrices in FP8.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen2_5_VLConfig, Qwen3MoeConfig

from quantkit.io.classes import class_of
from quantkit.io.shards import INDEX
from quantkit.io.source import open_folder

REFERENCE = Path(__file__).resolve().parent / "reference" / "model"
"""Whose tokenizer the untrained model gets."""


def write_untrained(folder: Path, config: PreTrainedConfig, seed: int = 0) -> None:
    """Writes a model with random bf16 weights and a tokenizer, one shard a block, without ever holding all of it.

    Args:
        folder: to write.
        config: of a Llama, its matrices in FP8 where it says so; a mixture of Qwen3's; or a Qwen 2.5 VL, whose tensors
            get the names that its files had before transformers changed them.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    hidden = text.hidden_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(text.num_hidden_layers):
        prefix = f"model.layers.{index}."
        matrices, vectors = _block(text)
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in matrices.items():
            own = {f"{prefix}{name}.weight": matrix(*shape)}
            tensors |= _in_fp8(own) if getattr(config, "quantization_config", None) else own
        for name, size in vectors.items():
            tensors[f"{prefix}{name}"] = torch.ones(size, dtype=torch.bfloat16)
        write(f"block-{index:03d}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": matrix(text.vocab_size, hidden),
        "lm_head.weight": matrix(text.vocab_size, hidden),
    }
    ends |= _tower(config)
    write("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    for file in REFERENCE.glob("tokenizer*"):
        shutil.copy(file, folder)


def _in_fp8(matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices in FP8, with a factor a block of 128 x 128."""
    factors = {name: torch.ones(-(-len(m) // 128), -(-m.shape[1] // 128)) / 64 for name, m in matrices.items()}
    scaled = {name: (m.float() * 64).to(torch.float8_e4m3fn) for name, m in matrices.items()}
    return scaled | {f"{name}_scale_inv": factor for name, factor in factors.items()}


def _tower(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """What a model sees with, by the names that it had in files; nothing of a model of text."""
    if config.get_text_config() is config:
        return {}
    with init_empty_weights():
        state = class_of(config)._from_config(config, dtype=torch.bfloat16).state_dict()
    return {
        name.removeprefix("model."): torch.full(tensor.shape, 0.01, dtype=torch.bfloat16)
        for name, tensor in state.items()
        if name.startswith("model.visual.")
    }


def _block(config: PreTrainedConfig) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(shapes of a block's matrices, sizes of its vectors), by their names in files."""
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = (head * (n or config.num_attention_heads) for n in (None, config.num_key_value_heads))
    matrices = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden)}
    matrices |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}
    vectors = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    if not isinstance(config, Qwen3MoeConfig):
        places, inner = ["mlp."], config.intermediate_size
        if not isinstance(config, LlamaConfig):
            vectors |= {"self_attn.q_proj.bias": queries, "self_attn.k_proj.bias": keys, "self_attn.v_proj.bias": keys}
    else:
        vectors |= {"self_attn.q_norm.weight": head, "self_attn.k_norm.weight": head}
        matrices["mlp.gate"] = (config.num_experts, hidden)
        places, inner = [f"mlp.experts.{expert}." for expert in range(config.num_experts)], config.moe_intermediate_size
    for place in places:
        matrices |= {f"{place}{name}_proj": (inner, hidden) for name in ("gate", "up")}
        matrices[f"{place}down_proj"] = hidden, inner
    return matrices, vectors


def _config(blocks: int, experts: int) -> PreTrainedConfig:
    if experts:
        return Qwen3MoeConfig(
            vocab_size=32000, hidden_size=1024, moe_intermediate_size=768, num_hidden_layers=blocks,
            num_attention_heads=16, num_key_value_heads=4, num_experts=experts, num_experts_per_tok=8,
            tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


_SMALL: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def _stored(blocks: int, stored: str) -> PreTrainedConfig:
    """A model whose files hold it in another form than its own."""
    if stored == "experts":
        config: PreTrainedConfig = _config(blocks, 16)
        config.vocab_size, config.num_experts_per_tok = 8192, 4
    elif stored == "renamed":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
        text = _SMALL | {"num_hidden_layers": blocks, "rope_parameters": rope}
        tower = {"hidden_size": 64, "intermediate_size": 96, "depth": 1, "num_heads": 4, "out_hidden_size": 2048}
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=tower, tie_word_embeddings=False, dtype="bfloat16",
            architectures=["Qwen2_5_VLForConditionalGeneration"],
        )  # fmt: skip
    else:
        config = LlamaConfig(
            **_SMALL | {"quantization_config": _FP8}, num_hidden_layers=blocks, dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    return config


def measure(blocks: int, method: str, workspace: Path, experts: int = 0, stored: str = "") -> dict[str, float | str]:
    """Quantizes an untrained model of `blocks` blocks; gives GiB and seconds."""
    source, output = workspace / f"untrained-{blocks}", workspace / f"untrained-{blocks}-3bit"
    write_untrained(source, _stored(blocks, stored) if stored else _config(blocks, experts))
    start = time.monotonic()
    command = ["-m", "quantkit.cli", "quantize", str(source), "--no-check", "--method", method, "--bits", "3"]
    command += ["--output", str(output), "--calibration", "stdlib", "--seqlen", "256" if stored else "512"]
    command += ["--num-samples", "4" if stored else "8"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((output / "quantkit_report.json").read_text())
    kind: dict[str, float | str] = {"experts": experts}
    if stored:
        itemsize, opened = torch.float32.itemsize, open_folder(source, structure_only=True)
        kind = {"stored": stored, "block_bytes": opened.block_nbytes(itemsize)}
        kind |= {"model_bytes": report["all_weights"] * itemsize, "peak_bytes": report["peak_memory_bytes"]}
    return kind | {
        "method": method,
        "blocks": blocks,
        "parameters": report["all_weights"],
        "checkpoint_gib": report["bytes_before"] / 2**30,
        "peak_rss_gib": report["peak_memory_bytes"] / 2**30,
        "peak_rss_of_children_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "seconds": time.monotonic() - start,
    }


RUNS = (("rtn", 22), ("rtn", 44), ("gptq", 2), ("gptq", 4), ("pyramid", 2))
"""(method, blocks) of a run without options."""
EXPERTS_RUNS = (("rtn", 10), ("rtn", 20), ("gptq", 2), ("gptq", 4), ("gptq", 8))
"""Of a run with `--experts` alone."""
STORED = ("experts", "renamed", "fp8")
STORED_RUNS = (("rtn", 2), ("rtn", 8), ("gptq", 2), ("gptq", 4))
"""Of a run with `--stored`, for each of these."""


def main() -> None:
    """Parses the command line and prints one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", help="of one method's runs; without it those of the documents")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0 for a Llama")
    parser.add_argument("--stored", nargs="*", choices=STORED, help="models in other forms than their own; all of them")
    parser.add_argument("--json", type=Path, help="write the list")
    asked = parser.parse_args()
    rows = []
    kinds = [""] if asked.stored is None else asked.stored or STORED
    usual = EXPERTS_RUNS if asked.experts else RUNS if asked.stored is None else STORED_RUNS
    runs = [(asked.method, blocks) for blocks in asked.blocks or ()] or usual
    for stored, (method, blocks) in product(kinds, runs):
        with tempfile.TemporaryDirectory() as workspace:
            rows.append(measure(blocks, method, Path(workspace), asked.experts, stored))
        print(json.dumps(rows[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
