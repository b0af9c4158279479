"""`quantkit tune`: a packed checkpoint and its teacher in, a better checkpoint of the same size out."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.display import console, tuning_bars
from quantkit.core.errors import Interrupted, QuantkitError
from quantkit.tuning.settings import PVSettings, TuningSettings

_STEP, _LOSS = "A step", "The loss"


def tune_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a packed checkpoint.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the full-precision model.")],
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-tuned.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Windows in memory at a time.")] = 4,
    calibration: options.Text = "wikitext2",
    num_samples: Annotated[int, typer.Option(help="Windows of text, held-out ones included.")] = 512,
    seqlen: options.Seqlen = None,
    held_out: Annotated[int, typer.Option(help="Windows that are measured, and not tuned on.")] = 16,
    evaluate_every: Annotated[int, typer.Option(help="Steps between measurements.")] = 20,
    patience: Annotated[int | None, typer.Option(help="End after so many measurements without a new best.")] = None,
    norms: Annotated[bool, typer.Option(help="Tune the model's norms too.")] = True,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Tune the embedding and the head too, where they are dense.")
    ] = False,
    corrections: Annotated[
        bool, typer.Option("--corrections", help="Tune low-rank corrections alone, in little memory.")
    ] = False,
    recompute: Annotated[
        bool | None, typer.Option(help="Keep few activations, run blocks twice; by default with --corrections.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the teacher's predictions: made once, read in every step.")
    ] = None,
    top: Annotated[int, typer.Option(help="Successors of a token that the cache keeps.")] = 64,
    kl: Annotated[float, typer.Option(help="Weight of KL to the teacher.", rich_help_panel=_LOSS)] = 1,
    ce: Annotated[float, typer.Option(help="Weight of the text's cross-entropy.", rich_help_panel=_LOSS)] = 0,
    hidden: Annotated[
        float, typer.Option(help="Weight of the last hidden states' relative distance.", rich_help_panel=_LOSS)
    ] = 0,
    mode: Annotated[
        str,
        typer.Option(help="buffer, linearized, straight-through, or continuous (codes stay).", rich_help_panel=_STEP),
    ] = PVSettings.mode,
    lr: Annotated[
        float, typer.Option(help="Of scales, books and gains, as a share of their size.", rich_help_panel=_STEP)
    ] = PVSettings.lr,
    code_lr: Annotated[
        float,
        typer.Option(
            help="Of codes' targets, in units of what a code can tell apart; less for more steps.",
            rich_help_panel=_STEP,
        ),
    ] = PVSettings.code_lr,
    share: Annotated[
        float, typer.Option(help="Most of a layer's codes that change in a step.", rich_help_panel=_STEP)
    ] = PVSettings.share,
    trust: Annotated[
        float, typer.Option(help="Most that codes change a layer's weights in a step.", rich_help_panel=_STEP)
    ] = PVSettings.trust,
    device: options.Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of the models' computation; by default float32 on a CPU.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the windows; another than quantize's, so that held-out ones are new to the model.")
    ] = 1,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Tune a packed checkpoint end to end: scales, books, norms and codes, by KL to the teacher's predictions.

    The size stays the same. An interrupted run continues with --resume and ends in the same model. Several processes
    share the work: accelerate launch -m quantkit.cli tune ..., or torchrun.
    """
    import quantkit
    from quantkit.core.device import compute_dtype, parse_dtype
    from quantkit.io.checkpoint import check_output, read_config
    from quantkit.io.source import load_tokenizer, resolve_folder
    from quantkit.run.processes import begin_processes
    from quantkit.run.recipe import Calibration
    from quantkit.tuning.end_to_end import tune

    folder, teacher_folder = resolve_folder(model), resolve_folder(teacher)
    output = output or Path(f"{Path(model).resolve().name}-tuned")
    partial = output.with_name(output.name + ".tuning")
    check_output(output, folder, overwrite=overwrite)
    check_output(output, teacher_folder, overwrite=overwrite)
    if partial.exists() and not (resume or overwrite):
        raise QuantkitError(f"{partial} holds an unfinished run; --resume continues it, --overwrite starts anew")
    try:
        pv = PVSettings(mode, lr, code_lr, share, trust)
    except ValueError as error:
        raise QuantkitError(str(error)) from error
    settings = TuningSettings(
        steps, batch, micro_batch, evaluate_every=evaluate_every, held_out=held_out, patience=patience, norms=norms,
        embeddings=embeddings, corrections=corrections, kl=kl, ce=ce, hidden=hidden, recompute=recompute, top=top,
        seed=seed, pv=pv,
    )  # fmt: skip
    processes, where = begin_processes(device)
    kind = parse_dtype(dtype) or compute_dtype(where) or "auto"
    tokenizer = load_tokenizer(folder)
    student: Any = quantkit.load(folder, dtype=kind, device=where)
    reference = quantkit.load(teacher_folder, dtype=kind, device=where)
    processes.wait_for_everyone()  # all have looked at what is there
    if processes.is_main_process:
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    processes.wait_for_everyone()
    shown: AbstractContextManager[dict[str, Any]] = tuning_bars() if processes.is_main_process else nullcontext({})
    try:
        with shown as bars:
            tune(
                student,
                reference,
                tokenizer,
                calibration=Calibration(calibration, num_samples, seqlen, seed),
                settings=settings,
                state=partial / "state.pt",
                cache=cache,
                **bars,
            )
    except KeyboardInterrupt:
        raise Interrupted("stopped; repeat the command with --resume to continue") from None
    if processes.is_main_process:
        record = {"teacher": teacher, "settings": asdict(settings), "history": student.quantkit_tuning}
        stored = parse_dtype(read_config(folder).get("dtype"))
        _publish(student if stored is None else student.to(stored), tokenizer, record, partial, output)
    processes.wait_for_everyone()


def _publish(student: Any, tokenizer: Any, record: dict[str, Any], partial: Path, output: Path) -> None:
    """Makes the output, whole, of what was found."""
    from quantkit.io.checkpoint import replace_folder, write_json

    finished = partial / "checkpoint"
    shutil.rmtree(finished, ignore_errors=True)
    student.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    write_json(finished / "quantkit_tuning.json", record)
    replace_folder(finished, output)
    shutil.rmtree(partial)
    first = record["history"][0]
    best = min(entry["kl"] for entry in record["history"])
    if "full_kl" in first:
        missing = 100 * (1 - first["kl"] / first["full_kl"])
        console.print(f"the cache understates KL by {missing:.1f}% ({first['full_kl']:.4f} in full before tuning)")
    less = 100 * (1 - best / first["kl"])
    console.print(f"held-out KL to the teacher  {first['kl']:.4f} -> {best:.4f} nats a token ({less:.0f}% less)")
    console.print(f"checkpoint: [bold]{output}[/]   load it with quantkit.load({str(output)!r})", soft_wrap=True)
