"""`quantkit quantize`: a model folder or hub id in, a packed checkpoint out."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from quantkit.checkpoint import check_output
from quantkit.cli.display import block_progress, console, report_table, size
from quantkit.errors import Interrupted, QuantkitError
from quantkit.estimate import estimate
from quantkit.folder import resolve_folder
from quantkit.pipeline import quantize_checkpoint
from quantkit.recipe import TARGET_SHIFT, Calibration, Recipe, make_quantizer


def quantize_command(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or its id on the hub.")],
    bits: Annotated[int, typer.Option(help="Bits of a code, 1 to 8.")] = 3,
    method: Annotated[str, typer.Option(help="gptq (needs calibration text) or rtn.")] = "gptq",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1 for a whole row.")] = 128,
    symmetric: Annotated[
        bool, typer.Option("--sym/--asym", help="Grids centred on zero, or with a stored zero.")
    ] = True,
    calibration: Annotated[
        str, typer.Option(help="wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub dataset id.")
    ] = "wikitext2",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a window; by default 2048 or the model's context.")] = None,
    target_shift: Annotated[float, typer.Option(help="0 (off) to 1: aim at the full-precision output.")] = TARGET_SHIFT,
    true_sequential: Annotated[
        bool, typer.Option(help="Let each layer see its own block's earlier layers quantized; off is faster.")
    ] = True,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave dense; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to make; by default NAME-METHOD-Nbit.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output or unfinished run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the run would make and need.")] = False,
) -> None:
    """Quantize a model: blocks are read, quantized and written one at a time.

    An interrupted run continues with --resume and gives the same bytes. The report is printed and written to
    quantkit_report.json beside the checkpoint.
    """
    quantizer = make_quantizer(method, bits=bits, group_size=group_size, symmetric=symmetric)
    text = Calibration(calibration, num_samples, seqlen, seed)
    recipe = Recipe(quantizer, dict.fromkeys(ignore or ()), target_shift, text, true_sequential)
    folder = resolve_folder(model)
    output = output or Path(f"{Path(model).resolve().name}-{method.lower()}-{bits}bit")
    check_output(output, folder, resume=resume, overwrite=overwrite)
    if dry_run:
        expected = estimate(folder, recipe, device=device)
        console.print(f"[bold]{model}[/] -> {output}")
        console.print(
            f"layers to pack     {expected.layers}, {expected.packed_weights:,} of {expected.all_weights:,} weights"
        )
        console.print(f"bits per weight    {expected.bits_per_weight:.3f} in packed layers, every stored byte counted")
        console.print(f"size               {size(expected.bytes_before)} -> {size(expected.bytes_after)}")
        console.print(f"memory of the run  about {size(expected.memory_bytes)} on {expected.device}")
        return
    try:
        with block_progress() as progress:
            report = quantize_checkpoint(
                folder, recipe, output, name=model, device=device, resume=resume, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt:
        kept = output.with_name(output.name + ".partial").exists()
        what = (
            "finished blocks are kept: repeat the command with --resume to continue" if kept else "nothing was written"
        )
        raise Interrupted(f"stopped; {what}") from None
    except torch.OutOfMemoryError as error:
        raise QuantkitError("the GPU's memory is full; use --device cpu, or lower --num-samples or --seqlen") from error
    report_table(report)
    console.print(f"checkpoint: [bold]{output}[/]   load it with quantkit.load({str(output)!r})", soft_wrap=True)
