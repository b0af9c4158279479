"""`quantkit bench`: how fast a model generates, beside the ideal and beside its full-precision original."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from quantkit.cli import options
from quantkit.cli.display import console
from quantkit.cli.progress import launch_progress
from quantkit.core.errors import QuantkitError, first_line
from quantkit.core.units import size

if TYPE_CHECKING:
    import torch

    from quantkit.evals.decode import Decoding


def bench_command(
    model: options.Subject,
    baseline: Annotated[str | None, typer.Option(help="Model to compare with, as a rule the unquantized one.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default the checkpoint's, float32 on a CPU.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Run projections that share an input as one launch.")] = True,
    kv_bits: options.KvBits = None,
    unpack: options.Unpack = None,
    tune: Annotated[
        bool, typer.Option("--autotune", help="First measure the kernels' sizes for this model and GPU, and keep them.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure time to first token, tokens a second and memory; --baseline puts the original beside it."""
    import torch

    import quantkit
    from quantkit.core.device import parse_dtype, pick_device
    from quantkit.evals.autotune import autotune
    from quantkit.evals.decode import measure
    from quantkit.io.hf import resolve_folder
    from quantkit.kvcache.attention import compressed_kv

    where = pick_device(device)
    if baseline == model:
        raise QuantkitError("--baseline is the model itself; give the one that it was made from")
    if tune and where.type != "cuda":
        raise QuantkitError("--autotune measures GPU kernels; there is no GPU here (device cpu)")
    kind = parse_dtype(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    results: dict[str, Decoding] = {}
    for name in [model] if baseline is None else [model, baseline]:
        subject: Any = quantkit.load(resolve_folder(name), dtype=kind, device=where, unpack=unpack).eval()
        if fuse:
            quantkit.fuse(subject)
        with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
            if tune and name == model:
                with launch_progress() as progress:
                    autotune(subject, progress=progress)
            try:
                compressing = kv_bits is not None and name == model
                with compressed_kv(subject, bits=kv_bits) if compressing else nullcontext() as make_cache:
                    results[name] = measure(subject, prompt_tokens, new_tokens, make_cache=make_cache)
            except (RuntimeError, AttributeError, IndexError, NotImplementedError) as error:  # models of other kinds
                raise QuantkitError(f"{name} does not generate from a plain cache ({first_line(error)})") from error
        del subject
    if as_json:
        roles = zip(("model", "baseline"), results.items(), strict=False)
        found = {role: {"path": name, **asdict(result)} for role, (name, result) in roles}
        print(json.dumps({"device": _name(where), **found}, indent=2))
    else:
        _print(results, where)


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _print(results: dict[str, Decoding], device: torch.device) -> None:
    first = next(iter(results.values()))
    title = f"{_name(device)}, {first.prompt_tokens} prompt and {first.new_tokens} new tokens, one sequence"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right", overflow="fold")
    rows = {
        "first token": [f"{1e3 * r.first_token_seconds:.2f} ms" for r in results.values()],
        "a token": [f"{1e3 * r.token_seconds:.3f} ms ({r.how})" for r in results.values()],
        "tokens a second": [f"{r.tokens_per_second:.1f}" for r in results.values()],
        "ideal for a token": [f"{1e3 * r.ideal_token_seconds:.3f} ms" for r in results.values()],
        "read for a token": [size(r.bytes_per_token) for r in results.values()],
        "peak GPU memory" if device.type == "cuda" else "tensors": [size(r.peak_bytes) for r in results.values()],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)
    console.print(f"ideal: bytes over the memory's copy bandwidth, {size(first.bandwidth)}/s measured here")
    if len(results) == 2:
        packed, original = results.values()
        console.print(f"speed-up         {original.token_seconds / packed.token_seconds:.2f} x a token")
