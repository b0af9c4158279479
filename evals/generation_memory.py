"""Peak memory of generation at a full context: whether a checkpoint of `quantkit search --fit` fits.

    python -m quantkit.evals.generation_memory DIR --context 4096 --batch 1 --fit 2GB

Loads the checkpoint in its own dtype, reads a prompt that fills the context but for a few tokens, generates those, and
prints the peak: on a GPU what the allocator has reserved, on a CPU the process's resident memory beyond what it held
with its libraries imported. With --fit the exit code is 1 where the peak exceeds it. With --live tensors are counted
instead, as long as they live: what the allocator keeps or rounds up is not in it, nor what an operation uses inside.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.core.device import pick_device
from quantkit.core.units import parse_size
from quantkit.evopress.memory import LiveBytes
from quantkit.io.hf import load
from quantkit.kvcache.attention import compressed_kv

NEW_TOKENS = 8


def peak_bytes(folder: Path, context: int, batch: int, device: torch.device, kv_bits: int | None = None) -> int:
    """Peak of loading and generating.

    Args:
        folder: of the checkpoint.
        context: tokens that the KV cache holds in the end.
        batch: sequences.
        device: where.
        kv_bits: of a compressed cache's codes; None for a plain one.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    model = load(folder, device=device).eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _generate(model, context, batch, kv_bits)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1]) - before


def _generate(model: Any, context: int, batch: int, kv_bits: int | None) -> None:
    prompt = torch.randint(0, model.config.vocab_size, (batch, context - NEW_TOKENS), device=model.device)
    with nullcontext() if kv_bits is None else compressed_kv(model, bits=kv_bits):
        model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


def live_bytes(folder: Path, context: int, batch: int, device: torch.device, kv_bits: int | None = None) -> int:
    """Most bytes of tensors alive at once while generating, the weights among them; arguments of `peak_bytes`."""
    model = load(folder, device=device).eval()
    weights = [*model.parameters(), *model.buffers()]
    with LiveBytes(weights) as live:
        _generate(model, context, batch, kv_bits)
    return live.peak + sum(tensor.nbytes for tensor in weights)


def main() -> None:
    """Parses the command line and prints a JSON line for each cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-bits", type=int, nargs="*", help="compress the KV cache; 16 is a plain one")
    parser.add_argument("--fit", help="as given to quantkit search")
    parser.add_argument("--live", action="store_true", help="count tensors instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the list")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    measured = live_bytes if arguments.live else peak_bytes
    stored = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    rows: list[dict[str, Any]] = []
    for bits in arguments.kv_bits or [16]:
        peak = measured(arguments.folder, arguments.context, arguments.batch, device, None if bits == 16 else bits)
        fits = None if arguments.fit is None else peak <= parse_size(arguments.fit)
        rows.append(
            {"kv_bits": bits, "peak_bytes": peak, "peak_mb": peak / 1e6, "checkpoint_bytes": stored, "fits": fits}
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["fits"] in (None, True) for row in rows) else 1)


if __name__ == "__main__":
    main()
