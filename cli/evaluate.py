"""`quantkit eval`: perplexity, and with a baseline the KL to it."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

import quantkit
from quantkit.cli.display import console, window_progress
from quantkit.data import documents, evaluation_tokens
from quantkit.device import compute_dtype, parse_dtype, pick_device
from quantkit.evals.perplexity import Quality, evaluate
from quantkit.folder import load_tokenizer, resolve_folder
from quantkit.model import check_vocabulary, context_length
from quantkit.recipe import window_length


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id: a packed checkpoint or any causal language model.")],
    data: Annotated[
        str, typer.Option(help="wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub id.")
    ] = "wikitext2",
    seqlen: Annotated[int | None, typer.Option(help="Tokens a window; by default 2048 or the model's context.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; by default seqlen.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Full-precision model to compare with.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity on held-out text; with --baseline also KL, top-1 agreement and flips."""
    where = pick_device(device)
    kind = parse_dtype(dtype) or compute_dtype(where) or "auto"
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    tokens, bytes_per_token = evaluation_tokens(documents(data, "evaluation"), tokenizer)
    subject = quantkit.load(folder, dtype=kind, device=where).eval()
    reference = None if baseline is None else quantkit.load(resolve_folder(baseline), dtype=kind, device=where).eval()
    for loaded in (subject, reference):
        if loaded is not None:
            check_vocabulary(tokens, loaded)
    length = window_length(seqlen, context_length(subject))
    with window_progress() as progress:
        quality = evaluate(
            subject, tokens, bytes_per_token, length,
            stride=stride, baseline=reference, max_windows=max_windows, progress=progress,
        )  # fmt: skip
    if as_json:
        print(
            json.dumps(
                {"model": model, "data": data, "seqlen": length, "baseline": baseline, **asdict(quality)}, indent=2
            )
        )
    else:
        _print(model, baseline, quality)


def _print(model: str, baseline: str | None, quality: Quality) -> None:
    console.print(f"[bold]{model}[/]")
    console.print(f"perplexity      {quality.perplexity:.4f} +- {quality.perplexity_se:.4f}")
    if baseline is not None:
        console.print(f"  before        {quality.baseline_perplexity:.4f}  ({baseline})")
    console.print(f"bits per byte   {quality.bits_per_byte:.4f}")
    if quality.kl is not None:
        console.print(f"KL to baseline  {quality.kl:.5f} +- {quality.kl_se:.5f} nats a token")
        console.print(f"top-1 agreement {100 * (quality.top1_agreement or 0):.2f}%")
        console.print(f"flip rate       {100 * (quality.flip_rate or 0):.2f}%")
    console.print(f"over            {quality.tokens:,} tokens in {quality.windows} windows")
