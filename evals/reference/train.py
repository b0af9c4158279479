"""Trains the reference models, a small Llama and a small mixture of experts, for any machine to make and measure.

    python -m quantkit.evals.reference.train --minutes 90 --output evals/reference/model
    python -m quantkit.evals.reference.train --experts 8 --minutes 60 --output evals/reference/experts

Data: the Python standard library of the interpreter at hand, less the modules named in
`quantkit.run.corpus.HELD_OUT_MODULES`, and generated key-value recall documents (`recall.py`) so that
the model uses its KV cache in a way that can be tested. One script makes everything: a byte-level
BPE tokenizer with single-digit tokens, the bf16 checkpoint, `training_log.csv` and
`held_out.json`.

The hidden matrices are trained with Muon, all other parameters with AdamW; the learning rate is
a function of the fraction of the time budget that is spent (short warm-up, flat, linear decay), so
the same script fits an hour of two CPU cores and minutes of a GPU.
"""

import argparse
import collections
import csv
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from quantkit.core.products import full_width
from quantkit.evals.reference.recall import recall_document
from quantkit.models.experts import put_together, take_apart
from quantkit.run.corpus import HELD_OUT_MODULES, standard_library

logger = logging.getLogger("quantkit.reference")

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
SEQUENCE = 512
TEXT_ROWS, RECALL_ROWS = 10, 2
IGNORED_LABEL = -100


def reference_config() -> LlamaConfig:
    """The reference shape: 5.8 M parameters, six blocks, GQA 4:2, untied head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def experts_config(experts: int) -> Qwen3MoeConfig:
    """The shape of the mixture: 7 M parameters with 8 experts, of which each token takes two."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,  # the loss asks experts to share the tokens
        router_aux_loss_coef=0.01,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens; digits stay single, so that numbers are sequences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=SEQUENCE,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one stream, int64 [tokens], an end-of-text token after each."""
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids.extend(encoded)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def recall_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall documents as (tokens, labels), both [rows, SEQUENCE]; only answers carry a label."""
    tokens = torch.full((rows, SEQUENCE), tokenizer.eos_token_id)
    labels = torch.full((rows, SEQUENCE), IGNORED_LABEL)
    for row in range(rows):
        pairs = rng.randint(2, 20)
        document = recall_document(rng, pairs, queries=min(2 * pairs, 20))
        encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"][:SEQUENCE]
        tokens[row, : len(ids)] = torch.tensor(ids)
        spans: Iterator[tuple[float, float]] = iter(document.answers)
        start, end = next(spans)
        for position, (first, last) in enumerate(encoded["offset_mapping"][:SEQUENCE]):
            while first >= end:
                start, end = next(spans, (math.inf, math.inf))
            if last > start:
                labels[row, position] = ids[position]
    return tokens, labels


def training_batch(stream: torch.Tensor, tokenizer, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """`TEXT_ROWS` random sequences of the stream, int64 [tokens], above `RECALL_ROWS` recall documents.

    Returns:
        (tokens, labels), int64 [rows, SEQUENCE] each.
    """
    starts = [rng.randrange(len(stream) - SEQUENCE) for _ in range(TEXT_ROWS)]
    text = torch.stack([stream[start : start + SEQUENCE] for start in starts])
    tokens, labels = recall_rows(tokenizer, rng, RECALL_ROWS)
    return torch.cat([text, tokens]), torch.cat([text, labels])


def learning_rate_share(progress: float) -> float:
    """Warm-up over 2% of the budget, flat, then linear decay to zero over the last 45%."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.45)


@torch.no_grad()
def held_out_nll(model, stream: torch.Tensor, max_windows: int = 10_000) -> float:
    """Mean nats per token over non-overlapping sequences of the held-out stream, int64 [tokens]."""
    count = min(len(stream) // SEQUENCE, max_windows)
    windows = stream[: count * SEQUENCE].view(count, SEQUENCE)
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch) for batch in windows.split(8)
    ]
    return sum(losses) / count


@torch.no_grad()
def recall_accuracy(model, tokenizer, rows: int = 32) -> float:
    """Share of recall answer tokens that are the model's first choice, on fresh documents."""
    tokens, labels = recall_rows(tokenizer, random.Random(10**6), rows)
    device = model.device
    choices = model(input_ids=tokens.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
    wanted = labels[:, 1:]
    return (choices == wanted)[wanted != IGNORED_LABEL].float().mean().item()


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of held-out tokens under add-one token frequencies of the training stream; both int64 [tokens]."""
    counts = collections.Counter(train.tolist())
    total = len(train) + VOCABULARY
    nll = -sum(math.log((counts[token] + 1) / total) for token in held_out.tolist())
    return math.exp(nll / len(held_out))


@full_width()
def train(minutes: float, output: Path, seed: int, experts: int = 0) -> None:
    """Trains for `minutes` of wall-clock time and writes everything below `output`; a mixture, given experts."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output.mkdir(parents=True, exist_ok=True)

    documents = standard_library("train")
    tokenizer = train_tokenizer(documents)
    stream = token_stream(tokenizer, documents)
    held_out = token_stream(tokenizer, standard_library("held_out"))
    logger.info("%.2f M training tokens, %.2f M held out", len(stream) / 1e6, len(held_out) / 1e6)
    tokenizer.save_pretrained(output)

    model: Any = AutoModelForCausalLM.from_config(experts_config(experts) if experts else reference_config())
    model.to(device)
    take_apart(model)
    model.requires_grad_(True)
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    hidden_ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in hidden_ids]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peak_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    log: list[dict[str, float]] = []
    start, step, recent = time.monotonic(), 0, 0.0
    compiled = model if experts else torch.compile(model)
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1.0:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peak_rates, strict=True):
            group["lr"] = peak * learning_rate_share(progress)
        tokens, labels = (t.to(device) for t in training_batch(stream, tokenizer, rng))
        loss = compiled(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = 0.95 * recent + 0.05 * loss.item() if step else loss.item()
        step += 1
        if step % 100 == 0:
            entry = {
                "step": step,
                "minutes": round((time.monotonic() - start) / 60, 2),
                "tokens": step * tokens.numel(),
                "training_nll": round(recent, 4),
                "held_out_nll": round(held_out_nll(model, held_out.to(device), max_windows=48), 4),
                "recall_accuracy": round(recall_accuracy(model, tokenizer), 4),
            }
            log.append(entry)
            logger.info("%s", entry)

    with open(output / "training_log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, log[0].keys() if log else ["step"])
        writer.writeheader()
        writer.writerows(log)
    model = model.bfloat16()
    put_together(model, ())
    model.config.output_router_logits = False
    model.save_pretrained(output)
    nll = held_out_nll(model.float(), held_out.to(device))
    figures = {
        "held_out_modules": HELD_OUT_MODULES,
        "held_out_tokens": len(held_out),
        "held_out_perplexity": math.exp(nll),
        "unigram_perplexity": unigram_perplexity(stream, held_out),
        "recall_accuracy": recall_accuracy(model, tokenizer),
        "training_tokens": step * SEQUENCE * (TEXT_ROWS + RECALL_ROWS),
        "minutes": minutes,
        "seed": seed,
        "device": device,
    }
    (output / "held_out.json").write_text(json.dumps(figures, indent=2) + "\n")
    logger.info("%s", figures)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture; 0 for a model without")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(arguments.minutes, arguments.output, arguments.seed, arguments.experts)


if __name__ == "__main__":
    main()
