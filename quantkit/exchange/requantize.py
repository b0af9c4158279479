"""An export of what a form does not hold: the weights that a model stands for are rounded anew, for that form."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.core.errors import QuantkitError
from quantkit.exchange.export import export_folder, form, settings_for
from quantkit.exchange.target import Exported, Told
from quantkit.io.classes import meta_model
from quantkit.models.structure import block_linears, linear_weight
from quantkit.quantizers.gptq import GPTQ
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.recipe import Calibration, Recipe
from quantkit.run.report import Check

PROGRAMS = {"gguf": "gguf", "mlx": "mlx", "compressed-tensors": "vllm", "gptq": "vllm"}
"""Whose grids a form is given."""


@dataclass(frozen=True)
class Requantized:
    """An export of weights that were rounded anew.

    Attributes:
        exported: see there.
        check: what the rounding did to held-out text, beside the packed model; None where there was none to spare.
    """

    exported: Exported
    check: Check | None


def requantize_folder(
    folder: Path,
    output: Path,
    to: str,
    bits: int,
    text: Calibration,
    check: int = 8,
    overwrite: bool = False,
    progress: Told = lambda _done, _total, _what: None,
    **settings: Any,
) -> Requantized:
    """Rounds what a packed checkpoint stands for by GPTQ, to grids that a form has, and writes that.

    Args:
        folder: of the checkpoint; any layers may be packed in any way.
        output, to, overwrite, settings: see `export_folder`.
        bits: of the new codes.
        text: that GPTQ's statistics are of.
        check: held-out sequences that the new model is measured on beside the packed one.
        progress: called with (units done, units in all, what comes next), for each of the three steps.

    Raises:
        QuantkitError: the form has no grids, or none of so many bits; or see `quantize_checkpoint`.
    """
    if to not in PROGRAMS:
        raise QuantkitError(f"{to} needs no rounding to grids; leave out `requantize`")
    group = settings_for(PROGRAMS[to], "gptq", bits)["group_size"]
    form(to).check(folder, output, resume=False, overwrite=overwrite)
    narrowest = min(linear_weight(layer).shape[1] for layer in block_linears(meta_model(folder, None)).values())
    quantizer = GPTQ(bits, min(group, narrowest))

    def step(what: str) -> Callable[[int, int, str], None]:
        return lambda done, total, name: progress(done, total, f"{what}: {name}")

    above = output.expanduser().resolve().parent
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantkit-export-", dir=above) as name:
        dense, packed = Path(name) / "dense", Path(name) / folder.name
        export_folder(folder, dense, "dense", progress=step("dense"))
        recipe = replace(Recipe(quantizer, calibration=text), check=check)
        report = quantize_checkpoint(dense, recipe, packed, name=folder.name, progress=step("GPTQ"))
        made = export_folder(packed, output, to, overwrite=overwrite, progress=step(to), **settings)
    return Requantized(made, report.check)
