"""What a compressed KV cache costs: KL, agreement and retrieval against true bits, for every mode.

    python -m quantkit.evals.kv_quality MODEL --data stdlib --output kv.json --picture kv.png

Sequences are read in two parts: the first tokens fill a cache, which is compressed, and the others are predicted from
it; KL is to the same model with an exact cache. Retrieval is measured on generated key-value documents whose
definitions are compressed before they are asked for, by how deep in the cache they stand. `--inject 8` first multiplies
some key channels by 8 and divides the queries' by as much: that changes nothing, but keys get the outliers of larger
models.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.evals.kv_prefix import PerToken, PrefixReader, compressed_prefix
from quantkit.evals.reference.recall import recall_document
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.kvcache.config import KVCacheConfig
from quantkit.models.structure import context_length
from quantkit.run.documents import documents
from quantkit.run.recipe import sequence_length
from quantkit.run.text import evaluation_text

DEPTHS = 4
"""Parts of the definitions by which retrieval is told apart."""


def modes(bits: int) -> dict[str, KVCacheConfig | PerToken]:
    """All modes at a width, by name."""
    one = KVCacheConfig
    return {
        "per token": PerToken(bits),
        "per token, groups of 32": PerToken(bits, 32),
        "per token, Hadamard": PerToken(bits, hadamard=True),
        "KCVT": one(bits, bits, "kcvt", buffer=20),
        "KIVI": one(bits, bits),
        "KIVI, groups of 32": one(bits, bits, group_size=32, buffer=32),
        "KIVI, keys a width more": one({2: 3, 3: 4}.get(bits, 8), bits),
        "GEAR-L as published": replace(one.gear(bits, paper=True), outliers=0.0, channel_outliers=False),
        "GEAR as published": one.gear(bits, paper=True),
        "GEAR, keys' rank in the prompt's basis": one(bits, bits, rank=4, targets=("k",)),
        "... weighted by queries (default)": one.gear(bits),
    }


@torch.no_grad()
def inject_outliers(model: nn.Module, factor: float, fraction: float = 0.1) -> None:
    """Multiplies some rotary pairs of all key heads, and divides the queries' pairs that meet them; for Llama's shape.

    Args:
        model: changed in place.
        factor: for keys; queries are divided by it.
        fraction: of the pairs, drawn for each head.

    Raises:
        QuantkitError: the model has no projections of its own for queries and keys, or norms behind them.
    """
    count = 0
    module: Any
    for module in model.modules():
        query, key = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
        if query is None or key is None:
            continue
        if getattr(module, "q_norm", None) is not None:
            raise QuantkitError("outliers cannot be injected in front of norms of queries and keys")
        count += 1
        size = module.head_dim
        heads, groups = key.out_features // size, query.out_features // key.out_features
        generator = torch.Generator().manual_seed(count)
        chosen = torch.rand(heads, size // 2, generator=generator) < fraction
        scales = torch.where(chosen, factor, 1.0).repeat(1, 2)  # channels i and i + D/2 turn together
        for layer, by in ((key, scales.flatten()), (query, 1 / scales.repeat_interleave(groups, 0).flatten())):
            layer.weight.mul_(by.to(layer.weight)[:, None])
            if layer.bias is not None:
                layer.bias.mul_(by.to(layer.bias))
    if not count:
        raise QuantkitError("outliers can be injected where queries and keys have projections q_proj and k_proj")


@torch.no_grad()
def compare(reader: PrefixReader, windows: Tensor, batch: int = 8) -> tuple[float, float, float]:
    """Compares predictions on what comes after the prefix with those of the exact cache.

    Args:
        reader: of prefixes.
        windows: int64 [sequences, tokens].
        batch: sequences at a time.

    Returns:
        (KL in nats a token, its standard error over sequences, top-1 agreement as a fraction).
    """
    kl, same = [], []
    for part in windows.split(batch):
        ids, scored = part.to(reader.device), slice(reader.prefix, -1)
        wanted = reader.model(input_ids=ids, use_cache=False).logits[:, scored]
        found = reader(input_ids=ids).logits[:, scored]
        kl.append(token_kl(wanted, found).double().mean(1).cpu())
        same.append((wanted.argmax(-1) == found.argmax(-1)).double().mean(1).cpu())
    each = torch.cat(kl)
    return float(each.mean()), float(each.std() / len(each) ** 0.5), float(torch.cat(same).mean())


@torch.no_grad()
def retrieval(
    model: Any, tokenizer: Any, config: KVCacheConfig | PerToken, rows: int = 32, pairs: int = 20
) -> list[float]:
    """Fraction of right answer tokens, by the depth of the definition they repeat, the oldest first.

    Args:
        model: trained on `recall_document`.
        tokenizer: of the model; must give offsets.
        config: of the cache, which holds all definitions when the first answer is asked for.
        rows: documents; each asks for all its definitions once.
        pairs: definitions of a document.

    Raises:
        QuantkitError: the tokenizer gives no offsets, or the documents exceed the model's context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise QuantkitError("retrieval needs a tokenizer that gives offsets, a fast one")
    context = context_length(model)
    rng = random.Random(10**6 + 1)
    right, asked = [0] * DEPTHS, [0] * DEPTHS
    for _ in range(rows):
        document = recall_document(rng, pairs, pairs)
        encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = torch.tensor([encoded["input_ids"]]), encoded["offset_mapping"]
        if context is not None and tokens.shape[1] > context:
            raise QuantkitError(f"a key-value document has {tokens.shape[1]} tokens, the model's context {context}")
        lines = document.text.split("\n")
        defined = [line.split(" = ")[0] for line in lines if " = " in line]
        queried = [line.split(" -> ")[0] for line in lines if " -> " in line]
        start = document.text.index("# query")
        prefix = sum(first < start for first, _ in offsets)
        with compressed_prefix(model, config, prefix) as reader:
            choices = reader(input_ids=tokens.to(model.device)).logits[0, :-1].argmax(-1).cpu()
        for key, (first, last) in zip(queried, document.answers, strict=True):
            depth = defined.index(key) * DEPTHS // pairs
            for place, (begin, end) in enumerate(offsets):
                if begin < last and end > first:
                    right[depth] += int(choices[place - 1] == tokens[0, place])
                    asked[depth] += 1
    return [hits / max(count, 1) for hits, count in zip(right, asked, strict=True)]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is printed as it is done.

    Raises:
        QuantkitError: the text is too short for two sequences.
    """
    folder, device = resolve_folder(arguments.model), pick_device(arguments.device)
    tokenizer = load_tokenizer(folder)
    model: Any = load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
    text = evaluation_text(documents(arguments.data, "evaluation"), tokenizer)
    length = sequence_length(arguments.seqlen, context_length(model))
    starts = range(0, len(text.tokens) - text.body(length) + 1, text.body(length))
    if len(starts) < 2:
        raise QuantkitError(
            f"the text has {len(text.tokens)} tokens, two sequences take {2 * length}; use a shorter --seqlen"
        )
    windows = torch.stack([text.sequence(start, length) for start in starts[: arguments.max_windows]])
    prefix = length * 3 // 4 if arguments.prefix is None else arguments.prefix
    rows: list[dict[str, Any]] = []
    print("| outliers | mode | code bits | true bits | KL x 1000 | top-1 | retrieval | by depth, oldest first |")
    print("|---|---|---|---|---|---|---|---|")
    for factor in arguments.inject:
        if factor != 1:
            inject_outliers(model, factor)
        exact = KVCacheConfig(16, 16)
        listed: list[tuple[str, int, KVCacheConfig | PerToken]] = [("exact", 16, exact)] + [
            (name, bits, config) for bits in arguments.bits for name, config in modes(bits).items()
        ]
        for name, bits, config in listed:
            with compressed_prefix(model, config, prefix) as reader:
                kl, kl_se, top1 = compare(reader, windows)
            found = retrieval(model, tokenizer, config, arguments.rows) if arguments.rows else []
            mean = sum(found) / max(len(found), 1)
            row = {
                "factor": factor, "mode": name, "bits": bits, "true_bits": reader.bits, "kl": kl,
                "kl_se": kl_se, "top1": top1, "retrieval": mean, "by_depth": found,
            }  # fmt: skip
            rows.append(row)
            depths = " ".join(f"{100 * share:.0f}" for share in found)
            cells = [f"x{factor:g}", name, bits, f"{reader.bits:.2f}", f"{1000 * kl:.2f} +- {1000 * kl_se:.2f}"]
            cells.append(f"{100 * top1:.1f}")
            print("| " + " | ".join(map(str, [*cells, f"{100 * mean:.1f}", depths])) + " |", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against true bits, a line a mode, plain and with outliers. Needs matplotlib."""
    from matplotlib.figure import Figure

    factors = list(dict.fromkeys(row["factor"] for row in rows))
    figure: Any = Figure(figsize=(6 * len(factors), 4.8), layout="constrained")
    for axis, factor in zip(figure.subplots(1, len(factors), squeeze=False, sharey=True)[0], factors, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["factor"] == factor and row["mode"] != "exact":
                lines.setdefault(row["mode"], []).append((row["true_bits"], row["kl"]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", ms=4, label=name)
        axis.set_yscale("log")
        axis.set_xlabel("true bits per cached number")
        axis.set_title("as trained" if factor == 1 else f"key channels multiplied by {factor:g}")
    figure.axes[0].set_ylabel("KL to the exact cache, nats a token")
    figure.axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--inject", type=float, nargs="+", default=[1.0, 8.0], help="factors; 1 for none")
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--prefix", type=int, help="tokens that are compressed; by default 3/4 of a sequence")
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="key-value documents; 0 for models that never saw them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
