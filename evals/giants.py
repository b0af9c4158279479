"""What a run over a very large model takes, from shapes alone: nothing of it is there.

    python -m quantkit.evals.giants --json FILE
    python -m quantkit.evals.giants --only 70B

Llama 3's 70 B and DeepSeek V3's 671 B are laid out as files without content (sparse ones, which take no disk), and
asked for what `quantize --dry-run` asks: bytes to read and to write, memory of each process beside its libraries, and
multiplications of the passes over 128 sequences of 2,048 tokens, which processes share. How long those take, and
rounding beside them, `--dry-run` tells on the machine that is to do it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedConfig

from quantkit.core.units import size
from quantkit.io.shards import INDEX
from quantkit.io.source import open_folder
from quantkit.models.plan import plan_needs
from quantkit.run.estimate import experts_chosen, multiplications, shapes_of, sizes, working_bytes
from quantkit.run.recipe import Recipe, make_quantizer

MODELS: dict[str, PreTrainedConfig] = {
    "Llama 3 70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ),
    "DeepSeek V3 671B": DeepseekV3Config(dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"]),
}  # fmt: skip
"""By name."""
METHODS = {
    "GPTQ": Recipe(make_quantizer("gptq", None, None, bits=3, group_size=64)),
    "trellis": Recipe(make_quantizer("trellis", None, None, bits=3)),
}
"""By label."""
SAMPLES, SEQLEN = 128, 2048
"""Of the text: the default."""
PROCESSES = (1, 8)
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def lay_out(folder: Path, config: PreTrainedConfig) -> Path:
    """A model's folder, whose files have headers and behind them holes; a file a tensor."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    files = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
        header, files[name] = json.dumps({name: entry}).encode(), f"{number}.safetensors"
        with open(folder / files[name], "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + tensor.nbytes)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def asked(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What a run takes."""
    source = open_folder(folder, torch.bfloat16, structure_only=True)
    plan, cpu = recipe.plan(source.model), torch.device("cpu")
    tokens = torch.empty(SAMPLES, SEQLEN, dtype=torch.int64, device="meta")
    memory = {f"memory_{count}": working_bytes(source, recipe, plan, tokens, cpu, count) for count in PROCESSES}
    shapes, needs, chosen = shapes_of(source, plan), plan_needs(plan), experts_chosen(source)
    work = multiplications(shapes, tokens.numel(), needs, recipe.runs_back(plan), chosen)
    laid_out = sizes(source, recipe)
    return {"bytes_before": laid_out.bytes_before, "bytes_after": laid_out.bytes_after} | memory | {"peta": work / 1e15}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name has this text")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for number, (name, config) in enumerate(MODELS.items()):
            if given.only not in name:
                continue
            folder = lay_out(Path(home) / str(number), config)
            for method, recipe in METHODS.items():
                row = {"model": name, "method": method} | asked(folder, recipe)
                rows.append(row)
                each = ", ".join(f"{size(row[f'memory_{count}'])} in each of {count}" for count in PROCESSES)
                print(
                    f"{name}, {method}: {size(row['bytes_before'])} -> {size(row['bytes_after'])}; {each}", flush=True
                )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
