"""What it costs to hold every tensor of a packed checkpoint against its checksum.

    python -m quantkit.evals.benchmarks.checksums [--hidden 1024] [--blocks 8] [--runs 5] [--json FILE]

Packs an untrained model at 3 bits, then loads it as often as asked for, with `verify` and without, in turn, and reads
all its bytes once by themselves; prints medians and their ratios.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from transformers import LlamaConfig

import quantkit
from quantkit.evals.memory import write_untrained
from quantkit.io.checkpoint import verify


def seconds(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(hidden: int, blocks: int, runs: int, home: Path) -> dict[str, float]:
    """Medians, in seconds, and sizes."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    write_untrained(home / "model", config)
    packed = home / "packed"
    quantkit.quantize(str(home / "model"), method="rtn", bits=3, output=packed, device="cpu")
    files = sorted(packed.glob("*.safetensors"))
    works: dict[str, Callable[[], object]] = {
        "load": lambda: quantkit.load(packed),
        "load_verify": lambda: quantkit.load(packed, verify=True),
        "inspect_verify": lambda: verify(packed),
        "read": lambda: [file.read_bytes() for file in files],
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):  # the first round fills the system's cache
        for name, work in works.items():
            spent = seconds(work)
            if run:
                taken[name].append(spent)
    found = {name: median(times) for name, times in taken.items()}
    return found | {
        "bytes": float(sum(file.stat().st_size for file in files)),
        "more": found["load_verify"] / found["load"],
        "runs": float(runs),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = measure(asked.hidden, asked.blocks, asked.runs, Path(home))
    print(
        f"{found['bytes'] / 2**20:.1f} MiB: load {found['load']:.3f} s, verified {found['load_verify']:.3f} s "
        f"({found['more']:.2f} x); inspect --verify {found['inspect_verify']:.3f} s; reading {found['read']:.3f} s"
    )
    if asked.json:
        kinds = ("load", "load_verify", "inspect_verify", "read")
        rows = [{"what": kind, "seconds": found[kind], "ratio": found[kind] / found["load"]} for kind in kinds]
        asked.json.write_text(json.dumps([row | {"bytes": found["bytes"]} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
