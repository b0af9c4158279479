"""pyramid taken apart: scales and gain levels are continuous, a unit is a group."""

import math

import torch
from torch import Tensor

from quantkit.formats.pyramid import PyramidWeight, factors
from quantkit.kernels import pyramid
from quantkit.quantizers.pyramid import nearest_level, shape
from quantkit.tuning.parts.base import Coded, Scaled, described, storable


class TunablePyramid(Coded):
    """pyramid: scales and gain levels are continuous, a unit is a group."""

    points: Tensor  # int16 [lines, fields, D]
    gains: Tensor  # int64 [lines, fields]

    def __init__(self, weight: PyramidWeight) -> None:
        super().__init__()
        self._weight = described(weight)
        self.bits = math.log2(pyramid.count(weight.dimension, weight.pulses) * len(weight.levels)) / weight.dimension
        points, gains = weight.points()
        self.register_buffer("points", points)
        self.register_buffer("gains", gains)
        self.scales = Scaled(weight.scales, each=True)
        self.levels = Scaled(weight.levels, each=True)

    def decode(self) -> Tensor:
        """The weight [out_features, in_features]: factor * y.

        factor = scale * level / |y| is rounded to fp16, through which gradients pass.
        """
        factor = self.scales() * self.levels()[self.gains] / self.points.float().square().sum(-1).sqrt().clamp_min(1.0)
        with torch.no_grad():
            stored = factors(self.points, self.levels()[self.gains], self.scales()).float()
        groups = self.points.float() * (factor + (stored - factor).detach()).unsqueeze(-1)
        along = groups.transpose(1, 2).flatten(0, 1)
        shape = self._weight.shape
        return along[: shape[0]] if self._weight.axis == "out" else along[: shape[1]].T

    def units(self, weight: Tensor) -> Tensor:
        """Groups [lines * fields, D]."""
        along = weight if self._weight.axis == "out" else weight.T
        padded = torch.nn.functional.pad(along, (0, 0, 0, -along.shape[0] % self._weight.dimension))
        return padded.unflatten(0, (-1, self._weight.dimension)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The point that is closest in angle to targets [n, dimension], then the nearest level."""
        scales = self.scales()[index % self.points.shape[1]]
        levels, order = self.levels().sort()
        points, amplitudes, _ = shape(target, self._weight.pulses)
        chosen = nearest_level(amplitudes / scales, levels)
        values = points.float() * factors(points, levels[chosen], scales).float().unsqueeze(-1)
        return torch.cat([points.long(), order[chosen].unsqueeze(-1)], dim=-1), values

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.points.view(-1, self.points.shape[-1])[index] = codes[:, :-1].to(self.points.dtype)
        self.gains.view(-1)[index] = codes[:, -1]

    @torch.no_grad()
    def packed(self) -> PyramidWeight:
        """See `Tunable`."""
        w = self._weight
        return PyramidWeight.pack(
            self.points, self.gains, storable(self.scales()), self.levels().half(), w.pulses, w.axis, w.shape
        )
