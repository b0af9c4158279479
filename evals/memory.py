"""Peak memory of quantizing a large checkpoint from disk, and its independence of depth.

    python -m quantkit.evals.memory --json FILE
    python -m quantkit.evals.memory --blocks 2 4 --method vptq
    python -m quantkit.evals.memory --experts 64 --json FILE

Writes an untrained Llama of TinyLlama's shape (1.1 B parameters at 22 blocks), or with `--experts` a mixture of Qwen3's
shape with a file's tensors an expert (3.1 B at 20 blocks of 64), shard by shard, runs `quantkit quantize` on it in a
process of its own, and prints that process's peak resident memory. Methods that calibrate read 4,096 tokens of the
standard library's source.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig

from quantkit.io.shards import INDEX

REFERENCE = Path(__file__).resolve().parent / "reference" / "model"
"""Whose tokenizer the untrained model gets."""


def write_untrained(folder: Path, config: LlamaConfig | Qwen3MoeConfig, seed: int = 0) -> None:
    """Writes a model with random bf16 weights and a tokenizer, one shard a block, without ever holding all of it."""
    generator = torch.Generator().manual_seed(seed)
    hidden = config.hidden_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        matrices, norms = _block(config)
        tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in matrices.items()}
        for name, size in norms.items():
            tensors[f"{prefix}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        write(f"block-{index:03d}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": matrix(config.vocab_size, hidden),
        "lm_head.weight": matrix(config.vocab_size, hidden),
    }
    write("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    for file in REFERENCE.glob("tokenizer*"):
        shutil.copy(file, folder)


def _block(config: LlamaConfig | Qwen3MoeConfig) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(shapes of a block's matrices, sizes of its norms), by their names in files."""
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = (head * (n or config.num_attention_heads) for n in (None, config.num_key_value_heads))
    matrices = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden)}
    matrices |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if isinstance(config, LlamaConfig):
        places, inner = ["mlp."], config.intermediate_size
    else:
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
        matrices["mlp.gate"] = (config.num_experts, hidden)
        places, inner = [f"mlp.experts.{expert}." for expert in range(config.num_experts)], config.moe_intermediate_size
    for place in places:
        matrices |= {f"{place}{name}_proj": (inner, hidden) for name in ("gate", "up")}
        matrices[f"{place}down_proj"] = hidden, inner
    return matrices, norms


def _config(blocks: int, experts: int) -> LlamaConfig | Qwen3MoeConfig:
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


def measure(blocks: int, method: str, workspace: Path, experts: int = 0) -> dict[str, float | str]:
    """Quantizes an untrained model of `blocks` blocks; gives GiB and seconds."""
    source, output = workspace / f"untrained-{blocks}", workspace / f"untrained-{blocks}-3bit"
    write_untrained(source, _config(blocks, experts))
    start = time.monotonic()
    command = ["-m", "quantkit.cli", "quantize", str(source), "--no-check", "--method", method, "--bits", "3"]
    command += ["--output", str(output), "--calibration", "stdlib", "--num-samples", "8", "--seqlen", "512"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((output / "quantkit_report.json").read_text())
    return {
        "method": method,
        "blocks": blocks,
        "experts": experts,
        "parameters": report["all_weights"],
        "checkpoint_gib": report["bytes_before"] / 2**30,
        "peak_rss_gib": report["peak_memory_bytes"] / 2**30,
        "peak_rss_of_children_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "seconds": time.monotonic() - start,
    }


RUNS = (("rtn", 22), ("rtn", 44), ("gptq", 2), ("gptq", 4), ("pyramid", 2))
"""(method, blocks) of a run without options."""
EXPERTS_RUNS = (("rtn", 10), ("rtn", 20), ("gptq", 2), ("gptq", 4))
"""Of a run with `--experts` alone."""


def main() -> None:
    """Parses the command line and prints one JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", help="of one method's runs; without it those of the documents")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0 for a Llama")
    parser.add_argument("--json", type=Path, help="write the list")
    asked = parser.parse_args()
    rows = []
    runs = [(asked.method, blocks) for blocks in asked.blocks or ()] or (EXPERTS_RUNS if asked.experts else RUNS)
    for method, blocks in runs:
        with tempfile.TemporaryDirectory() as workspace:
            rows.append(measure(blocks, method, Path(workspace), asked.experts))
        print(json.dumps(rows[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
