"""`quantkit tune`: a packed checkpoint and its teacher in, a better checkpoint of the same size out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.display import aside, made
from quantkit.cli.progress import tuning_progress
from quantkit.core.errors import Interrupted
from quantkit.tuning.settings import PVSettings, TuningSettings

_STEP, _LOSS = "A step", "The loss"

_Model = Annotated[str, typer.Argument(help="Folder or hub id of a packed checkpoint.")]
_Teacher = Annotated[str, typer.Option(help="Folder or hub id of the full-precision model.")]
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
    str, typer.Option(help="buffer, linearized, straight-through, or continuous (codes stay).", rich_help_panel=_STEP)
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
) -> None:
    """Tune a packed checkpoint end to end: scales, codebooks, norms and codes, by KL to the teacher's predictions.

    The size stays the same. An interrupted run continues with --resume and ends in the same model. Several processes
    share the work: accelerate launch -m quantkit.cli tune ..., or torchrun.
    """
    from quantkit.api import tune
    from quantkit.run.recipe import Calibration

    output = output or Path(f"{Path(model).resolve().name}-tuned")
    settings = TuningSettings(
        steps, batch, micro_batch, evaluate_every=evaluate_every, held_out=held_out, patience=patience, norms=norms,
        embeddings=embeddings, corrections=corrections, kl=kl, ce=ce, hidden=hidden, recompute=recompute, top=top,
        seed=seed, pv=PVSettings(mode, lr, code_lr, fraction, trust),
    )  # fmt: skip
    shown: AbstractContextManager[dict[str, Any]] = tuning_progress() if options.is_first_process() else nullcontext({})
    try:
        with shown as bars:
            history = tune(
                model, teacher, output=output, calibration=Calibration(calibration, num_samples, seqlen, seed),
                settings=settings, cache=cache, device=device, dtype=dtype, resume=resume, overwrite=overwrite, **bars,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if history is not None:
        _say(history, output)


def _say(history: list[dict[str, Any]], output: Path) -> None:
    first, best = history[0], min(entry["kl"] for entry in history)
    if "full_kl" in first:
        missing = 100 * (1 - first["kl"] / first["full_kl"])
        aside.print(f"the cache understates KL by {missing:.1f}% ({first['full_kl']:.4f} in full before tuning)")
    less = 100 * (1 - best / first["kl"])
    aside.print(f"held-out KL to the teacher  {first['kl']:.4f} -> {best:.4f} nats a token ({less:.0f}% less)")
    made(output)
