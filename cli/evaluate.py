"""`quantkit eval`: perplexity, and with a baseline the KL to it; with quantized activations if asked for."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer

import quantkit
from quantkit.cli import options
from quantkit.cli.display import console, window_progress
from quantkit.data import documents, evaluation_tokens
from quantkit.device import compute_dtype, parse_dtype, pick_device
from quantkit.errors import QuantkitError
from quantkit.evals.activations import ActivationCode, Observed, activation_code, quantized_activations
from quantkit.evals.perplexity import Quality, evaluate
from quantkit.folder import load_tokenizer, resolve_folder
from quantkit.kvcache.config import KVCacheConfig
from quantkit.kvcache.prefix import compressed_prefix
from quantkit.model import check_vocabulary, context_length
from quantkit.recipe import window_length

_ACTIVATIONS = "Quantized activations"


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id: a packed checkpoint or any causal language model.")],
    data: Annotated[
        str, typer.Option(help="wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub id.")
    ] = "wikitext2",
    seqlen: options.Seqlen = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; by default seqlen.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Full-precision model to compare with.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU.")
    ] = None,
    activation_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per activation: what the decoder blocks' linear layers read, 2 to 8; pyramid takes 0.5 to 8.",
            rich_help_panel=_ACTIVATIONS,
        ),
    ] = None,
    activation_method: Annotated[
        str | None,
        typer.Option(help="pyramid (default), int, or int-fitted (least squares).", rich_help_panel=_ACTIVATIONS),
    ] = None,
    activation_dimension: Annotated[
        int | None,
        typer.Option(
            help="Features a group of the pyramid code, 2 to 256; 32 by default.", rich_help_panel=_ACTIVATIONS
        ),
    ] = None,
    activation_hadamard: Annotated[
        bool | None,
        typer.Option(
            "--hadamard-activations/--no-hadamard-activations",
            help="Rotate features before, and back after; by default for pyramid.",
            rich_help_panel=_ACTIVATIONS,
        ),
    ] = None,
    kv_bits: options.KvBits = None,
    kv_prefix: Annotated[
        int | None,
        typer.Option(
            help="Tokens of every window whose cache is compressed, the rest is scored; by default three quarters.",
            rich_help_panel="KV cache",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity on held-out text; with --baseline also KL, top-1 agreement and flips."""
    code = _activation_code(activation_bits, activation_method, activation_dimension, activation_hadamard)
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
    if kv_prefix is not None and kv_bits is None:
        raise QuantkitError("--kv-prefix says nothing without --kv-bits")
    prefix = 0 if kv_bits is None else length * 3 // 4 if kv_prefix is None else kv_prefix
    coding = nullcontext() if code is None else quantized_activations(subject, code)
    caching = (
        nullcontext(subject) if kv_bits is None else compressed_prefix(subject, KVCacheConfig.gear(kv_bits), prefix)
    )
    with coding as observed, caching as reader, window_progress() as progress:
        quality = evaluate(
            reader, tokens, bytes_per_token, length,
            stride=stride, prefix=prefix, baseline=reference, max_windows=max_windows, progress=progress,
        )  # fmt: skip
    cache = None if kv_bits is None else {"bits": kv_bits, "prefix": prefix, "bits_per_element": reader.bits}
    activations = None if observed is None else _figures(code, observed)
    if as_json:
        settings = {"model": model, "data": data, "seqlen": length, "baseline": baseline}
        settings |= {"activations": activations, "kv_cache": cache}
        print(json.dumps(settings | asdict(quality), indent=2))
    else:
        _print(model, baseline, quality, activations)
        if cache is not None:
            console.print(
                f"KV cache        {reader.bits:.3f} bits a number, measured, of the first {prefix} tokens of a window"
            )


def _activation_code(
    bits: float | None, method: str | None, dimension: int | None, hadamard: bool | None
) -> ActivationCode | None:
    """What the options ask for; None without --activation-bits.

    Raises:
        QuantkitError: options that say nothing without others.
    """
    if bits is None:
        if (method, dimension, hadamard) != (None, None, None):
            raise QuantkitError("options for activations say nothing without --activation-bits; add e.g. 4")
        return None
    method = method or "pyramid"
    if dimension is not None and method != "pyramid":
        raise QuantkitError(f"--activation-dimension belongs to pyramid; {method} has one scale a token and no groups")
    rotated = method == "pyramid" if hadamard is None else hadamard
    return activation_code(method, bits, 32 if dimension is None else dimension, rotated)


def _figures(code: ActivationCode | None, observed: Observed) -> dict[str, Any]:
    return {
        "code": repr(code),
        "bits_per_activation": observed.bits_per_activation,
        "relative_error": observed.relative_error,
        "layers": observed.layers,
        "layers_reached": len(observed.reached),
    }


def _print(model: str, baseline: str | None, quality: Quality, activations: dict[str, Any] | None) -> None:
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
    if activations is not None:
        layers = f"{activations['layers_reached']} of {activations['layers']} layers"
        bits = activations["bits_per_activation"]
        console.print(f"activations     {bits:.3f} bits each, measured, into {layers}; {activations['code']}")
        console.print(f"  lost          {100 * activations['relative_error']:.3f}% of their squared norm")
