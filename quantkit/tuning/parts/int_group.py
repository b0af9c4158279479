"""int_group taken apart: scales and zeros are continuous, a unit is a weight."""

import torch
from torch import Tensor, nn

from quantkit.formats.int_group import IntGroupWeight
from quantkit.kernels import int_group_layout
from quantkit.kernels.bitpack import pack, unpack
from quantkit.tuning.parts.base import Coded, Scaled, storable


class TunableIntegers(Coded):
    """int_group: scales and zeros are continuous, a unit is a weight."""

    codes: Tensor  # int16 [out_features, in_features]

    def __init__(self, weight: IntGroupWeight) -> None:
        super().__init__()
        self.bits = weight.bits
        self._bits, self._group_size, self._shape = weight.bits, weight.group_size, weight.shape
        self.register_buffer("codes", unpack(weight.codes, weight.bits, weight.in_features).to(torch.int16))
        self.scales = Scaled(weight.scales, each=True)
        own = weight.zero == int_group_layout.STORED and weight.zeros is not None
        self.zeros = nn.Parameter(weight.zeros.detach().float()) if own else None  # type: ignore[union-attr]
        self._one = None if own else weight.zeros
        self._zeros_dtype = int_group_layout.zeros_dtype(weight.zeros)

    def _wide(self, groups: Tensor) -> Tensor:
        """[groups, out_features] for every weight."""
        return groups.T.repeat_interleave(self._group_size, dim=1)[:, : self._shape[1]]

    def _zero(self) -> Tensor | float:
        if self.zeros is not None:
            return self._wide(self.zeros)
        return int_group_layout.middle(self._bits, int_group_layout.zero_of(self._one))

    def decode(self) -> Tensor:
        """The weight [out_features, in_features]: (code - zero) * scale."""
        return (self.codes.float() - self._zero()) * self._wide(self.scales())

    def units(self, weight: Tensor) -> Tensor:
        """Every weight by itself: [weights, 1]."""
        return weight.reshape(-1, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """round(target / scale + zero) of targets [n, 1], within the grid."""
        scale = self._wide(self.scales()).reshape(-1)[index]
        zero = self._zero()
        zero = zero.reshape(-1)[index] if isinstance(zero, Tensor) else torch.full_like(scale, zero)
        # a scale of 0 divides to NaN, which no code may become: its bits would reach into the neighbours'
        codes = (target[:, 0] / scale + zero).nan_to_num(0).round().clamp_(0, 2**self._bits - 1)
        return codes.to(torch.int16), ((codes - zero) * scale).unsqueeze(1)

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.codes.view(-1)[index] = codes

    @torch.no_grad()
    def packed(self) -> IntGroupWeight:
        """See `Tunable`."""
        zeros = self._one if self.zeros is None else self.zeros.to(self._zeros_dtype)
        codes = pack(self.codes.int(), self._bits)
        return IntGroupWeight(codes, storable(self.scales()), self._bits, self._group_size, self._shape[1], zeros)
