"""Packing one layer: by its quantizer, beside what it aimed at, and with what is to be said of it."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import predicted_kl, proxy_loss
from quantkit.core.protocols import LayerHook, Needs
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.models.experts import place
from quantkit.models.plan import Plan, Tied
from quantkit.models.structure import linear_weight
from quantkit.quantizers.factor import quantized, relative
from quantkit.quantizers.target_shift import aimed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pack:
    """The hook of an ordinary run: every layer by its quantizer of the plan.

    Attributes:
        plan: quantizers by layer name.
    """

    plan: Plan

    def needs(self, name: str) -> Needs:
        """What the layer's quantizer reads."""
        return self.plan[name].needs

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """The packed layer, and its error against what its quantizer aims at."""
        quantizer = self.plan[name]
        assert not isinstance(quantizer, Tied)
        target, quantizer = aimed(quantizer, weight, stats)
        packed = quantized(quantizer, target, stats)
        error, damping = relative_error(target, packed, stats), None if stats is None else stats.damping
        tokens = stats.num_tokens if stats is not None and place(name) is not None else None
        return LayerResult(packed, error, damping, predicted_kl=expected_kl(target, packed, stats), tokens=tokens)


def packed(hook: LayerHook, module: nn.Module, stats: LayerStats | None, name: str) -> LayerResult:
    """A layer as the hook packs it.

    Raises:
        QuantkitError: what came of it holds NaN or Inf.
    """
    weight = linear_weight(module).detach().float()
    result = hook(name, weight, stats)
    logger.debug(
        "%s: %s, %.3f bits a weight, error %.2e",
        *(name, result.weight.label, result.weight.bits_per_weight, result.relative_error),
    )
    for key, tensor in result.weight.state().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise QuantkitError(
                f"{name}: its packed {key} would hold NaN or Inf, and its weights reach "
                f"{float(weight.abs().max()):.3g}; leave it dense (`ignore`), or take another method"
            )
    if stats is not None and stats.raised_damping is not None:
        logger.warning("%s: the Hessian factored only with damping raised to %g", name, stats.raised_damping)
    return result


def relative_error(target: Tensor, packed: QuantizedWeight, stats: LayerStats | None) -> float:
    """E(Q) / E(0) with E the proxy loss of a target [out_features, in_features]; see `LayerResult`."""
    target, error = relative(target, target - packed.dequantize())
    if stats is None:
        return float(error.square().sum() / target.square().sum().clamp_min(1e-30))
    return proxy_loss(error, stats.hessian) / max(proxy_loss(target, stats.hessian), 1e-30)


def expected_kl(target: Tensor, packed: QuantizedWeight, stats: LayerStats | None) -> float | None:
    """`core.metrics.predicted_kl` of a packed layer beside its target [out_features, in_features], where known.

    Its weight would not do: how the target was shifted makes good what other layers lost.
    """
    if stats is None or stats.outputs is None:
        return None
    return predicted_kl(target - packed.dequantize().to(target), stats.hessian, stats.outputs)
