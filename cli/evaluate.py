"""`quantkit eval`: perplexity, and with a baseline the KL to it; with quantized activations if asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli import tasks as task_options
from quantkit.cli.display import console
from quantkit.cli.progress import window_progress
from quantkit.core.errors import Interrupted, QuantkitError

if TYPE_CHECKING:
    from quantkit.evals.activations import ActivationCode
    from quantkit.evals.evaluate import CacheTest, Evaluation

_ACTIVATIONS, _CACHE = "Quantized activations", "KV cache"

_Data = Annotated[str, typer.Option(help="wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub id.")]
_ActivationBits = Annotated[
    float | None,
    typer.Option(
        help="Bits per activation: what the decoder blocks' linear layers read, 2 to 8; pyramid takes 0.5 to 8.",
        rich_help_panel=_ACTIVATIONS,
    ),
]
_ActivationMethod = Annotated[
    str | None,
    typer.Option(help="pyramid (default), int, or int-fitted (least squares).", rich_help_panel=_ACTIVATIONS),
]
_ActivationDimension = Annotated[
    int | None,
    typer.Option(help="Features a group of the pyramid code, 2 to 256; 32 by default.", rich_help_panel=_ACTIVATIONS),
]
_ActivationHadamard = Annotated[
    bool | None,
    typer.Option(
        "--hadamard-activations/--no-hadamard-activations",
        help="Rotate features before, and back after; by default for pyramid.",
        rich_help_panel=_ACTIVATIONS,
    ),
]
_KvPrefix = Annotated[
    int | None,
    typer.Option(
        help="Tokens of every sequence whose cache is compressed, the rest is scored; by default three quarters.",
        rich_help_panel=_CACHE,
    ),
]
_KvRetrieval = Annotated[
    int | None,
    typer.Option(
        help="Key-value documents whose definitions are looked up from the compressed cache, by their depth; "
        "for models that learnt such documents, as evals/reference/model did.",
        rich_help_panel=_CACHE,
    ),
]


def evaluate_command(
    context: typer.Context,
    model: options.Subject,
    data: _Data = "wikitext2",
    seqlen: options.Seqlen = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between sequences; by default seqlen.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Full-precision model to compare with.")] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "--max-windows", help="Stop after so many sequences.")
    ] = None,
    bos: Annotated[
        bool, typer.Option(help="Begin every sequence with the BOS token that the tokenizer adds, if it adds one.")
    ] = True,
    device: options.Device = "auto",
    unpack: options.Unpack = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU.")
    ] = None,
    activation_bits: _ActivationBits = None,
    activation_method: _ActivationMethod = None,
    activation_dimension: _ActivationDimension = None,
    activation_hadamard: _ActivationHadamard = None,
    kv_bits: options.KvBits = None,
    kv_prefix: _KvPrefix = None,
    kv_retrieval: _KvRetrieval = None,
    tasks: task_options.Tasks = None,
    include_path: task_options.IncludePath = None,
    num_fewshot: task_options.NumFewshot = None,
    limit: task_options.Limit = None,
    batch_size: task_options.BatchSize = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity on held-out text; with --baseline also KL, top-1 agreement and flips; or score tasks.

    With --kv-bits the baseline is, unless another is given, the model itself with an exact cache. With --tasks the
    baseline is scored on the same tasks.
    """
    if task_options.of_tasks(context.params):
        task_options.say_tasks(context.params)
        return
    from quantkit.evals.evaluate import evaluate
    from quantkit.evals.perplexity import Stopped

    code = _activation_code(activation_bits, activation_method, activation_dimension, activation_hadamard)
    cache = _cache(kv_bits, kv_prefix, kv_retrieval)
    stopped = False
    try:
        with window_progress() as progress:
            found = evaluate(
                model, data, seqlen=seqlen, stride=stride, baseline=baseline, num_samples=num_samples, bos=bos,
                activations=code, cache=cache, device=device, dtype=dtype, unpack=unpack, progress=progress,
            )  # fmt: skip
    except Stopped as error:
        found, stopped = error.measured, True
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)
    if stopped:
        raise Interrupted(f"stopped; the figures are of the first {found.quality.windows} sequences")


def _cache(bits: int | None, prefix: int | None, documents: int | None) -> CacheTest | None:
    """What the options ask for; None without --kv-bits.

    Raises:
        QuantkitError: options that say nothing without others, or a number that asks for nothing.
    """
    if bits is None:
        if (prefix, documents) != (None, None):
            raise QuantkitError("--kv-prefix and --kv-retrieval say nothing without --kv-bits; add e.g. --kv-bits 4")
        return None
    if documents is not None and documents < 1:
        raise QuantkitError(f"--kv-retrieval {documents}: give at least 1")
    from quantkit.evals.evaluate import CacheTest
    from quantkit.kvcache.config import KVCacheConfig

    return CacheTest(KVCacheConfig.gear(bits), prefix, documents or 0)


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


def _print(found: Evaluation) -> None:
    quality, on = found.quality, found.settings
    console.print(f"[bold]{escape(on['model'])}[/]")
    console.print(f"perplexity      {quality.perplexity:.4f} +- {quality.perplexity_se:.4f}")
    if on["baseline"] is not None:
        console.print(f"  before        {quality.baseline_perplexity:.4f}  ({escape(on['baseline'])})")
    console.print(f"bits per byte   {quality.bits_per_byte:.4f}")
    if quality.kl is not None:
        console.print(f"KL to baseline  {quality.kl:.5f} +- {quality.kl_se:.5f} nats a token")
        console.print(f"top-1 agreement {100 * (quality.top1_agreement or 0):.2f}%")
        console.print(f"flip rate       {100 * (quality.flip_rate or 0):.2f}%")
    step = "" if on["stride"] == on["seqlen"] - on["bos"] else f" every {on['stride']}"
    step += ", each with a BOS token in front" if on["bos"] else ""
    console.print(f"text            {escape(on['data'])}, sequences of {on['seqlen']} tokens{step}")
    console.print(
        f"over            {quality.windows} of {quality.available} sequences, {quality.tokens:,} tokens scored"
    )
    if (codes := found.activations) is not None:
        layers = f"{codes['layers_reached']} of {codes['layers']} layers"
        bits = codes["bits_per_activation"]
        console.print(f"activations     {bits:.3f} bits each, measured, into {layers}; {codes['code']}")
        console.print(f"  lost          {100 * codes['relative_error']:.3f}% of their squared norm")
    if found.kv_cache is not None:
        _print_cache(found.kv_cache)


def _print_cache(cache: dict[str, Any]) -> None:
    bits, prefix = cache["bits_per_element"], cache["prefix"]
    console.print(f"KV cache        {bits:.3f} bits a number, measured, of the first {prefix} tokens of a sequence")
    for name, what in (("retrieval", "retrieval"), ("retrieval_exact", "  exact cache")):
        if name in cache:
            percents = [100 * fraction for fraction in cache[name]]
            depths = " ".join(f"{percent:.1f}" for percent in percents)
            mean = sum(percents) / len(percents)
            console.print(f"{what:15} {mean:.2f}% of answers' tokens; by depth, oldest first: {depths}")
