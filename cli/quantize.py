"""`quantkit quantize`: a model folder, hub id or GGUF file in, a packed checkpoint out."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli.display import aside, console, made, report_table
from quantkit.cli.progress import block_progress, duration
from quantkit.core.constants import TARGET_SHIFT, TOWER_BITS
from quantkit.core.errors import Interrupted, QuantkitError
from quantkit.core.units import size

if TYPE_CHECKING:
    from quantkit.core.protocols import Quantizer
    from quantkit.run.recipe import Recipe

_INTEGER, _PYRAMID, _VPTQ = "Integer grids (gptq, rtn)", "Pyramid codes (pyramid)", "Vector codebooks (vptq)"
_TRELLIS = "Trellis codes (trellis)"
SETTINGS = (
    *("group_size", "symmetric", "dimension", "axis", "state_bits", "vector_length", "residual_bits"),
    *("outliers", "outlier_bits", "ranges", "scale_inputs"),
)
"""Settings of methods that have options of their own here."""


_OF_RECIPE = ("fisher", "target_shift", "true_sequential", "head_bits")
"""What presets decide beside the method."""
_For = Annotated[
    Literal["gguf", "vllm", "mlx"] | None,
    typer.Option(
        "--for", help="Integer codes that `quantkit export` writes for that program exactly: GPTQ's or --method's, in "
        "groups that its kernels have."
    ),
]  # fmt: skip
_GroupSize = Annotated[
    int | None,
    typer.Option(help="Weights that share a scale, 128 by default; -1 for a whole row.", rich_help_panel=_INTEGER),
]
_Symmetric = Annotated[
    bool | None,
    typer.Option("--sym/--asym", help="Grids centred on zero (default), or a stored zero.", rich_help_panel=_INTEGER),
]
_Dimension = Annotated[
    int | None,
    typer.Option(help="Weights a group, 2 to 256; by default 8 up to 2 bits, else 32.", rich_help_panel=_PYRAMID),
]
_Axis = Annotated[
    Literal["out", "in"] | None,
    typer.Option(
        help="pyramid, trellis: codes along output features (the default) or input features.", rich_help_panel=_PYRAMID
    ),
]
_StateBits = Annotated[
    int | None,
    typer.Option(
        help="Window of the code, 8 to 16, 16 by default; 12 takes under a third of the time, and loses 7% at 2 bits.",
        rich_help_panel=_TRELLIS,
    ),
]
_VectorLength = Annotated[
    int | None,
    typer.Option(
        help="Weights a vector, 1 to 16; by default the best whose codebooks cost 5% of --bits.", rich_help_panel=_VPTQ
    ),
]
_ResidualBits = Annotated[
    int | None, typer.Option(help="Bits of a second code a vector, out of --bits.", rich_help_panel=_VPTQ)
]
_Outliers = Annotated[
    float | None,
    typer.Option(
        help="Fraction of input features with longer codes, 0 to 1; of use with --no-hadamard.",
        rich_help_panel=_VPTQ,
    ),
]
_OutlierBits = Annotated[
    float | None,
    typer.Option(help="Bits per weight of those, 4 by default; needs --outliers.", rich_help_panel=_VPTQ),
]
_Ranges = Annotated[
    int | None,
    typer.Option(
        help="Ranges of input features with codebooks of their own, at least 128 features each.",
        rich_help_panel=_VPTQ,
    ),
]
_ScaleInputs = Annotated[
    bool | None,
    typer.Option("--scale-inputs", help="Store a scale per input feature.", rich_help_panel=_VPTQ),
]


_Bits = Annotated[
    float | None,
    typer.Option(
        show_default="3",
        help="Bits per weight of the codes: 1 to 8; trellis, pyramid and vptq take fractions, and use no more.",
    ),
]
_Method = Annotated[
    str | None,
    typer.Option(
        show_default="gptq",
        help="gptq, trellis, pyramid, vptq (all need calibration text), rtn, another package's, whose settings are "
        "options too, or all in one: 'hadamard(vptq(2, outliers=0.01))'.",
    ),
]
_Preset = Annotated[
    Literal["quality", "balanced", "fast"] | None,
    typer.Option(
        help="The method that suits --bits on this machine, and its settings, head and embedding packed too: the least "
        "damage, a balance, or the quickest. What is given beside it goes before it."
    ),
]
_Hadamard = Annotated[
    bool | None,
    typer.Option("--hadamard/--no-hadamard", help="Rotate weights first; by default for trellis, pyramid and vptq."),
]
_LowRank = Annotated[
    int | None, typer.Option(help="Rank of a correction of what rounding lost, beside --bits; none by default.")
]
_LowRankBits = Annotated[
    float, typer.Option(help="Extra bits per weight for such corrections, shared out over layers by their gain.")
]
_RotateModel = Annotated[
    bool, typer.Option("--rotate-model", help="Rotate the whole model first, at no cost later (Llama's shape).")
]
_TuneBlocks = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        help="Tune each block's codes and scales against the full model's block; 100 is a good number.",
    ),
]
_TrueSequential = Annotated[
    bool, typer.Option(help="Let each layer see its own block's earlier layers quantized; off is faster.")
]
_Plan = Annotated[
    Path | None,
    typer.Option(help="quantkit_plan.json of a search: each layer's own method and bits, instead of --bits."),
]
_Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave dense; may be repeated.")]
_Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN[=BITS]",
        help="Pattern of layers outside the blocks to pack too, such as 'model.visual*' of a model that sees, by "
        f"default at {TOWER_BITS} bits (RTN, since text does not reach them); may be repeated.",
    ),
]
_Check = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Held-out sequences of the calibration text on which the packed model is compared with the full one at "
        "the end: KL, top-1 agreement, perplexity. 8 take 6% of a run that reads 128 to calibrate (rtn reads none, and "
        "takes several times as long with them).",
    ),
]
_NoCheck = Annotated[bool, typer.Option("--no-check", help="Leave that out.")]
_PushToHub = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Upload the finished folder to this repository on the hub, made where it is new."),
]
_Private = Annotated[bool, typer.Option("--private", help="Make it a private one.")]
_Processes = Annotated[
    int | None,
    typer.Option(min=1, help="With --dry-run: processes that are to share the run; those of torchrun are known."),
]
_Output = Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-METHOD-Nbit.")]
_Seed = Annotated[int, typer.Option(help="Of the choice of calibration sequences; methods have fixed seeds.")]


def quantize_command(
    context: typer.Context,
    model: options.Model,
    bits: _Bits = None,
    preset: _Preset = None,
    meant_for: _For = None,
    method: _Method = None,
    hadamard: _Hadamard = None,
    low_rank: _LowRank = None,
    low_rank_bits: _LowRankBits = 0,
    rotate_model: _RotateModel = False,
    tune_blocks: _TuneBlocks = 0,
    calibration: options.Text = "wikitext2",
    num_samples: options.NumSamples = 128,
    seqlen: options.Seqlen = None,
    target_shift: options.Shift = TARGET_SHIFT,
    fisher: options.Fisher = None,
    true_sequential: _TrueSequential = True,
    plan: _Plan = None,
    head_bits: options.HeadBits = None,
    experts_bits: options.ExpertsBits = None,
    all_experts: options.AllExperts = False,
    include: _Include = None,
    ignore: _Ignore = None,
    group_size: _GroupSize = None,
    symmetric: _Symmetric = None,
    dimension: _Dimension = None,
    axis: _Axis = None,
    state_bits: _StateBits = None,
    vector_length: _VectorLength = None,
    residual_bits: _ResidualBits = None,
    outliers: _Outliers = None,
    outlier_bits: _OutlierBits = None,
    ranges: _Ranges = None,
    scale_inputs: _ScaleInputs = None,
    check: _Check = 8,
    no_check: _NoCheck = False,
    output: _Output = None,
    push_to_hub: _PushToHub = None,
    private: _Private = False,
    device: options.Device = "auto",
    seed: _Seed = 0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    processes: _Processes = None,
    as_json: options.Json = False,
) -> None:
    """Quantize a model: blocks are read, quantized and written one at a time.

    An interrupted run continues with --resume and gives the same bytes. The report is printed and written beside the
    checkpoint: quantkit_report.json, and quantkit_report.html to read. Several processes share the work, and make the
    same bytes: torchrun --nproc-per-node N -m quantkit.cli quantize ..., or accelerate launch.
    """

    def asked() -> tuple[Recipe, Path, Path, str | None]:
        """(what is to be done, to the model in which folder, the folder to make, where that is uploaded to)."""
        if private and push_to_hub is None:
            raise QuantkitError("--private says nothing without --push-to-hub; add the repository's id")
        if processes is not None and not dry_run:
            raise QuantkitError("--processes is for --dry-run; torchrun --nproc-per-node N -m quantkit.cli starts them")
        given = _decided(context, preset, meant_for, plan)
        quantizer, words = _quantizer(context, plan, bits, given["method"], hadamard, low_rank, low_rank_bits)
        from quantkit.io.hf import resolve_folder
        from quantkit.io.hub import check_push, hub_id
        from quantkit.models.rotation import Rotation
        from quantkit.run.recipe import Calibration, Recipe, read_plan
        from quantkit.tuning.block import BlockTuning

        recipe = Recipe(
            None if plan else quantizer,
            {**(read_plan(plan) if plan else {}), **dict.fromkeys(ignore or ())},
            given["target_shift"],
            Calibration(calibration, num_samples, seqlen, seed),
            given["true_sequential"],
            Rotation() if rotate_model else None,
            low_rank_bits,
            BlockTuning(tune_blocks) if tune_blocks else None,
            given["head_bits"],
            given["fisher"],
            0 if no_check else check,
            all_experts,
            experts_bits,
            dict(map(_bits_of, include or ())),
        )
        address = None
        if push_to_hub is not None and options.is_first_process():
            address = (hub_id if dry_run else check_push)(push_to_hub)  # hours before it is needed
        return recipe, resolve_folder(model), output or Path(f"{Path(model).resolve().name}-{words}"), address

    recipe, folder, output, repository = options.by_all(asked, device, alone=dry_run)
    from quantkit.io.hub import push_to_hub as push
    from quantkit.io.run_folder import Output
    from quantkit.run.pipeline import quantize_checkpoint

    if dry_run:
        Output(output, folder, resume=resume, overwrite=overwrite)  # refused where the run would be
        return _say_estimate(model, folder, recipe, output, device, processes, as_json)
    try:
        with block_progress(options.is_first_process()) as progress:
            report = quantize_checkpoint(
                folder, recipe, output, name=model, device=device, resume=resume, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt:
        raise _interrupted(output) from None
    if not options.is_first_process():
        return
    more = _eval_command(output, model, calibration if report.check or report.settings["calibration"] else "wikitext2")
    if not as_json:
        report_table(report)
        aside.print(f"measure more     {escape(more)}", soft_wrap=True)
        made(output)
    address = None
    try:
        if repository is not None:
            address = push(output, repository, private)
    finally:  # an upload that failed takes nothing away from the run
        if as_json:
            print(json.dumps(report.to_json() | {"eval_command": more, "hub": address}, indent=2))
    if address is not None and not as_json:
        aside.print(f"on the hub: {escape(address)}", soft_wrap=True)


def _bits_of(word: str) -> tuple[str, int]:
    """A pattern and its bits, of PATTERN[=BITS]."""
    pattern, given, bits = word.partition("=")
    if not pattern or (given and not bits.isdecimal()):
        raise QuantkitError(f"--include {word}: give a pattern of layers' names, and bits as in 'model.visual*=6'")
    return pattern, int(bits) if given else TOWER_BITS


def _decided(context: typer.Context, preset: str | None, meant_for: str | None, plan: Path | None) -> dict[str, Any]:
    """All options, with the values that a preset, or the program that the model is for, gives those that nobody gave.

    Raises:
        QuantkitError: both are given, or a plan decides.
    """
    if meant_for is None:
        return context.params if preset is None else _take_preset(context, preset, plan)
    if preset is not None or plan is not None:
        raise QuantkitError(f"--for {meant_for} decides what {'--plan' if plan else '--preset'} does; give one of them")
    from quantkit.exchange.export import settings_for

    given = context.params
    for name, wrong in (
        ("symmetric", given["symmetric"] is False), ("low_rank", given["low_rank"]), ("hadamard", given["hadamard"]),
    ):  # fmt: skip
        if wrong:
            raise QuantkitError(f"--for {meant_for} is of plain symmetric codes; `{name}` gives others")
    given["method"] = given["method"] or "gptq"
    for name, value in settings_for(meant_for, given["method"], 3 if given["bits"] is None else given["bits"]).items():
        given[name] = value if given[name] is None else given[name]
    return given


def _take_preset(context: typer.Context, preset: str, plan: Path | None) -> dict[str, Any]:
    """Gives all options that nobody gave the preset's values, says why, and returns all options.

    Raises:
        QuantkitError: the preset has no way to so many bits, or a plan decides.
    """
    if plan is not None:
        raise QuantkitError("--plan says how each layer is packed; --preset is not read beside it")
    from quantkit.advice.presets import way
    from quantkit.core.device import pick_device

    given = context.params
    chosen = way(preset, 3 if given["bits"] is None else given["bits"], pick_device(given["device"]))
    values: dict[str, Any] = {name: getattr(chosen, name) for name in _OF_RECIPE}
    if given["method"] is None:
        values |= {"method": chosen.method, **chosen.settings}
        if not given["as_json"]:
            aside.print(f"--preset {preset}: {chosen.method}, {chosen.reason}")
    for name, value in values.items():
        if str(context.get_parameter_source(name)).endswith("DEFAULT"):
            given[name] = value
    return given


def _eval_command(output: Path, model: str, text: str) -> str:
    """The command that measures the checkpoint on more text."""
    words = ["quantkit", "eval", str(output), "--baseline", model, "--data", text]
    return " ".join(shlex.quote(word) for word in words)


def _quantizer(
    context: typer.Context,
    plan: Path | None,
    bits: float | None,
    method: str | None,
    hadamard: bool | None,
    low_rank: int | None,
    low_rank_bits: float,
) -> tuple[Quantizer, str]:
    """The quantizer that the options describe, and words for it in a folder's name.

    Raises:
        QuantkitError: options that exclude one another, or settings that the method does not have.
    """
    settings: dict[str, Any] = {name: context.params[name] for name in SETTINGS}
    settings |= options.own_settings(context, method or "gptq", settings)
    beside = {"bits": bits, "method": method, "hadamard": hadamard, "low_rank": low_rank} | settings
    if plan is not None and (given := [name for name, value in beside.items() if value is not None]):
        raise QuantkitError(
            f"--plan says how each layer is packed; --{given[0].replace('_', '-')} is not read beside it"
        )
    if settings["outlier_bits"] is not None and not settings["outliers"]:
        raise QuantkitError("--outlier-bits is given without --outliers, the fraction of input features that get them")
    if low_rank is not None and low_rank_bits:
        raise QuantkitError("--low-rank gives every layer one rank, --low-rank-bits shares ranks out; give one of them")
    from quantkit.run.recipe import default_bits, make_quantizer

    chosen = method or "gptq"
    bits = default_bits(chosen) if bits is None else bits
    if method is None and plan is None and bits is not None and not context.params["as_json"]:
        from quantkit.advice.presets import unasked

        aside.print(unasked(bits))
    quantizer = make_quantizer(chosen, hadamard, 1 if low_rank_bits else low_rank, bits=bits, **settings)
    words = re.sub(r"[^a-z0-9.]+", "-", chosen.lower()).strip("-")
    return quantizer, words + ("" if bits is None else f"-{bits:g}bit")


def _say_estimate(
    model: str, folder: Path, recipe: Recipe, output: Path, device: str, processes: int | None, as_json: bool
) -> None:
    from quantkit.run.estimate import estimate

    processes = processes or options.process_count()
    if not options.is_first_process():
        return
    expected = estimate(folder, recipe, device, processes)
    if as_json:
        print(json.dumps(asdict(expected), indent=2))
        return
    console.print(f"[bold]{escape(model)}[/] -> {escape(str(output))}", soft_wrap=True)
    console.print(
        f"layers to pack     {expected.layers}, {expected.packed_weights:,} of {expected.all_weights:,} weights"
    )
    whole = 8 * expected.bytes_after / expected.all_weights
    console.print(
        f"bits per weight    {expected.bits_per_weight:.3f} in packed layers, {whole:.3f} over the whole model, every "
        "stored byte counted",
        soft_wrap=True,
    )
    console.print(f"size               {size(expected.bytes_before)} -> {size(expected.bytes_after)}")
    each = f" in each of {processes} processes" if processes > 1 else ""
    console.print(f"memory of the run  about {size(expected.memory_bytes)} on {expected.device}{each}")
    beside = ", and its blocks' tuning" if recipe.tuner else ""
    console.print(f"time of the run    about {duration(expected.seconds)}{beside}, on this machine as it is now")
    for note in expected.notes:
        console.print(f"note               {escape(note)}", soft_wrap=True)


def _interrupted(output: Path) -> Interrupted:
    output = output.expanduser().resolve()
    kept = output.with_name(f"{output.name}.partial").exists()
    how = "finished blocks are kept: repeat the command with --resume to continue" if kept else "nothing is kept"
    return Interrupted(f"stopped; {how}")
