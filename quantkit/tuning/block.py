"""Block-wise tuning: a block's packed layers learn to give what the untouched block gives in the untouched model.

    loss = mean over tokens of |B_q(x_q) - B(x)|^2 / |B(x)|^2

x_q comes from the packed blocks before and x from the full-precision ones. Tokens count by their relative error because
the norms behind a block divide each by its size. No gradient leaves the block, so that memory is that of one block. The
unit is that of BRECQ (arXiv 2102.05426), which learns roundings, weighted by Fisher information.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.models.forward import Batch, run_block
from quantkit.models.linear import QuantizedLinear
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.pv import PVOptimizer, TunedLinear, rate
from quantkit.tuning.settings import PVSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockTuning:
    """Tunes every block as soon as it is quantized.

    Attributes:
        steps: of the optimizer.
        batch: runs a step.
        batch_tokens: tokens a run, and in every pass over the calibration text.
        pv: of a step; "auto" is "buffer" here.
    """

    steps: int = 100
    batch: int = 1
    batch_tokens: int = 2048
    pv: PVSettings = field(default_factory=PVSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "batch_tokens"):
            if getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)} of block-wise tuning: give at least 1")
        if self.pv.mode == "auto":
            object.__setattr__(self, "pv", replace(self.pv, mode="buffer"))

    def __call__(
        self,
        block: nn.Module,
        names: list[str],
        batches: list[Batch],
        index: int,
        progress: Callable[[int, int], None] = lambda step, steps: None,
    ) -> tuple[float, float]:
        """Tunes one block in place, and leaves it as it was if nothing was gained over the calibration text.

        Args:
            block: on its device.
            names: of its packed layers.
            batches: `quantized` holds the block's inputs and `full` the wanted outputs.
            index: of the block, by which `Batch.call` finds its arguments.
            progress: called with (steps taken, steps in all).

        Returns:
            The loss over all batches before and after.

        Raises:
            QuantkitError: a format that cannot be tuned.
        """
        former = {name: cast(QuantizedLinear, block.get_submodule(name)) for name in names}
        before = _loss(block, batches, index)
        layers = {name: TunedLinear(tunable(linear.packed), linear.bias) for name, linear in former.items()}
        others = [parameter for parameter in block.parameters() if parameter.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            _place(block, layers)
            self._run(block, PVOptimizer(list(layers.values()), self.pv), batches, index, progress)
            tuned = {name: QuantizedLinear(layer.packed, layer.bias) for name, layer in layers.items()}
            _place(block, tuned)
            for linear in tuned.values():
                linear.hold(batches[0].quantized.dtype)
            after = _loss(block, batches, index)
            if not after < before:
                _place(block, former)
                after = before
        except BaseException:
            _place(block, former)
            raise
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
        return before, after

    @torch.enable_grad()
    def _run(
        self,
        block: nn.Module,
        optimizer: PVOptimizer,
        batches: list[Batch],
        index: int,
        progress: Callable[[int, int], None],
    ) -> None:
        generator = torch.Generator().manual_seed(index)
        order: list[int] = []
        for step in range(self.steps):
            optimizer.open()
            loss = torch.zeros(())
            for _ in range(self.batch):
                order = order or torch.randperm(len(batches), generator=generator).tolist()
                part = _divergence(block, batches[order.pop()], index).mean() / self.batch
                part.backward()
                loss += part.detach().cpu()
            if not bool(torch.isfinite(loss)):
                logger.warning("block %d: the loss of tuning step %d is NaN; it ends there", index, step + 1)
                return
            optimizer.step(rate(step, self.steps))
            progress(step + 1, self.steps)


def _divergence(block: nn.Module, batch: Batch, index: int) -> Tensor:
    """Each token's squared error, relative to the wanted output."""
    found = run_block(block, batch.quantized, batch.call(index)).float()
    wanted = batch.full.float()
    return (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)


@torch.no_grad()
def _loss(block: nn.Module, batches: list[Batch], index: int) -> float:
    losses = [_divergence(block, batch, index).double() for batch in batches]
    return float(sum(loss.sum() for loss in losses)) / sum(loss.numel() for loss in losses)


def _place(block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        block.set_submodule(name, layer)
