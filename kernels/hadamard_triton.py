"""The Triton kernel behind `hadamard.rotate`; that file has the transform, and the rule for the sizes.

A block of x is a matrix X [order of C, power of two], and Y = scale * C X S.

C X is a product of the tensor core, which is exact for entries +-1 but for the fp32 sums: x in 16 bits as it is, in
fp32 as three bf16 parts. C is made in registers from Paley's formula: nothing but x and signs is read, and nothing has
to be kept on the GPU. Being the left operand with 16 or 32 rows, it takes the same instructions (mma.sync) on every
GPU, but for the orders above 32.

S is applied in log2(power) stages of sums and differences in fp32. A stage takes the lowest bit of the column and makes
it the highest, so that Triton renames registers and moves data between lanes only where the lowest bit is not in a
register: two or three times in all, through shared memory.

The other way, X S as tensor-core products with Sylvester matrices near sqrt(power), was compiled too. For 4096 and
14336 features in bf16 it takes 1.1 and 2.6 times the instructions on sm_80, 1.0 and 2.1 times on sm_90, and up to three
times the registers: its matrices have to be made, and fp32 sums to be split into bf16 parts.
"""

import triton
import triton.language as tl

from quantkit.kernels.tiles import dot, round_to


@triton.jit
def _core(i, j, ORDER: tl.constexpr, Q: tl.constexpr, ROOT: tl.constexpr, NEGATIVE: tl.constexpr):
    """1 where entry (i, j) of `hadamard.paley(ORDER)` is -1, for i and j that broadcast. See `hadamard.Paley`."""
    SECOND: tl.constexpr = ORDER == 2 * (Q + 1)
    row, column = i, j
    if SECOND:
        row, column = i // 2, j // 2
    if ROOT == Q:
        difference = row - column
        difference = tl.where(difference < 0, difference + Q, difference)
    else:
        # rows and columns 0 are the border, whose differences are not used but must not look beyond the table
        a, b = tl.maximum(row - 1, 0), tl.maximum(column - 1, 0)
        high, low = a // ROOT - b // ROOT, a % ROOT - b % ROOT
        difference = tl.where(high < 0, high + ROOT, high) * ROOT + tl.where(low < 0, low + ROOT, low)
    word = tl.full(difference.shape, NEGATIVE & 0xFFFFFFFF, tl.uint32)
    for place in tl.static_range(1, (Q + 31) // 32):
        other = tl.full(difference.shape, (NEGATIVE >> (32 * place)) & 0xFFFFFFFF, tl.uint32)
        word = tl.where(difference >= 32 * place, other, word)
    negative = (word >> (difference & 31).to(tl.uint32)).to(tl.int32) & 1
    in_row, in_column = tl.minimum(row, 1), tl.minimum(column, 1)
    if SECOND:
        return tl.where(row == column, (i | j) & 1, (negative & in_row & in_column) ^ (i & j & 1))
    return in_row & (negative | (1 - in_column))


@triton.jit
def _top(values):
    """fp32 -> its 8 highest bits as bf16, and the rest."""
    bits = values.to(tl.uint32, bitcast=True)
    top = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return top, values - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _flipped(values, signs_ptr, feature, inside, STEP: tl.constexpr):
    """`values` [rows, columns], negated where the sign's bit is set.

    feature, inside: [rows, columns / STEP], of the first of STEP neighbours that share a byte.
    """
    byte = tl.load(signs_ptr + (feature >> 3), mask=inside, other=0).to(tl.uint32)
    WIDTH: tl.constexpr = values.dtype.primitive_bitwidth
    place = (feature & 7)[:, :, None] + tl.arange(0, STEP)[None, None, :]
    minus = (byte[:, :, None] << (WIDTH - 1 - place).to(tl.uint32)) & (1 << (WIDTH - 1))
    minus = tl.reshape(minus, values.shape)
    if WIDTH == 16:
        minus = minus.to(tl.uint16)
    return (values.to(minus.dtype, bitcast=True) ^ minus).to(values.dtype, bitcast=True)


@triton.jit
def _sylvester(values, STAGES: tl.constexpr):
    """values [2^STAGES, rows] times a Sylvester matrix: each stage takes the lowest bit of the column for a sum and a
    difference, and makes it the highest."""
    COLUMNS: tl.constexpr = values.shape[0]
    ROWS: tl.constexpr = values.shape[1]
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.permute(tl.reshape(values, (COLUMNS // 2, 2, ROWS)), (0, 2, 1)))
        values = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (2, 0, 1)), (COLUMNS, ROWS))
    return values


@triton.jit
def _negative(share, other):
    """1 where a Sylvester matrix has -1: where a row and a column have an odd number of bits in common."""
    common = share & other
    common ^= common >> 8
    return (0x6996 >> ((common ^ (common >> 4)) & 15)) & 1


@triton.jit
def _one_share(values, share, start, BLOCK_V: tl.constexpr, TOGETHER: tl.constexpr):
    """values [rows, vectors * TOGETHER * inner] -> a share [rows, vectors * inner] of their sums and differences, those
    of the parts from `start` on."""
    ROWS: tl.constexpr = values.shape[0]
    INNER: tl.constexpr = values.shape[1] // (BLOCK_V * TOGETHER)
    minus = _negative(share, start + tl.arange(0, TOGETHER))
    factor = tl.where(minus != 0, -1.0, 1.0)[None, None, :, None]
    values = tl.sum(tl.reshape(values, (ROWS, BLOCK_V, TOGETHER, INNER)) * factor, 2)
    return tl.reshape(values, (ROWS, BLOCK_V * INNER))


@triton.jit(do_not_specialize=["vectors"])  # one binary for any number of rows
def rotate_kernel(
    x_ptr, signs_ptr, y_ptr, vectors, stride_x,
    BLOCKS: tl.constexpr, CORE: tl.constexpr, Q: tl.constexpr, ROOT: tl.constexpr, NEGATIVE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_G rows of the results of BLOCK_V blocks of x ("vectors"), side by side, and of each 2^STAGES columns.

    Those are one of SPLIT shares, which first adds and subtracts all of x's, as S of order SPLIT does: S is that kron S
    of order 2^STAGES. TOGETHER of the shares of x are read at a time.
    INVERSE: C is transposed, and signs are applied at the end instead of at the start.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    narrow: tl.constexpr = tl.bfloat16 if dtype == tl.float32 else dtype
    INNER: tl.constexpr = 2**STAGES
    POWER: tl.constexpr = INNER * SPLIT
    SIZE: tl.constexpr = CORE * POWER
    READ: tl.constexpr = TOGETHER * INNER
    STEP: tl.constexpr = 8 if INNER >= 8 else INNER
    TILES: tl.constexpr = (CORE + BLOCK_G - 1) // BLOCK_G
    program = tl.program_id(0)
    share, tile, first = program % SPLIT, program // SPLIT % TILES, program // (SPLIT * TILES) * BLOCK_V
    column = tl.arange(0, BLOCK_V * READ)
    vector = first + column // READ
    in_x = (vector < vectors)[None, :]
    x_ptr += (vector // BLOCKS).to(tl.int64) * stride_x + vector % BLOCKS * SIZE + column % READ
    byte = tl.arange(0, BLOCK_V * READ // STEP) * STEP
    in_signs = (first + byte // READ < vectors)[None, :]
    feature = ((first + byte // READ) % BLOCKS * SIZE + byte % READ)[None, :]
    row = tile * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    values = tl.zeros((BLOCK_G, BLOCK_V * INNER), dtype=tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # a product waits for y itself, and reads its weight till then
    for other in range(0, SPLIT, TOGETHER):
        turned = 0 if TOGETHER > 1 else _negative(share, other)
        sums = tl.zeros((BLOCK_G, BLOCK_V * READ), dtype=tl.float32) if TOGETHER > 1 else values
        for start in range(0, CORE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at, in_k = k[:, None] * POWER + other * INNER, (k < CORE)[:, None]
            x = tl.load(x_ptr[None, :] + at, mask=in_k & in_x, other=0.0)
            if not INVERSE:
                x = _flipped(x, signs_ptr, feature + at, in_k & in_signs, STEP)
            if CORE == 1:
                sums += tl.where(turned != 0, -1.0, 1.0) * x.to(tl.float32)
            else:
                if INVERSE:
                    minus = turned ^ _core(k[None, :], row, CORE, Q, ROOT, NEGATIVE)
                else:
                    minus = turned ^ _core(row, k[None, :], CORE, Q, ROOT, NEGATIVE)
                matrix = tl.where(minus != 0, -1.0, 1.0).to(narrow)
                if dtype == tl.float32:
                    for _ in tl.static_range(2):
                        top, x = _top(x)
                        sums = dot(matrix, top, sums, INTERPRETED)
                    x = round_to(x, narrow, INTERPRETED)
                sums = dot(matrix, x, sums, INTERPRETED)
        values = values + _one_share(sums, share, other, BLOCK_V, TOGETHER) if TOGETHER > 1 else sums
    # columns first: Triton then keeps their highest bits in registers, where the stages put them
    values = tl.permute(tl.reshape(values, (BLOCK_G, BLOCK_V, INNER)), (2, 0, 1))
    values = _sylvester(tl.reshape(values, (INNER, BLOCK_G * BLOCK_V)), STAGES)
    values = tl.permute(tl.reshape(values, (INNER, BLOCK_G, BLOCK_V)), (1, 2, 0))
    y = round_to(tl.reshape(values, (BLOCK_G, BLOCK_V * INNER)) * SCALE, dtype, INTERPRETED)
    at = row * POWER + share * INNER
    column = tl.arange(0, BLOCK_V * INNER)
    vector = first + column // INNER
    if INVERSE:
        byte = tl.arange(0, BLOCK_V * INNER // STEP) * STEP
        in_signs = (first + byte // INNER < vectors)[None, :]
        feature = ((first + byte // INNER) % BLOCKS * SIZE + byte % INNER)[None, :]
        y = _flipped(y, signs_ptr, feature + at, (row < CORE) & in_signs, STEP)
    y_ptr += vector.to(tl.int64) * SIZE + column % INNER
    tl.store(y_ptr[None, :] + at, y, mask=(row < CORE) & (vector < vectors)[None, :])
