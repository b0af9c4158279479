"""Random-sign Hadamard rotation of the last dimension: R x = B diag(signs) x, and its inverse.

B is orthogonal: block-diagonal with equal blocks (C kron S) / sqrt(size), S a Sylvester matrix (a power of two) and C
a Hadamard matrix of another order (12, 20, 28, ...) by one of Paley's constructions (On orthogonal matrices, 1933). For
n = 2^a * m with m odd the largest block that a known C allows is taken:

    m = 1                                  one block, S of order n                      4096
    C of order 4m is known and 4 divides n one block, C of order 4m, S of order n / 4m  14336 = 28 * 512
    otherwise                              m blocks, S of order 2^a                     11008 = 43 blocks of 256

Signs are stored as bits, feature i in bit i % 8 of byte i // 8.

Bytes moved on a GPU, by `hadamard_triton.py` in one launch: 2 * n in, 2 * n out (16 bits) and n / 8 of signs a row. A
program makes some rows of a block's result, seen as a matrix [order of C, order of S], from all of the block:

    one block    16 rows and a share of their columns: a decode step's row has several multiprocessors' hands
    few blocks   16 rows, by as many warps as help
    many         as many rows as registers hold: all of them up to 16384 features, but where C is of an order above 64

Results in fp16 and bf16 are rounded once.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.kernels import cpu, launching, plans, self_check
from quantkit.kernels.caching import kept

LARGEST_CORE = 256
"""The largest order of C that is used: C costs a dense product."""
LARGEST_BLOCK = 2**17
"""The largest block that the kernel takes: each of its programs reads all of it."""
FEW = 256
"""Programs up to which blocks count as few: a model's guess, about two for each multiprocessor."""
COMPILED = "quantkit.kernels.hadamard_numba"
LONE = 16
"""Programs up to which the rows of a block's result are cut further, into shares of their columns."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Factors(NamedTuple):
    """n = blocks * core * power; `core` is the order of C (1 for none), `power` that of S."""

    blocks: int
    core: int
    power: int

    @property
    def size(self) -> int:
        """Features of a block."""
        return self.core * self.power


@lru_cache
def factors(n: int) -> Factors:
    """How a dimension of n features is rotated."""
    power = n & -n
    odd = n // power
    if odd == 1:
        return Factors(1, 1, power)
    if power >= 4 and 4 * odd <= LARGEST_CORE and construction(4 * odd) is not None:
        return Factors(1, 4 * odd, power // 4)
    return Factors(odd, 1, power)


class Paley(NamedTuple):
    """A construction of a Hadamard matrix from GF(q).

    Attributes:
        q: a prime, or the square of one. The order is q + 1 and q = 3 mod 4 (I), or 2 (q + 1) and q = 1 mod 4 (II).
        root: the prime that q is, or is the square of. Element e stands for e // root + e % root * r, r^2 no square.
        negative: bit e is set where element e is no square, so that its quadratic character is -1.
    """

    q: int
    root: int
    negative: int


@lru_cache
def construction(order: int) -> Paley | None:
    """Paley's construction for an order; None where there is none."""
    if order < 4 or order % 4:
        return None
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        root = math.isqrt(q) if math.isqrt(q) ** 2 == q else q
        prime = root > 1 and all(root % d for d in range(2, math.isqrt(root) + 1))
        if q % 4 == remainder and prime:
            return Paley(q, root, sum(1 << element for element in range(1, q) if not _square(element, q, root)))
    return None


def _square(element: int, q: int, root: int) -> bool:
    """Whether an element of GF(q) is a square: a + b r in GF(p^2) is one where its norm a^2 - r^2 b^2 is in GF(p)."""
    squares = {i * i % root for i in range(1, root)}
    if root == q:
        return element in squares
    a, b = divmod(element, root)
    other = next(i for i in range(2, root) if i not in squares)
    return (a * a - other * b * b) % root in squares


@kept
def paley(order: int) -> Tensor | None:
    """A Hadamard matrix (fp32, entries +-1) by one of Paley's constructions; None where they give none.

    With Q the quadratic characters of all differences in GF(q), bordered by a row and a column of ones (of which the
    column is -1 in I), and 0 on the diagonal: Q + 1 (I), or Q kron [[1, 1], [1, -1]] + 1 kron [[1, -1], [-1, -1]] (II).
    """
    known = construction(order)
    if known is None:
        return None
    q, root, negative = known
    characters = torch.tensor([0.0] + [-1.0 if negative >> element & 1 else 1.0 for element in range(1, q)])
    high, low = torch.arange(q) // root, torch.arange(q) % root
    difference = (high[:, None] - high) % root * root + (low[:, None] - low) % root
    matrix = torch.nn.functional.pad(characters[difference], (1, 0, 1, 0), value=1.0)
    matrix[0, 0] = 0.0
    if order == q + 1:
        matrix[1:, 0] = -1.0
        return matrix + torch.eye(order)
    ones, turned = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(matrix, ones) + torch.kron(torch.eye(q + 1), turned)


