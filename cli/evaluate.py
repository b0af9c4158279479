"""`quantkit eval`: perplexity, and with a baseline the KL to it; with quantized activations if asked for."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.display import console, window_progress
from quantkit.core.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.evals.activations import ActivationCode, Observed
    from quantkit.evals.perplexity import Quality

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
    unpack: options.Unpack = None,
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
    kv_retrieval: Annotated[
        int | None,
        typer.Option(
            help="Key-value documents whose definitions are looked up from the compressed cache, by their depth; "
            "for models that learnt such documents, as evals/reference/model did.",
            rich_help_panel="KV cache",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity on held-out text; with --baseline also KL, top-1 agreement and flips.

    With --kv-bits the baseline is, unless another is given, the model itself with an exact cache.
    """
    import quantkit
    from quantkit.core.device import compute_dtype, parse_dtype, pick_device
    from quantkit.evals.activations import quantized_activations
    from quantkit.evals.kv_prefix import compressed_prefix
    from quantkit.evals.kv_quality import retrieval
    from quantkit.evals.perplexity import evaluate
    from quantkit.io.source import load_tokenizer, resolve_folder
    from quantkit.kvcache.config import KVCacheConfig
    from quantkit.models.structure import check_vocabulary, context_length
    from quantkit.run.recipe import window_length
    from quantkit.run.text import documents, evaluation_tokens

    code = _activation_code(activation_bits, activation_method, activation_dimension, activation_hadamard)
    if kv_bits is None and (kv_prefix, kv_retrieval) != (None, None):
        raise QuantkitError("--kv-prefix and --kv-retrieval say nothing without --kv-bits; add e.g. --kv-bits 4")
    if kv_retrieval is not None and kv_retrieval < 1:
        raise QuantkitError(f"--kv-retrieval {kv_retrieval}: give at least 1")
    kv = None if kv_bits is None else KVCacheConfig.gear(kv_bits)
    where = pick_device(device)
    kind = parse_dtype(dtype) or compute_dtype(where) or "auto"
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    tokens, bytes_per_token = evaluation_tokens(documents(data, "evaluation"), tokenizer)
    subject = quantkit.load(folder, dtype=kind, device=where, unpack=unpack).eval()
    reference = None if baseline is None else quantkit.load(resolve_folder(baseline), dtype=kind, device=where).eval()
    for loaded in (subject, reference):
        if loaded is not None:
            check_vocabulary(tokens, loaded)
    length = window_length(seqlen, context_length(subject))
    prefix = 0 if kv is None else length * 3 // 4 if kv_prefix is None else kv_prefix
    if kv is not None and prefix < kv.buffer:
        raise QuantkitError(
            f"--kv-prefix {prefix}: the newest {kv.buffer} tokens are not compressed, give at least as many"
        )
    if kv is not None and reference is None:
        reference, baseline = subject, "with an exact cache"
    coding = nullcontext() if code is None else quantized_activations(subject, code)
    caching = nullcontext(subject) if kv is None else compressed_prefix(subject, kv, prefix)
    cache: dict[str, Any] | None = None
    with coding as observed:
        with caching as reader, window_progress() as progress:
            quality = evaluate(
                reader, tokens, bytes_per_token, length,
                stride=stride, prefix=prefix, baseline=reference, max_windows=max_windows, progress=progress,
            )  # fmt: skip
        if kv is not None:
            cache = {"bits": kv_bits, "prefix": prefix, "bits_per_element": reader.bits}
            if kv_retrieval is not None:
                for name, config in (("retrieval", kv), ("retrieval_exact", KVCacheConfig(16, 16))):
                    cache[name] = retrieval(subject, tokenizer, config, kv_retrieval)
    activations = None if observed is None else _figures(code, observed)
    settings = {"model": model, "data": data, "seqlen": length, "stride": stride or length, "baseline": baseline}
    settings |= {"activations": activations, "kv_cache": cache}
    if as_json:
        print(json.dumps(settings | asdict(quality), indent=2))
    else:
        _print(settings, quality)
        if cache is not None:
            _print_cache(cache)


def _print_cache(cache: dict[str, Any]) -> None:
    bits, prefix = cache["bits_per_element"], cache["prefix"]
    console.print(f"KV cache        {bits:.3f} bits a number, measured, of the first {prefix} tokens of a window")
    for name, what in (("retrieval", "retrieval"), ("retrieval_exact", "  exact cache")):
        if name in cache:
            shares = [100 * share for share in cache[name]]
            depths = " ".join(f"{share:.1f}" for share in shares)
            mean = sum(shares) / len(shares)
            console.print(f"{what:15} {mean:.2f}% of answers' tokens; by depth, oldest first: {depths}")


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
    from quantkit.evals.activations import activation_code

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


def _print(settings: dict[str, Any], quality: Quality) -> None:
    baseline, seqlen, activations = settings["baseline"], settings["seqlen"], settings["activations"]
    console.print(f"[bold]{settings['model']}[/]")
    console.print(f"perplexity      {quality.perplexity:.4f} +- {quality.perplexity_se:.4f}")
    if baseline is not None:
        console.print(f"  before        {quality.baseline_perplexity:.4f}  ({baseline})")
    console.print(f"bits per byte   {quality.bits_per_byte:.4f}")
    if quality.kl is not None:
        console.print(f"KL to baseline  {quality.kl:.5f} +- {quality.kl_se:.5f} nats a token")
        console.print(f"top-1 agreement {100 * (quality.top1_agreement or 0):.2f}%")
        console.print(f"flip rate       {100 * (quality.flip_rate or 0):.2f}%")
    step = "" if settings["stride"] == seqlen else f" every {settings['stride']}"
    console.print(f"text            {settings['data']}, windows of {seqlen} tokens{step}")
    console.print(f"over            {quality.windows} of {quality.available} windows, {quality.tokens:,} tokens scored")
    if activations is not None:
        layers = f"{activations['layers_reached']} of {activations['layers']} layers"
        bits = activations["bits_per_activation"]
        console.print(f"activations     {bits:.3f} bits each, measured, into {layers}; {activations['code']}")
        console.print(f"  lost          {100 * activations['relative_error']:.3f}% of their squared norm")
