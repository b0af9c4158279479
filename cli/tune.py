"""`quantkit tune`: a packed checkpoint and its teacher in, a better checkpoint of the same size out."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from quantkit.cli import options
from quantkit.cli.display import aside, console, made
from quantkit.cli.progress import tuning_progress
from quantkit.core.errors import Interrupted
from quantkit.core.units import size
from quantkit.tuning.settings import PVSettings, TuningSettings

if TYPE_CHECKING:
    from quantkit.tuning.estimate import TuningEstimate
    from quantkit.tuning.run import Tuned

_STEP, _LOSS = "A step", "The loss"

_Model = Annotated[str, typer.Argument(help="Folder or hub id of a packed checkpoint.")]
_Teacher = Annotated[str, typer.Option(help="Folder, hub id or GGUF file of the full-precision model.")]
_Output = Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-tuned.")]
_NumSamples = Annotated[int, typer.Option(help="Sequences of text, held-out ones included.")]
_HeldOut = Annotated[int, typer.Option(help="Sequences that are measured, and not tuned on.")]
_Patience = Annotated[int | None, typer.Option(help="End after so many measurements without a new best.")]
_Embeddings = Annotated[
    bool, typer.Option("--embeddings", help="Tune the embedding and the head too, where they are dense.")
]
_Corrections = Annotated[bool, typer.Option("--corrections", help="Tune low-rank corrections alone, in little memory.")]
_Recompute = Annotated[
    bool | None, typer.Option(help="Keep few activations, run blocks twice; by default with --corrections.")
]
_Cache = Annotated[
    Path | None, typer.Option(help="Folder for the teacher's predictions: made once, read in every step.")
]
_Kl = Annotated[float, typer.Option(help="Weight of KL to the teacher.", rich_help_panel=_LOSS)]
_Ce = Annotated[float, typer.Option(help="Weight of the text's cross-entropy.", rich_help_panel=_LOSS)]
_Hidden = Annotated[
    float, typer.Option(help="Weight of the last hidden states' relative distance.", rich_help_panel=_LOSS)
]
_Mode = Annotated[
    str,
    typer.Option(
        help="auto (a buffer, but trellis codes stay), buffer, linearized, straight-through, continuous (all stay).",
        rich_help_panel=_STEP,
    ),
]
_Lr = Annotated[
    float, typer.Option(help="Of scales, codebooks and gains, as a fraction of their size.", rich_help_panel=_STEP)
]
_CodeLr = Annotated[
    float,
    typer.Option(
        help="Of codes' targets, in units of what a code can tell apart; less for more steps.", rich_help_panel=_STEP
    ),
]
_Fraction = Annotated[
    float, typer.Option(help="Fraction of a layer's codes that may change in a step.", rich_help_panel=_STEP)
]
_Trust = Annotated[
    float, typer.Option(help="Most that codes change a layer's weights in a step.", rich_help_panel=_STEP)
]
_Seed = Annotated[
    int, typer.Option(help="Of the sequences; another than quantize's, so that held-out ones are new to the model.")
]


def tune_command(
    model: _Model,
    teacher: _Teacher,
    output: _Output = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Sequences in memory at a time.")] = 4,
    calibration: options.Text = "wikitext2",
    num_samples: _NumSamples = 512,
    seqlen: options.Seqlen = None,
    held_out: _HeldOut = 16,
    evaluate_every: Annotated[int, typer.Option(help="Steps between measurements.")] = 20,
    patience: _Patience = None,
    norms: Annotated[bool, typer.Option(help="Tune the model's norms too.")] = True,
    embeddings: _Embeddings = False,
    corrections: _Corrections = False,
    recompute: _Recompute = None,
    cache: _Cache = None,
    top: Annotated[int, typer.Option(help="Top-k tokens that the cache keeps at each place.")] = 64,
    kl: _Kl = 1,
    ce: _Ce = 0,
    hidden: _Hidden = 0,
    mode: _Mode = PVSettings.mode,
    lr: _Lr = PVSettings.lr,
    code_lr: _CodeLr = PVSettings.code_lr,
    fraction: _Fraction = PVSettings.fraction,
    trust: _Trust = PVSettings.trust,
    device: options.Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the models' computation; by default float32 on a CPU.")] = None,
    seed: _Seed = 1,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Tune a packed checkpoint end to end: scales, codebooks, norms and most codes, by KL to the teacher's predictions.

    The size stays the same. An interrupted run continues with --resume and ends in the same model. Several processes
    share the work: accelerate launch -m quantkit.cli tune ..., or torchrun.
    """
    from quantkit.io.hf import resolve_folder
    from quantkit.run.recipe import Calibration
    from quantkit.tuning.end_to_end import Watch
    from quantkit.tuning.request import TuningRun
    from quantkit.tuning.run import run

    output = output or Path(f"{Path(model).resolve().name}-tuned")
    settings = TuningSettings(
        steps, batch, micro_batch, evaluate_every=evaluate_every, held_out=held_out, patience=patience, norms=norms,
        embeddings=embeddings, corrections=corrections, kl=kl, ce=ce, hidden=hidden, recompute=recompute, top=top,
        seed=seed, pv=PVSettings(mode, lr, code_lr, fraction, trust),
    )  # fmt: skip
    text = Calibration(calibration, num_samples, seqlen, seed)
    asked = TuningRun(resolve_folder(model), resolve_folder(teacher), output, text, settings, cache, teacher)
    if dry_run:
        from quantkit.tuning.estimate import estimate

        expected = estimate(asked, device, dtype, resume=resume, overwrite=overwrite)
        if options.is_first_process():
            _say_estimate(expected, model, output, as_json)
        return
    shown: AbstractContextManager[dict[str, Any]] = tuning_progress() if options.is_first_process() else nullcontext({})
    try:
        with shown as bars:
            found = run(asked, device, dtype, resume=resume, overwrite=overwrite, watch=Watch(**bars))
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if found is not None and as_json:
        print(json.dumps(found.to_json(), indent=2))
    elif found is not None:
        _say(found)


