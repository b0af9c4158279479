"""Peak memory of fine-tuning a packed model by its corrections, beside full fine-tuning of the same model.

    python -m quantkit.evals.finetune_memory --blocks 8 --bits 2 --rank 16

Writes an untrained Llama of TinyLlama's width, packs it, and takes two steps of AdamW on a sequence of text in
processes of their own: all weights in bf16, and the corrections of the packed model with recomputed activations.
Printed is each process's peak resident memory above what it held before it loaded the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig

from quantkit.evals.memory import write_untrained

_STEPS = """
import json, sys, torch, psutil, quantkit
from quantkit.run.report import peak_memory_bytes

folder, rank, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before = psutil.Process().memory_info().rss
model = quantkit.load(folder, dtype=torch.bfloat16)
if rank:
    quantkit.finetune(model, rank)
model.train()
model.gradient_checkpointing_enable()
model.enable_input_require_grads()
learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(learning, 1e-4)
window = torch.arange(tokens).unsqueeze(0) * 37 % model.config.vocab_size
for _ in range(2):
    model(input_ids=window, labels=window, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({"trained": sum(p.numel() for p in learning), "peak": peak_memory_bytes() - before}))
"""


def measure(folder: Path, rank: int, tokens: int) -> dict[str, int]:
    """{"trained": parameters, "peak": bytes} of two steps; rank 0 for full fine-tuning.

    Raises:
        SystemExit: the process that takes them failed; the message is the end of what it wrote.
    """
    command = [sys.executable, "-c", _STEPS, str(folder), str(rank), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Parses the command line and prints both figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write both figures")
    arguments = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.width,
        intermediate_size=11 * arguments.width // 4,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as workspace:
        source, packed = Path(workspace) / "llama", Path(workspace) / "packed"
        write_untrained(source, config)
        command = [
            "-m",
            "quantkit.cli",
            "quantize",
            str(source),
            "--no-check",
            "--method",
            "rtn",
            "--bits",
            str(arguments.bits),
        ]
        subprocess.run([sys.executable, *command, "--output", str(packed)], check=True, stdout=subprocess.DEVNULL)
        full, adapters = (measure(source, 0, arguments.tokens), measure(packed, arguments.rank, arguments.tokens))
    for name, found in (("full fine-tuning", full), (f"corrections of rank {arguments.rank}", adapters)):
        print(f"{name:28s} {found['trained']:>13,} parameters trained   peak {found['peak'] / 2**30:6.2f} GiB")
    print(f"ratio {full['peak'] / adapters['peak']:.2f}")
    if arguments.json:
        named = (("full fine-tuning", full), (f"corrections of rank {arguments.rank}", adapters))
        rows = [{"what": name, "trained": found["trained"], "peak_gib": found["peak"] / 2**30} for name, found in named]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
