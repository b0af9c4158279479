"""Ranks by budget: given extra bits, every layer gets the correction that the model gains most by.

A first pass quantizes the model without corrections and notes each layer's spectrum: the eigenvalues l_1 >= l_2 >= ...
of E H E^T, of which a correction of rank r removes the first r (`quantizers.low_rank`). Losses of different layers are
compared relative to tr(W H W^T). A rank costs 16 (m + n) bits, or 8 (m + n) + 32. The same bits added to the weights'
codes would divide the layer's loss by 4^(bits / mn), so that a rank is only worth having where

    l_i > (l_i + l_i+1 + ...) (1 - 4^(-cost / mn))

Ranks that pass are taken in order of gain per bit until the budget is spent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError
from quantkit.core.metrics import proxy_loss
from quantkit.core.protocols import Needs, Quantizer
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats
from quantkit.models.plan import Plan, Tied
from quantkit.quantizers.factor import relative
from quantkit.quantizers.low_rank import LowRank, smaller_gram
from quantkit.quantizers.target_shift import aimed
from quantkit.run.packing import Pack


@dataclass(frozen=True)
class Spectrum:
    """What a layer lost, direction by direction.

    Attributes:
        values: eigenvalues of E H E^T over tr(W H W^T), largest first, fp64.
        shape: (out_features, in_features).
        rank_bits: that a rank costs.
    """

    values: Tensor
    shape: tuple[int, int]
    rank_bits: int

    def worth(self) -> int:
        """How many ranks gain more than the same bits in the weights' codes."""
        out_features, in_features = self.shape
        left = self.values.flip(0).cumsum(0).flip(0)
        as_codes = left * (1 - 4.0 ** (-self.rank_bits / (out_features * in_features)))
        better = self.values > as_codes
        return int(better.long().cumprod(0).sum())


class Survey:
    """The hook of a first pass: packs every layer without its correction and notes the spectrum of what was lost.

    Args:
        plan: with corrections.

    Attributes:
        spectra: by layer.

    Raises:
        QuantkitError: no quantizer of the plan has a correction.
    """

    def __init__(self, plan: Plan) -> None:
        self.spectra: dict[str, Spectrum] = {}
        self._bits: dict[str, int] = {}

        def without(name: str) -> Callable[[LowRank], Quantizer]:
            """Takes a layer's low-rank correction away, and notes the bits of its factors."""

            def inner(low: LowRank) -> Quantizer:
                self._bits[name] = low.adapter_bits
                return low.inner

            return inner

        self._pack = Pack({name: _at_correction(quantizer, without(name)) for name, quantizer in plan.items()})
        if not self._bits:
            raise QuantkitError("ranks are shared out over layers with a low-rank correction, and the plan has none")

    def needs(self, name: str) -> Needs:
        """The Hessian at least, where there is a correction."""
        return max(self._pack.needs(name), Needs.HESSIAN if name in self._bits else Needs.NOTHING)

    def __call__(self, name: str, weight: Tensor, stats: LayerStats | None) -> LayerResult:
        """The layer without its correction."""
        result = self._pack(name, weight, stats)
        if name in self._bits:
            assert stats is not None
            quantizer = self._pack.plan[name]
            assert not isinstance(quantizer, Tied)
            target = aimed(quantizer, weight, stats)[0]
            error, hessian = target - result.weight.dequantize().to(weight), stats.hessian.double()
            target, error = (part.double() for part in relative(target, error))
            size = max(proxy_loss(target, hessian), 1e-30)
            values = torch.linalg.eigvalsh(smaller_gram(error, hessian)[0]).flip(0).clamp_min(0) / size
            rank_bits = sum(weight.shape) * self._bits[name] + (32 if self._bits[name] == 8 else 0)
            self.spectra[name] = Spectrum(values.cpu(), (weight.shape[0], weight.shape[1]), rank_bits)
        return result


def allocate_ranks(spectra: Mapping[str, Spectrum], bits: float) -> dict[str, int]:
    """The ranks that gain most.

    Args:
        spectra: by layer.
        bits: to spend, over all weights of these layers.

    Returns:
        Each layer's rank; 0 where the same bits serve better in the weights' codes, or elsewhere.
    """
    offers = sorted(
        (
            (float(value) / spectrum.rank_bits, name)
            for name, spectrum in spectra.items()
            for value in spectrum.values[: spectrum.worth()]
        ),
        reverse=True,
    )
    left = bits * sum(s.shape[0] * s.shape[1] for s in spectra.values())
    ranks = dict.fromkeys(spectra, 0)
    full: set[str] = set()
    for _, name in offers:
        if name in full:
            continue
        if spectra[name].rank_bits > left:
            full.add(name)
            continue
        left -= spectra[name].rank_bits
        ranks[name] += 1
    return ranks


def with_ranks(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """A plan with these ranks in its corrections; layers of rank 0 lose theirs."""

    def reranked(rank: int) -> Callable[[LowRank], Quantizer]:
        return lambda low: replace(low, rank=rank) if rank else low.inner

    return {
        name: _at_correction(quantizer, reranked(ranks[name])) if name in ranks else quantizer
        for name, quantizer in plan.items()
    }


def summary(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], bits: float) -> str:
    """What was shared out, in a sentence."""
    weights = sum(s.shape[0] * s.shape[1] for s in spectra.values())
    spent = sum(rank * spectra[name].rank_bits for name, rank in ranks.items()) / weights
    useless = [name for name, spectrum in spectra.items() if spectrum.worth() == 0]
    text = (
        f"corrections: {spent:.3f} of {bits:g} extra bits a weight are spent, on ranks up to {max(ranks.values())} "
        f"in {sum(rank > 0 for rank in ranks.values())} of {len(ranks)} layers"
    )
    if useless:
        few = ", ".join(useless[:3]) + (", ..." if len(useless) > 3 else "")
        text += f"; in {len(useless)} the same bits serve better as weight bits ({few})"
    return text


def _at_correction(quantizer: Any, change: Callable[[LowRank], Quantizer]) -> Any:
    """A quantizer with its correction, however deep inside, replaced."""
    if isinstance(quantizer, LowRank):
        return change(quantizer)
    inner = getattr(quantizer, "inner", None)
    if not isinstance(inner, Quantizer):
        return quantizer
    return replace(quantizer, inner=_at_correction(inner, change))