@kept
def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def random_signs(n: int, seed: int) -> Tensor:
    """uint8 [ceil(n / 8)] random bits, the same for equal (n, seed) wherever they are drawn."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
    return pack_signs(torch.randint(0, 2, (n,), generator=generator) * 2 - 1)


def pack_signs(signs: Tensor) -> Tensor:
    """+-1 [n] -> uint8 [ceil(n / 8)]; a set bit stands for -1."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.uint8), (0, -len(signs) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_signs`: +-1 [n]."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return 1 - 2 * bits.flatten()[:n].to(dtype)


def reference(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """The specification, on any device: R x, or R^T x, over the last dimension.

    Sylvester matrices of order 16 at a time: a product with one costs less than four passes over memory.

    Args:
        x: float [..., n]; fp16 and bf16 are computed in fp32.
        signs: uint8 [ceil(n / 8)].
        inverse: R^T instead of R.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: see `check`.
    """
    check(x, signs)
    n = x.shape[-1]
    _, core, power = factors(n)
    y = x.reshape(-1, n).to(x.dtype if x.dtype == torch.float64 else torch.float32).contiguous()
    scaled_signs = unpack_signs(signs, n, y.dtype) * (core * power) ** -0.5
    if not inverse:
        y = y * scaled_signs
    done = 1
    while done < power:
        order = min(16, power // done)
        matrix = _sylvester(order).to(y)
        y = y.reshape(-1, order) @ matrix if done == 1 else matrix @ y.reshape(-1, order, done)
        done *= order
    if core > 1:
        known = paley(core)
        assert known is not None
        y = (known.T if inverse else known).to(y) @ y.reshape(-1, core, power)
    y = y.reshape(-1, n)
    return (y * scaled_signs if inverse else y).to(x.dtype).view(x.shape)


class Sizes(NamedTuple):
    """Sizes of one launch.

    Attributes:
        inner: columns of a block's result a program.
        block_v: blocks a program.
        block_g: rows of their results a program.
        block_k: rows of x that are multiplied by C at a time.
        num_warps: Triton's.
        together: parts of x, as long as `inner`, that are read at a time where that is less than a row of a block.
    """

    inner: int
    block_v: int
    block_g: int
    block_k: int
    num_warps: int
    together: int = 1

    def programs(self, rows: int, n: int) -> int:
        """How many the launch has for `rows` rows of n features."""
        blocks, core, power = factors(n)
        return -(-rows * blocks // self.block_v) * -(-core // self.block_g) * (power // self.inner)


@lru_cache(maxsize=4096)  # asked at every launch
def sizes(rows: int, n: int, dtype: torch.dtype) -> Sizes:
    """Sizes for a launch, the same for every GPU since sm_80: no register is spilled, less than 99 KiB are shared."""
    _, core, power = factors(n)
    if core == 1:
        inner, most_rows, block_k = min(power, 16384), 1, 1
    else:
        inner = min(power, 1024 if power <= 1024 or core <= 16 else 512)
        most_rows = max(16, min(64, 1 << (core - 1).bit_length(), 16384 // inner))
        block_k = 16 if core <= 16 or dtype == torch.float32 else 32

    def tiled(block_g: int, fewest: int, each: int, warps: tuple[int, int]) -> Sizes:
        """At least `fewest` elements a program, as many as `each` a lane."""
        block_v = max(1, fewest // (inner * block_g))
        elements = inner * block_v * max(block_g, block_k)
        return Sizes(inner, block_v, block_g, block_k, min(max(elements // (32 * each), warps[0]), warps[1]))

    few = tiled(min(most_rows, 16), 256, 8, (1, 16))
    if few.programs(rows, n) <= LONE and core <= 64 and power >= (2048 if core == 1 else 128):
        # all programs read all of a block, so that shares cost reads: four of them, more of long blocks
        inner = max(1024, power // 16) if core == 1 else max(64, min(128, power // 4))
        warps = inner // 256 if core == 1 else 8
        return few._replace(
            inner=inner, num_warps=min(warps, 16), together=min(power, 8192 if core == 1 else 512) // inner
        )
    return few if few.programs(rows, n) <= FEW else tiled(most_rows, 4096, 64, (4, 8))


def constants(n: int, inverse: bool, chosen: Sizes) -> dict[str, Any]:
    """The compile-time arguments of `rotate_kernel`, all but INTERPRETED."""
    blocks, core, power = factors(n)
    q, root, negative = construction(core) or (1, 1, 0)
    return {
        "BLOCKS": blocks, "CORE": core, "Q": q, "ROOT": root, "NEGATIVE": negative,
        "SPLIT": power // chosen.inner, "STAGES": chosen.inner.bit_length() - 1, "SCALE": (core * power) ** -0.5,
        "INVERSE": inverse, "BLOCK_V": chosen.block_v, "BLOCK_G": chosen.block_g, "BLOCK_K": chosen.block_k,
        "TOGETHER": chosen.together,
    }  # fmt: skip


def launch(x: Tensor, signs: Tensor, inverse: bool = False, chosen: Sizes | None = None) -> Tensor:
    """Runs the Triton kernel; arguments and result [..., n] as in `reference`.

    That takes what the kernel does not: fp64, and blocks of more than LARGEST_BLOCK.

    Args:
        chosen: sizes instead of those of `sizes`.
    """
    check(x, signs)
    n = x.shape[-1]
    vectors = x.numel() // n * factors(n).blocks
    if x.dtype == torch.float64 or factors(n).size > LARGEST_BLOCK or vectors > 2**30:  # counted in 32 bits
        return reference(x, signs, inverse)
    y = plans.result(x.shape, x)
    if not vectors:
        return y
    rows = launching.rows_of(x)
    from quantkit.kernels.hadamard_triton import rotate_kernel  # Triton exists on Linux alone

    chosen = chosen or sizes(len(rows), n, x.dtype)
    with torch.cuda.device_of(x):
        plans.start(
            rotate_kernel, (chosen.programs(len(rows), n),),
            rows, signs, y, vectors, rows.stride(0), **constants(n, inverse, chosen),
            INTERPRETED=not x.is_cuda,  # a tensor in the CPU's memory means Triton's interpreter, whose bf16 is wrong
            **launching.dependent(x), num_warps=chosen.num_warps, num_stages=1,
        )  # fmt: skip
    return y


def check(x: Tensor, signs: Tensor) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    `reference` has the shapes and dtypes that are right, x [..., n] and signs [ceil(n / 8)].
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; a rotation takes float16, bfloat16, float32 or float64")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {tuple(x.shape)}; a rotation takes [..., n] with at least one feature")
    size = -(-x.shape[-1] // 8)
    if signs.dtype != torch.uint8 or tuple(signs.shape) != (size,) or not signs.is_contiguous():
        raise ValueError(
            f"signs are {signs.dtype} {tuple(signs.shape)}; {x.shape[-1]} features take contiguous uint8 [{size}]"
        )
    if signs.device != x.device:
        raise ValueError(f"x is on {x.device} and signs on {signs.device}; they must be in one place")


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")
_LIBRARY.define("rotate(Tensor x, Tensor signs, bool inverse) -> Tensor")


def _fake(x, signs, inverse):
    return x.new_empty(x.shape)


def _on_cpu(x, signs, inverse):
    if x.dim() and cpu.takes(COMPILED, x) and x.numel() // x.shape[-1] <= cpu.compiled(COMPILED).FEW:
        check(x, signs)
        rotated = cpu.compiled(COMPILED).rotate(x.reshape(-1, x.shape[-1]).float(), signs, inverse)
        return rotated.to(x.dtype).view(x.shape)
    return launching.in_own_types(reference, x, signs, inverse)


def _on_gpu(x, signs, inverse):
    check(x, signs)  # either may be elsewhere
    # The kernel's shared memory and instructions are those of sm_80 and newer.
    fit = launching.properties(x.device)[0] >= 80 and self_check.trusted("rotate", x.device)
    return launching.in_own_types(launch if fit else reference, x, signs, inverse)


def _remember(ctx, inputs, output):
    _, signs, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _backward(ctx, grad):
    """R is orthogonal: the gradient is rotated back."""
    (signs,) = ctx.saved_tensors
    return rotate(grad, signs, not ctx.inverse), None, None


torch.library.register_fake("quantkit::rotate", _fake, lib=_LIBRARY)
_LIBRARY.impl("rotate", _on_cpu, "CompositeExplicitAutograd")
_LIBRARY.impl("rotate", _on_gpu, "CUDA")
launching.ON_GPU["rotate"] = _on_gpu
torch.library.register_autograd("quantkit::rotate", _backward, setup_context=_remember, lib=_LIBRARY)


def rotate(x: Tensor, signs: Tensor, inverse: bool = False) -> Tensor:
    """See `reference`, [..., n] -> [..., n]; by the kernel on a GPU."""
    return torch.ops.quantkit.rotate.default(x, signs, inverse)