KINDS = {
    "scales": "scales, codebooks and the like", "codes": "weights with codes", "corrections": "in corrections",
    "norms": "in norms", "embeddings": "in embedding and head",
}  # fmt: skip
"""What `TuningEstimate.trainable` counts, in words."""


def _say_estimate(expected: TuningEstimate, model: str, output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(expected), indent=2))
        return
    console.print(f"[bold]{escape(model)}[/] -> {escape(str(output))}", soft_wrap=True)
    tokens = f"{expected.tokens:,} tokens, {expected.step_tokens:,} in each"
    console.print(f"steps              {expected.steps:,}, on {tokens}; measured {expected.measurements:,} times")
    text = f"{expected.sequences:,} sequences of {expected.seqlen:,} tokens, {expected.held_out:,} of them held out"
    console.print(f"text               {text}")
    console.print(f"layers to tune     {expected.layers}")
    counts = [f"{count:,} {KINDS[name]}" for name, count in expected.trainable.items()]
    console.print(f"trainable          {', '.join(counts)}", soft_wrap=True)
    if expected.cache_bytes:
        console.print(f"cache              {size(expected.cache_bytes)} of the teacher's predictions")
    console.print(f"memory of the run  at least about {size(expected.memory_bytes)} on {expected.device}")
    parts = [f"{name} {size(nbytes)}" for name, nbytes in expected.memory.items() if nbytes]
    console.print(f"                   {', '.join(parts)}; activations are not estimated", soft_wrap=True)
    console.print("time of the run    not estimated")


def _say(found: Tuned) -> None:
    first, (before, after) = found.history[0], found.kl
    if "full_kl" in first:
        missing = 100 * (1 - before / first["full_kl"])
        aside.print(f"the cache understates KL by {missing:.1f}% ({first['full_kl']:.4f} in full before tuning)")
    less = 100 * (1 - after / before)
    aside.print(f"held-out KL to the teacher  {before:.4f} -> {after:.4f} nats a token ({less:.0f}% less)")
    made(found.output)
