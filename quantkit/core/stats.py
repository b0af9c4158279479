"""LayerStats: what a quantizer may know about a layer's inputs, and the accumulator that gathers it.

    H = mean over tokens of x_q x_q^T        C = mean over tokens of x x_q^T

x is the layer's input in the full-precision model, x_q its input behind the quantized prefix. One
convention everywhere: a mean, in fp32, without a factor 2.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.core.errors import CalibrationError
from quantkit.core.linalg import (
    NotPositiveDefinite,
    damped_inverse_factor,
    elimination_order,
    mirrored,
    moments,
)

logger = logging.getLogger(__name__)

OUTPUTS_DAMP = 0.05
"""Added to diag(H_O), as a fraction of its mean: gradients are few and heavy-tailed."""


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Second-order statistics of a layer's inputs; layers fed by the same tensor share one.

    Attributes:
        hessian: H, fp32 (fp64 in tests) [in_features, in_features].
        cross: C, like hessian, or None where only one stream was run.
        num_tokens: tokens behind the means; of weighted ones, so many of equal weight as would say as much.
        name: the layer's name, for messages.
        outputs: H_O, fp32 [out_features, out_features], of one layer (`quantkit.run.fisher`); None where it is unknown.
    """

    hessian: Tensor
    cross: Tensor | None = None
    num_tokens: int = 0
    name: str = "layer"
    outputs: Tensor | None = None
    _factors: dict[tuple[float, bytes | None], tuple[Tensor, float]] = field(default_factory=dict, repr=False)
    _orders: dict[float, Tensor] = field(default_factory=dict, repr=False)
    _changed: dict[Hashable, "LayerStats"] = field(default_factory=dict, repr=False)
    _read: list[tuple[float, float]] = field(default_factory=list, repr=False)  # damping: what was asked, what was used

    def changed(self, key: Hashable, change: Callable[[Tensor], Tensor]) -> "LayerStats":
        """The statistics [in, in] of inputs R x, computed once a key.

        Args:
            key: names R.
            change: R, applied over the last dimension.
        """
        if key not in self._changed:
            hessian = change(change(self.hessian).T)
            cross = None if self.cross is None else change(change(self.cross).T).T
            made = LayerStats((hessian + hessian.T) / 2, cross, self.num_tokens, self.name)
            self._changed[key] = replace(made, _read=self._read)
        found = self._changed[key]
        if self.outputs is None and found._read is self._read:
            return found
        return replace(found, name=self.name, outputs=self.outputs, _read=self._read)

    def of_layer(self, name: str, outputs: Tensor | None) -> "LayerStats":
        """The same statistics for one of the layers that share them, with its own H_O and its own damping."""
        return replace(self, name=name, outputs=outputs, _read=[])

    def outputs_factor(self, order: Tensor) -> Tensor:
        """Upper-triangular U [out, out] with (H_O + damping)^-1 = U^T U, rows in `order`; H_O has to be known.

        Raises:
            CalibrationError: H_O does not factor.
        """
        assert self.outputs is not None
        try:
            factor, damping = damped_inverse_factor(self.outputs[order][:, order], OUTPUTS_DAMP)
        except NotPositiveDefinite as error:
            raise CalibrationError(f"{self.name}: at its outputs {error}; leave out `fisher`") from error
        if damping > OUTPUTS_DAMP:
            logger.warning("%s: its outputs' statistics factored only with damping raised to %g", self.name, damping)
        return factor

    def changed_outputs(self, change: Callable[[Tensor], Tensor]) -> "LayerStats":
        """The statistics of a layer whose outputs are R y, for R applied over the last dimension."""
        return self if self.outputs is None else replace(self, outputs=change(change(self.outputs).T))

    def scaled(self, scales: Tensor) -> "LayerStats":
        """The statistics of inputs S x, for a diagonal S given as fp32 [in_features]; not remembered."""
        scales = scales.to(self.hessian)
        cross = None if self.cross is None else scales[:, None] * self.cross * scales
        hessian = scales[:, None] * self.hessian * scales
        return LayerStats(hessian, cross, self.num_tokens, self.name, self.outputs)

    def inverse_factor(self, damp: float, order: Tensor | None = None) -> Tensor:
        """Upper-triangular U [n, n] with (H + damping)^-1 = U^T U, columns in `order`; computed once a (damp, order).

        Raises:
            CalibrationError: H holds NaN or Inf, or does not factor with any damping up to 1.
        """
        key = (damp, None if order is None else order.cpu().numpy().tobytes())
        if key not in self._factors:
            hessian = self.hessian if order is None else self.hessian[order][:, order]
            try:
                self._factors[key] = damped_inverse_factor(hessian, damp)
            except NotPositiveDefinite as error:
                raise CalibrationError(f"{self.name}: {error}; give more calibration text, or `method` rtn") from error
        self._read.append((damp, self._factors[key][1]))
        return self._factors[key][0]

    def order(self, damp: float) -> Tensor:
        """`core.linalg.elimination_order`, int64 [in_features], computed once a damping."""
        if damp not in self._orders:
            self._orders[damp] = elimination_order(self.hessian, damp)
        return self._orders[damp]

    @property
    def damping(self) -> float | None:
        """The largest damping of the factors that were read of these statistics, changed ones too, so far."""
        return max((used for _, used in self._read), default=None)

    @property
    def raised_damping(self) -> float | None:
        """The largest damping that had to exceed what was asked for, or None."""
        return max((used for asked, used in self._read if used > asked), default=None)


