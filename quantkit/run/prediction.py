"""What ways to pack a model would cost it, predicted from one pass back and one forth, before any is packed.

A way is tried on some rows of some layers of each kind (q_proj, say). With E the rows' errors, their mean loss
e H_I e^T is that of all rows, and what it costs the model is

    KL ~ 1/2 (mean row loss) tr(H_O)

where rows do without feedback among them; with it, what the rows after them leave unexplained, in the rotated basis
where there is one, takes the place of tr(H_O) (`quantkit.run.fisher`, `quantizers.row_feedback`). Layers of a kind
that are not tried are taken to lose as much in proportion to the least that error feedback can lose, the mean square of
their weights times the sum of all 1 / U_jj^2, or without feedback times tr(H_I). Two things are known to be missing and
are put in:

- a way that reads n columns' Hessian from N tokens loses less on these than on others: of what it would lose with all
  the text in the world (1 - n/N) on these, and (1 + n/N) on others; with feedback among n rows too, by their H_O;
- losses of layers add up only while they are small (`INTERACTION`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.metrics import proxy_loss
from quantkit.core.products import full_width
from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats
from quantkit.io.source import open_folder
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.models.structure import block_linears, linear_weight
from quantkit.quantizers.factor import quantized
from quantkit.quantizers.hadamard import Hadamard
from quantkit.quantizers.row_feedback import RowFeedback
from quantkit.quantizers.rtn import RTN
from quantkit.run.fisher import measure
from quantkit.run.packing import Pack
from quantkit.run.recipe import Calibration, Recipe, core
from quantkit.run.sequential import Walker

ROWS, EVERY = 64, 8
"""Rows of a layer that a way is tried on, and blocks from one that has trials to the next."""
DAMP = 0.01
"""With which the least loss is worked out, as quantizers have it."""
INTERACTION = 1.0
"""Measured KL of a packed model over the sum of what its layers are expected to cost."""


@dataclass(frozen=True)
class Prediction:
    """What ways to pack a model's layers are expected to cost.

    Attributes:
        layers: nats a token by layer and quantizer.
        weights: weights of each layer.
    """

    layers: Mapping[str, Mapping[Quantizer, float]]
    weights: Mapping[str, int]

    def kl(self, quantizer: Quantizer) -> float:
        """Of a model that is packed in one way, in nats a token."""
        return INTERACTION * sum(ways[quantizer] for ways in self.layers.values())


@dataclass
class _Trials:
    """The hook of a walk over a model that stays nearly what it is.

    Attributes:
        ways: to try.
        two_sided: of them, those that will know of the outputs.
        base: packs each layer, at next to no loss.
        grown: by how much more text a run will have than this walk.
        found: nats a token by layer and way.
    """

    ways: Sequence[Quantizer]
    two_sided: Callable[[Quantizer], bool]
    base: Pack
    grown: float
    found: dict[str, dict[Quantizer, float]] = field(default_factory=dict)
    _ratios: dict[tuple[str, Quantizer], float] = field(default_factory=dict)

    def needs(self, name: str) -> Needs:
        """The Hessian, in which errors are measured."""
        return Needs.HESSIAN

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """Says what all ways would cost, and packs the layer by the base."""
        assert stats is not None and stats.outputs is not None
        index, kind = next((int(part), name.split(f".{part}.", 1)[1]) for part in name.split(".") if part.isdigit())
        signs = random_signs(len(weight), 0).to(weight.device)
        rotated = stats.changed_outputs(lambda moment: rotate(moment.contiguous(), signs))
        felt = {
            (False, False): (trace := float(stats.outputs.trace())),
            (False, True): trace,
            (True, False): RowFeedback(len(weight), stats).unexplained(),
            (True, True): RowFeedback(len(weight), rotated).unexplained(),
        }
        rows, columns = (self._beyond(count, stats.num_tokens) for count in weight.shape)
        size = float(weight.square().mean())
        least = {False: size * float(stats.hessian.trace()), True: size * _least(stats)}
        self.found[name] = {}
        for way in self.ways:
            reads = way.needs > Needs.NOTHING
            if index % EVERY == 0 or (kind, way) not in self._ratios:
                self._ratios[kind, way] = _row_loss(way, weight, stats) / max(least[reads], 1e-30)
            among = reads and self.two_sided(way)
            kl = self._ratios[kind, way] * least[reads] * felt[among, isinstance(way, Hadamard)] / 2
            self.found[name][way] = kl * (columns if reads else 1) * (rows if among else 1)
        return self.base(name, weight, stats)

    def _beyond(self, features: int, tokens: int) -> float:
        """What is lost on all text, over what is lost on these tokens, which a moment of so many features is from."""
        share = min(features / max(tokens, 1), 0.8)
        return (1 + share / self.grown) / (1 - share)


def _row_loss(way: Quantizer, weight: Tensor, stats: LayerStats) -> float:
    """Mean of e H_I e^T over some rows of a weight [out_features, in_features]."""
    count = min(ROWS, len(weight))
    rows = weight[torch.arange(count, device=weight.device) * len(weight) // count]
    error = rows - quantized(way, rows, stats.of_layer(stats.name, None)).dequantize().to(rows)
    return proxy_loss(error, stats.hessian) / count


def _least(stats: LayerStats) -> float:
    """The sum of what inputs after it leave unexplained of each input's variance, rotated and in the best order."""
    signs = random_signs(len(stats.hessian), 0).to(stats.hessian.device)
    rotated = stats.changed(("hadamard", 0), lambda moment: rotate(moment, signs))
    return float(rotated.inverse_factor(DAMP, rotated.order(DAMP)).diagonal().square().reciprocal().sum())


class _Nowhere:
    """A sink that keeps nothing."""

    def finished(self, index: int) -> None:
        """No block is done before."""

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Lets the block go."""


@full_width()
def predict(
    folder: Path,
    ways: Sequence[Quantizer],
    calibration: Calibration,
    *,
    num_samples: int | None = None,
    fisher: bool | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Prediction:
    """Tries ways to pack a model's layers.

    Args:
        folder: the full-precision model.
        ways: quantizers, with all settings.
        calibration: the text.
        num_samples: sequences that the run will have, where that is not what `calibration` says.
        fisher: whether they would be told of outputs and tokens; None where they want it.
        device: where blocks run; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    where = pick_device(device)
    source = open_folder(folder, compute_dtype(where))
    recipe = Recipe(RTN(8, 32), calibration=calibration, target_shift=0)
    plan = recipe.plan(source.model)
    tokens = calibration.sequences(source.tokenizer(), source.model)
    layers = block_linears(source.model)
    weights = {name: linear_weight(module).numel() for name, module in layers.items()}

    def two_sided(way: Quantizer) -> bool:
        return bool(getattr(core(way), "wants_fisher", False)) if fisher is None else fisher

    hook = _Trials(ways, two_sided, Pack(plan), (num_samples or len(tokens)) / len(tokens))
    with TemporaryDirectory(prefix="quantkit-fisher-") as found:
        felt = measure(
            source.model, list(layers), tokens, source.weights({}, head=True), where, Path(found), progress=progress
        )
        Walker(
            source.model, plan, tokens, source.weights(plan), where, hook, progress=progress, fisher=felt,
            true_sequential=False,
        ).run(_Nowhere())  # fmt: skip
    return Prediction(hook.found, weights)
