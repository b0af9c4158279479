"""What `--dry-run` says of memory and time, beside what the runs then take.

    python -m quantkit.evals.dry_run [--only TEXT] [--json FILE]

Five runs, each in a process of its own: by several methods on the reference model, and on an untrained one that is
wider, in 4 blocks. Memory is the process's peak; time is of this machine, which should have nothing else to do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from quantkit.evals.memory import REFERENCE, write_untrained

RUNS = {
    "rtn": (False, "--method rtn --bits 3"),
    "gptq": (False, "--bits 3"),
    "gptq, few sequences": (False, "--bits 3 --num-samples 32"),
    "trellis of 10 state bits": (False, "--method trellis --bits 2 --state-bits 10 --num-samples 24"),
    "gptq, wide model": (True, "--bits 3 --num-samples 16 --seqlen 512"),
}
"""Name -> (whether on the wide model, options)."""


def wide_model(folder: Path) -> Path:
    """An untrained Llama of 1,024 features and 4 blocks."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    write_untrained(folder, config)
    return folder


def _said(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints."""
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def measure(model: Path, options: str, output: Path) -> dict[str, Any]:
    """One run, after its estimate."""
    command = [sys.executable, "-m", "quantkit.cli", "quantize", str(model), *options.split()]
    command += ["--calibration", "stdlib", "--device", "cpu", "--output", str(output), "--quiet", "--json"]
    told, report = (_said([*command, *more]) for more in (["--dry-run"], []))
    memory, seconds = told["memory_bytes"], told["seconds"]
    taken = {"peak_bytes": report["peak_memory_bytes"], "seconds": report["seconds"]}
    ratios = {"memory_ratio": memory / taken["peak_bytes"], "time_ratio": seconds / taken["seconds"]}
    return {"told_bytes": memory, "told_seconds": seconds} | taken | ratios


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name has this text")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        wide = wide_model(Path(home) / "wide")
        for number, (name, (on_wide, options)) in enumerate(RUNS.items()):
            if asked.only in name:
                row = measure(wide if on_wide else REFERENCE, options, Path(home) / f"out-{number}")
                rows.append({"run": name, "options": options, "wide": on_wide} | row)
                print(
                    f"{name:26} told {row['told_bytes'] / 2**20:6.0f} MiB {row['told_seconds']:6.0f} s, "
                    f"took {row['peak_bytes'] / 2**20:6.0f} MiB {row['seconds']:6.0f} s: "
                    f"{row['memory_ratio']:.2f} x memory, {row['time_ratio']:.2f} x time",
                    flush=True,
                )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
