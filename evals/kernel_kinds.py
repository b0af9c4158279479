"""Random packed layers of every kernel that multiplies, to be compared with their specification and to be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.pyramid import PyramidWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import launching, pyramid_matmul
from quantkit.kernels.bitpack import pack, row_words
from quantkit.kernels.pyramid import count, index_bits
from quantkit.kernels.trellis import ring_length
from quantkit.models.linear import QuantizedLinear


@dataclass(frozen=True)
class Layer:
    """A packed layer, ready to run.

    Attributes:
        linear: x [..., K] -> [..., N], as a model calls it.
        matmul: (x, bias, up, down) -> [..., N].
        dequantize: the weight in fp32 [N, K], by the specification.
        nbytes: of the weight as a product reads it.
    """

    linear: Callable[[Tensor], Tensor]
    matmul: Callable[..., Tensor]
    dequantize: Callable[[], Tensor]
    nbytes: int


@dataclass(frozen=True)
class Kind:
    """A kernel and a form of its weight.

    Attributes:
        name: of it, in a table.
        make: (N, K, device) -> layer, of torch's random numbers.
        family: of kernels that it belongs to.
        bits: of a weight, by which other libraries' layers are made that do the same; 0 for none.
    """

    name: str
    make: Callable[[int, int, torch.device], Layer]
    family: str
    bits: int = 0

    def layer(self, N: int, K: int, device: torch.device, seed: int = 0) -> Layer:
        """A random layer; K is a multiple of 128, or the weight is random in its padding too."""
        torch.manual_seed(seed)
        return self.make(N, K, device)


def of_weight(weight: QuantizedWeight, device: torch.device, stored: bool = False) -> Layer:
    """A layer as a model has it: in a module, brought by the move to its device into the form that products take there.

    Args:
        stored: `matmul` takes the checkpoint's form instead, as fused layers do that do not divide.
    """
    linear = QuantizedLinear(weight).to(device)
    used = linear.packed if stored else linear.used
    return Layer(linear, used.matmul, weight.dequantize, used.nbytes)


def integers(bits: int, group_size: int = 128, zeros: bool = False, stored: bool = False) -> Kind:
    """Integer weights; stored: see `of_weight`."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of random codes, with scales that keep its weights about 1."""
        groups = -(-K // group_size)
        scales = (0.5 + torch.rand(groups, N, device=device)).half() / 2**bits
        offsets = (2**bits * torch.rand(groups, N, device=device)).half() if zeros else None
        words = _words(N, row_words(K, bits), device)
        return of_weight(IntGroupWeight(words, scales, bits, group_size, K, offsets), device, stored)

    name = f"int{bits} g{group_size}{' zeros' if zeros else ''}{' as stored' if stored else ''}"
    return Kind(name, make, "int", 0 if zeros or group_size != 128 else bits)


def codebooks(v: int, bits: int, residual_bits: int = 0, ranges: int = 1) -> Kind:
    """Vector-quantized weights."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of random codes and codebooks, of one stage or two."""
        parts: list[Any] = []
        for width in (bits, residual_bits):
            book = torch.randn(ranges, 1 << width, v, device=device).half() if width else None
            parts += [_words(-(-N // v), row_words(K, width), device) if width else None, book]
        return of_weight(CodebookWeight(parts[0], parts[1], N, K, parts[2], parts[3]), device)

    more = f"+{residual_bits}" if residual_bits else ""
    return Kind(f"codebook v{v} {bits}{more} bits{f' {ranges} ranges' if ranges > 1 else ''}", make, "codebook")


def pyramids(bits: int, dimension: int) -> Kind:
    """Pyramid weights as `PyramidWeight.prepare` makes them of large groups: integers with a factor a group."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of random codes, whose product with x [..., K] is the operator's."""
        factors = (0.5 + torch.rand(-(-N // dimension), K, device=device)).half() / 2**bits
        words = pack(factors.view(torch.int16).int() & 0xFFFF, 16)
        arguments = _words(N, row_words(K, bits), device), words, bits, dimension
        launching.prepare(device)

        def product(x: Tensor, *extra: Tensor | None) -> Tensor:
            return pyramid_matmul.pyramid_matmul(x, *arguments, *extra)

        exact = partial(pyramid_matmul.dequantized, *arguments, K)
        return Layer(product, product, exact, arguments[0].nbytes + words.nbytes)

    return Kind(f"pyramid D={dimension} as int{bits}", make, "pyramid")


def pyramid_table(pulses: int = 6, gain_bits: int = 1) -> Kind:
    """Pyramid weights of groups of 8, multiplied as a file has them."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of random points and gains, and the tables that the kernel reads."""
        lines = -(-N // 8), K
        fields = torch.randint(0, count(8, pulses), lines, dtype=torch.int32, device=device)
        gain = torch.randint(0, 1 << gain_bits, lines, dtype=torch.int32, device=device)
        scales = (0.5 + torch.rand(K, device=device)).half()
        levels = (0.5 + torch.rand(1 << gain_bits, device=device)).half()
        index = index_bits(8, pulses)
        codes = pack(fields | gain << index, index + gain_bits)
        layer = of_weight(PyramidWeight(codes, scales, levels, 8, pulses, "out", N, K), device)
        tables = pyramid_matmul.lane_order(scales), pyramid_matmul.gain_table(levels)
        points = pyramid_matmul.point_table(pulses, device)
        # the weight's own `dequantize` decodes point by point, which takes seconds
        exact = partial(pyramid_matmul.dequantized_table, codes, *tables, points, index + gain_bits, N, K)
        return Layer(layer.linear, layer.matmul, exact, layer.nbytes)

    return Kind(f"pyramid D=8 K={pulses} table", make, "pyramid")


def trellises(bits: int, state_bits: int = 16) -> Kind:
    """Trellis-coded weights."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of random rings, each of one part."""
        codes = _words(ring_length(N) * bits // 32, K, device)
        steps = torch.randint(200, 256, (1, K), dtype=torch.uint8, device=device)
        scale = torch.full((1,), 0.5, device=device)
        return of_weight(TrellisWeight(codes, steps, scale, bits, state_bits, [N]), device)

    return Kind(f"trellis K={bits}{f' L={state_bits}' if state_bits < 16 else ''}", make, "trellis")


def rotated(kind: Kind) -> Kind:
    """Weights of another kind, given as a QuantizedLinear, with their inputs rotated."""

    def make(N: int, K: int, device: torch.device) -> Layer:
        """A layer of that kind behind a rotation with random signs."""
        base = kind.make(N, K, device).linear
        assert isinstance(base, QuantizedLinear)
        signs = torch.randint(0, 256, (-(-K // 8),), dtype=torch.uint8, device=device)
        return of_weight(RotatedWeight(base.packed, signs), device)

    return Kind(f"rotated {kind.name}", make, "rotation")


def _words(rows: int, words: int, device: torch.device) -> Tensor:
    """Where K is a multiple of 128 every word is a valid one."""
    return torch.randint(-(2**31), 2**31 - 1, (rows, words), dtype=torch.int32, device=device)


TIMED = [
    *[integers(bits) for bits in (4, 2, 3, 8)],
    *[trellises(bits) for bits in (2, 3, 1, 4)],
    *[codebooks(4, 8), codebooks(6, 12), codebooks(8, 8, 8), codebooks(3, 6), codebooks(4, 12), codebooks(8, 16)],
    *[pyramids(4, 32), pyramids(4, 16), pyramid_table()],
    *[rotated(integers(4)), rotated(integers(3)), rotated(trellises(2))],
]
"""What is timed, the most telling of each family first."""
CHECKED = [
    *[(kind, 520, 1024) for kind in TIMED],
    *[(integers(bits, 64, True), 272, 640) for bits in (2, 3, 4, 8)],
    *[(integers(3, 32), 64, 256), (integers(3, 1024, True), 257, 4096)],
    *[(integers(bits, stored=True), 520, 1024) for bits in (2, 3, 4, 8)],
    *[(integers(bits, 64, True, stored=True), 272, 640) for bits in (2, 3, 4, 8)],
    *[
        (pyramids(bits, dimension), 270, 640)
        for bits, dimension in ((2, 32), (3, 16), (5, 9), (6, 6), (7, 32), (8, 64))
    ],
    *[(pyramid_table(4, 2), 77, 640), (codebooks(1, 2), 77, 640), (codebooks(5, 9, 3), 77, 640)],
    *[(trellises(bits), 270, 640) for bits in (1, 3, 5, 6, 7, 8)],
    *[(trellises(3, 12), 77, 1000), (trellises(2, 8), 77, 1000), (trellises(2), 77, 333)],
    *[(codebooks(2, 4, 0, 2), 129, 1024), (codebooks(16, 12, 0, 2), 100, 1024), (codebooks(8, 8, 8, 4), 100, 1024)],
]
"""(kind, N, K) that a deep check compares with fp64."""