class StatsAccumulator:
    """Adds batches of inputs up to a LayerStats.

    Args:
        in_features: width of the inputs.
        with_cross: whether to gather C too.
        device: where H and C live.
    """

    def __init__(self, in_features: int, with_cross: bool, device: torch.device) -> None:
        self._hessian = torch.zeros(in_features, in_features, device=device)
        self._cross = torch.zeros_like(self._hessian) if with_cross else None
        self._counts = torch.zeros(3, dtype=torch.float64)  # tokens, their weights, the squares of these

    def add(self, x_q: Tensor, x: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds inputs; see `products`."""
        for place, product in self.products(x_q, x, weights):
            place += product

    def products(
        self, x_q: Tensor, x: Tensor | None = None, weights: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What inputs [..., in_features] add to the sums: places in them, each with its product.

        Args:
            x_q: the inputs.
            x: of their shape, the same tokens in the full-precision stream.
            weights: fp32 [...] of the tokens; None where all count alike.

        Raises:
            ValueError: C is gathered, and `x` is not given.
        """
        x_q = x_q.reshape(-1, x_q.shape[-1]).float()
        weighted = x_q if weights is None else x_q * weights.to(x_q).reshape(-1, 1)
        yield from moments(self._hessian, weighted, x_q)
        if self._cross is not None:
            if x is None:
                raise ValueError("this accumulator gathers C and needs the full-precision inputs too")
            x = x.reshape(-1, x.shape[-1]).float()
            yield from moments(self._cross, x, weighted, symmetric=False)
        count = float(len(x_q))
        sums = (count, count) if weights is None else (float(weights.sum()), float(weights.square().sum()))
        yield self._counts, torch.tensor([count, *sums])

    def finish(self, name: str) -> LayerStats:
        """The means over all tokens.

        Raises:
            CalibrationError: no token reached the layer, or an input was NaN or Inf.
        """
        count, weight, squares = self._counts.tolist()
        if not count:
            raise CalibrationError(f"{name}: no calibration token reached this layer; leave it out or use RTN")
        hessian = mirrored(self._hessian) / weight
        cross = None if self._cross is None else self._cross / weight
        for matrix in (hessian, cross):
            if matrix is not None and not bool(torch.isfinite(matrix).all()):
                raise CalibrationError(
                    f"{name}: its inputs hold NaN or Inf; check the weights, and save an fp16 model as bf16 first"
                )
        return LayerStats(hessian, cross, round(weight**2 / squares), name)
