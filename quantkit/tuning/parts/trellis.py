"""trellis taken apart: scales are continuous, as far as their steps go; a unit is a piece of a ring."""

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.formats.trellis import TrellisWeight, columns_of, rings_of
from quantkit.kernels import trellis, viterbi
from quantkit.tuning.parts.base import Coded, Scaled, described


class TunableTrellis(Coded):
    """trellis: scales are continuous, as far as their steps go; a unit is a piece of a ring.

    A piece's first L - K bits belong to the weights before it as well, and stay when it gets other codes; pieces begin
    elsewhere each time, so that all bits can move.
    """

    pace = 0.5  # another path changes a whole piece for what some of its weights gain; at 1 that gained nothing
    moves = False
    symbols: Tensor  # uint8 [places, rings]
    scale: Tensor
    begin: Tensor  # int64 [], where the first piece of each ring begins

    def __init__(self, weight: TrellisWeight) -> None:
        super().__init__()
        self._weight = described(weight)
        self.bits = weight.bits
        self.register_buffer("symbols", trellis.unpack_rings(weight.codes, weight.bits))
        self.register_buffer("begin", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", weight.scale.float())
        self.scales = Scaled(trellis.step(weight.scales[0]) * weight.scale, each=True)
        self._piece = next(size for size in (128, 64, 32) if len(self.symbols) % size == 0)

    def _states(self) -> Tensor:
        """int32 [places, rings]."""
        states = self.symbols.int()
        for i in range(1, -(-self._weight.state_bits // self._weight.bits)):
            states |= self.symbols.roll(-i, 0).int() << (i * self._weight.bits)
        return states & (1 << self._weight.state_bits) - 1

    def stored_scales(self) -> Tensor:
        """Scales as they are stored, through which gradients pass; fp32 [in_features]."""
        scales = self.scales()
        with torch.no_grad():
            stored = trellis.step(trellis.nearest_step(scales / self.scale)) * self.scale
        return scales + (stored - scales).detach()

    def forward(self) -> Tensor:
        """See `Tunable`; moves the places where pieces begin."""
        self.begin.copy_((self.begin + self._piece // 2 + 1) % len(self.symbols))
        return super().forward()

    def values(self) -> Tensor:
        """What the codes stand for, before scales; fp32 [out_features, in_features]."""
        out_features, in_features = self._weight.shape
        values = trellis.evaluate(self._states())
        width = self._weight.width
        values = columns_of(values[: -(-out_features // width) * width * width], width)
        return values[:out_features, :in_features]

    def decode(self) -> Tensor:
        """The weight [out_features, in_features]: value * step * scale."""
        return self.values() * self.stored_scales()

    def units(self, weight: Tensor) -> Tensor:
        """Pieces [rings * pieces, size]."""
        rings = rings_of(weight, self._weight.width)
        return self._pieces(torch.nn.functional.pad(rings, (0, 0, 0, len(self.symbols) - len(rings))))

    def _pieces(self, rings: Tensor) -> Tensor:
        return rings.roll(-int(self.begin), 0).T.reshape(-1, self._piece)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest path to targets [n, size] between the bits around the piece."""
        w = self._weight
        values = trellis.table(w.state_bits, target.device)
        scales = self.units(self.stored_scales().expand(w.shape))[index]
        fills = scales == 0  # places that fill a ring up stand for nothing, and may stay
        states = self._states()
        wanted = torch.where(fills, self._pieces(values[states.long()])[index], target / scales)
        pieces = len(self.symbols) // self._piece
        first = (self.begin + index % pieces * self._piece) % len(self.symbols)
        ends = states & (1 << (w.state_bits - w.bits)) - 1
        above, below = (ends[place % len(ends), index // pieces] for place in (first + self._piece, first))
        states = viterbi.between(wanted, values, w.bits, above, below)
        return states & (1 << w.bits) - 1, values[states.long()] * scales

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        pieces = self._pieces(self.symbols)
        pieces[index] = codes.to(pieces.dtype)
        rings = pieces.view(self.symbols.shape[1], -1).T.roll(int(self.begin), 0)
        self.symbols.copy_(rings)

    @torch.no_grad()
    def packed(self) -> TrellisWeight:
        """See `Tunable`."""
        codes = trellis.pack_rings(self.symbols, self._weight.bits)
        scales = trellis.nearest_step(self.scales() / self.scale)
        return replace(self._weight, codes=codes, scales=scales[None], scale=self.scale.clone())
