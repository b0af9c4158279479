"""What the Triton kernels share: words of packed codes -> operands of the tensor core, rounding, and the epilogue.

Codes become operands without leaving their lane: an int32 word holds pairs of codes whose halves lie 16 bits apart
(`bitpack`), so that one mask and one OR with 0x4300 (bf16; 0x6400 in fp16) give two floats of 128 + code (1024 + code).
"""

import triton
import triton.language as tl

from quantkit.kernels import bitpack

_tail_words = triton.constexpr_function(bitpack.tail_words_per_lane)


@triton.jit
def rotate_right(words, BY: tl.constexpr):
    """int32 words rotated by BY bits."""
    unsigned = words.to(tl.uint32, bitcast=True)
    return ((unsigned >> BY) | (unsigned << (32 - BY))).to(tl.int32, bitcast=True)


@triton.jit
def mask_or(words, MASK: tl.constexpr, other, ASM: tl.constexpr):
    """(words & MASK) | other: one instruction, which ptxas does not find by itself when both operands are constant."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, MASK, other], dtype=tl.int32, is_pure=True, pack=1
        )
    return (words & MASK) | other


@triton.jit
def spread(words, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Words [BLOCK_N, 4 * WIDTH] of one tile and plane -> [BLOCK_N, lane, o3, o2, o1, o0], the field of octet
    o = 8 o3 + 4 o2 + 2 o1 + o0 rotated to the lowest bits of each half."""
    if WIDTH == 16:
        words = tl.reshape(words, (BLOCK_N, 4, 2, 2, 2, 2))
    else:
        words = spread_two(words, BLOCK_N, WIDTH)
        words = tl.join(words, rotate_right(words, WIDTH))
    return words


@triton.jit
def spread_two(words, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """As `spread`, [BLOCK_N, lane, o3, o2, o1]: the fields of octets 2 i, low, and 2 i + 1 stand side by side."""
    if WIDTH == 8:
        words = tl.reshape(words, (BLOCK_N, 4, 2, 2, 2))
    if WIDTH == 4:
        words = tl.reshape(words, (BLOCK_N, 4, 2, 2))
    if WIDTH == 2:
        words = tl.reshape(words, (BLOCK_N, 4, 2))
    if WIDTH == 1:
        words = tl.join(words, rotate_right(words, 8 * WIDTH))
    if WIDTH <= 2:
        words = tl.join(words, rotate_right(words, 4 * WIDTH))
    if WIDTH <= 4:
        words = tl.join(words, rotate_right(words, 2 * WIDTH))
    return words


@triton.jit
def or_plane(tile_ptr, pairs, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """ORs a plane's fields, moved up by SHIFT bits, into `pairs`; tile_ptr [BLOCK_N, 1] points at a tile's words."""
    words = tl.load(tile_ptr + tl.arange(0, 4 * WIDTH)[None, :])
    if SHIFT > 0:
        words = rotate_right(words, 32 - SHIFT)
    FIELD: tl.constexpr = ((1 << WIDTH) - 1) << SHIFT
    return mask_or(spread(words, BLOCK_N, WIDTH), FIELD | (FIELD << 16), pairs, ASM)


@triton.jit
def pairs_of_codes(row_ptr, tile, full_tiles, start, BITS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    """A full tile's codes ORed into the halves of `start`, int32 [BLOCK_N, lane, o3, o2, o1, o0].

    row_ptr [BLOCK_N, 1] points at the rows' words. Codes of 16 bits leave no room for a `start` but 0.
    """
    pairs = start
    if BITS & 16:
        pairs = tl.reshape(tl.load(row_ptr + tile * 64 + tl.arange(0, 64)[None, :]), (BLOCK_N, 4, 2, 2, 2, 2))
    if BITS & 8:
        pairs = or_plane(row_ptr + tile * 32, pairs, BLOCK_N, 8, 0, ASM)
        row_ptr += full_tiles * 32
    if BITS & 4:
        pairs = or_plane(row_ptr + tile * 16, pairs, BLOCK_N, 4, BITS & 8, ASM)
        row_ptr += full_tiles * 16
    if BITS & 2:
        pairs = or_plane(row_ptr + tile * 8, pairs, BLOCK_N, 2, BITS & 12, ASM)
        row_ptr += full_tiles * 8
    if BITS & 1:
        pairs = or_plane(row_ptr + tile * 4, pairs, BLOCK_N, 1, BITS & 14, ASM)
    return pairs


@triton.jit
def _eight(s0, s1, s2, s3, s4, s5, s6, s7):
    """Tensors of octets 4 o2 + 2 o1 + o0, each [rows, lane] -> [rows, lane, o2, o1, o0]."""
    even = tl.join(tl.join(s0, s4), tl.join(s2, s6))
    return tl.join(even, tl.join(tl.join(s1, s5), tl.join(s3, s7)))


@triton.jit
def halves_of_three(tile_ptr, start, ASM: tl.constexpr):
    """A tile of 3-bit codes as `int_group_layout` has them, ORed into the halves of `start`: both [rows, lane, o2, o1,
    o0], of octets 0 to 7 in bits 0 to 2, and of octets 8 to 15 in bits 3 to 5. tile_ptr [rows, 1]: the first words."""
    LOW: tl.constexpr = 0x00070007
    HIGH: tl.constexpr = 0x00380038
    lane = tl.arange(0, 4)[None, :]
    a, b, c = tl.load(tile_ptr + lane), tl.load(tile_ptr + 256 + lane), tl.load(tile_ptr + 512 + lane)
    a6, b6, c6 = a >> 6, b >> 6, c >> 6
    a12 = a >> 12
    first = _eight(
        mask_or(a, LOW, start, ASM), mask_or(a6, LOW, start, ASM), mask_or(a12, LOW, start, ASM),
        mask_or(b, LOW, start, ASM), mask_or(b6, LOW, start, ASM), mask_or(b >> 12, LOW, start, ASM),
        mask_or(c, LOW, start, ASM), mask_or(c6, LOW, start, ASM),
    )  # fmt: skip
    last = mask_or(b >> 11, 0x00100010, mask_or(a12, 0x00080008, start, ASM), ASM)
    second = _eight(
        mask_or(a, HIGH, start, ASM), mask_or(a6, HIGH, start, ASM),
        mask_or(b, HIGH, start, ASM), mask_or(b6, HIGH, start, ASM),
        mask_or(c, HIGH, start, ASM), mask_or(c6, HIGH, start, ASM),
        mask_or(c >> 9, HIGH, start, ASM), mask_or(c >> 10, 0x00200020, last, ASM),
    )  # fmt: skip
    return first, second


@triton.jit
def operand(pairs, dtype: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs [BLOCK_N, lane, o3, o2, o1, o0] -> floats [BLOCK_N, 128], columns as `column_order` gives them."""
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return in_columns(low, high, BLOCK_N, PAIRS)


@triton.jit
def half_operand(pairs, dtype: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """As `operand`, of half a tile: pairs [BLOCK_N, lane, o2, o1, o0] -> [BLOCK_N, 64]."""
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    values = tl.join(low, high)
    if PAIRS == 4:
        values = tl.permute(values, (0, 2, 3, 1, 4, 5))
    else:
        values = tl.permute(values, (0, 2, 3, 4, 1, 5))
    return tl.reshape(values, (BLOCK_N, 64))


@triton.jit
def in_columns(low, high, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr):
    """The two members of each pair, both [BLOCK_N, lane, o3, o2, o1, o0] -> [BLOCK_N, 128], as `column_order`."""
    values = tl.join(low, high)
    if PAIRS == 4:
        values = tl.permute(values, (0, 2, 3, 4, 1, 5, 6))
    else:
        values = tl.permute(values, (0, 2, 3, 4, 5, 1, 6))
    return tl.reshape(values, (BLOCK_N, 128))


@triton.jit
def column_order(PAIRS: tl.constexpr, WIDTH: tl.constexpr = 128):
    """The column of a tile at each of its places: fragments of mma.sync want 4 neighbours a lane, wgmma's 2."""
    place = tl.arange(0, WIDTH)
    if PAIRS == 4:
        columns = place // 16 * 16 + place // 2 % 2 * 8 + place % 16 // 4 * 2 + place % 2
        return tl.max_contiguous(tl.multiple_of(columns, 2), 2)
    return place


@triton.jit
def row_order(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """The row of a program at each of its places: a lane of mma.sync or wgmma gets BLOCK_N / (8 * WARPS) neighbours."""
    place = tl.arange(0, BLOCK_N)
    lane = place // 16 % WARPS * 8 + place % 8
    return lane * (BLOCK_N // (8 * WARPS)) + place // (16 * WARPS) * 2 + place // 8 % 2


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """a @ b + accumulator, in fp32 throughout where UPCAST."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator)


@triton.jit
def round_to(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 -> dtype, to nearest; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def finish(
    accumulator, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, INTERPRETED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The epilogue: + up @ inner^T, + bias, rounded and stored. accumulator [n, m]; up [N, rank]; inner [M, rank]."""
    in_n, in_m = rows_n < N, rows_m < M
    if BLOCK_R > 0:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            in_r = r < rank
            up = tl.load(up_ptr + rows_n[:, None] * rank + r[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
            inner = tl.load(
                inner_ptr + rows_m[None, :] * rank + r[:, None], mask=in_m[None, :] & in_r[:, None], other=0.0
            )
            accumulator = dot(up, inner, accumulator, UPCAST)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + rows_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    y = round_to(accumulator, y_ptr.dtype.element_ty, INTERPRETED)
    tl.store(y_ptr + rows_m[None, :] * N + rows_n[:, None], y, mask=in_n[:, None] & in_m[None, :])


@triton.jit
def ragged_plane(row_ptr, k, in_k, tile, full_tiles, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    """Fields int32 [rows, columns] of a plane at the columns k of any tile; a short, last one has TAIL words a lane."""
    per_half: tl.constexpr = 16 // WIDTH
    octet = k // 8
    stride = tl.where(tile < full_tiles, WIDTH, TAIL)
    word = tile * 4 * WIDTH + (k % 8 // 2) * stride + octet // per_half
    words = tl.load(row_ptr + word[None, :], mask=in_k[None, :], other=0)
    bit = WIDTH * (octet % per_half) + 16 * (k % 2)
    return (words >> bit[None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def ragged_codes(row_ptr, k, tile, K, BITS: tl.constexpr, TAIL: tl.constexpr):
    """Codes int32 [rows, columns] at the columns k [columns] of any tile, each read by itself; 0 beyond the K-th.

    row_ptr [rows, 1] points at the rows' words; TAIL = K % 128 columns are in a short tile.
    """
    full_tiles = K // 128
    in_k = tile * 128 + k < K
    codes = tl.zeros((row_ptr.shape[0], k.shape[0]), dtype=tl.int32)
    if BITS & 16:
        codes |= ragged_plane(row_ptr, k, in_k, tile, full_tiles, _tail_words(TAIL, 16), 16)
    if BITS & 8:
        codes |= ragged_plane(row_ptr, k, in_k, tile, full_tiles, _tail_words(TAIL, 8), 8)
        row_ptr += 4 * (full_tiles * 8 + _tail_words(TAIL, 8))
    if BITS & 4:
        codes |= ragged_plane(row_ptr, k, in_k, tile, full_tiles, _tail_words(TAIL, 4), 4) << (BITS & 8)
        row_ptr += 4 * (full_tiles * 4 + _tail_words(TAIL, 4))
    if BITS & 2:
        codes |= ragged_plane(row_ptr, k, in_k, tile, full_tiles, _tail_words(TAIL, 2), 2) << (BITS & 12)
        row_ptr += 4 * (full_tiles * 2 + _tail_words(TAIL, 2))
    if BITS & 1:
        codes |= ragged_plane(row_ptr, k, in_k, tile, full_tiles, _tail_words(TAIL, 1), 1) << (BITS & 14)
    return codes


@triton.jit
def share_places(exist, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the sums of a share lie; where only some rows of x exist, all sums of a row lie together."""
    n, m = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :]
    return n * BLOCK_M + m if exist is None else m * BLOCK_N + n


@triton.jit
def leave_share(
    accumulator, partial_ptr, arrived_ptr, where, share,
    SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, exist=None,
):  # fmt: skip
    """Stores a share's partial sums of block `where`, and says whether other shares are still to come.

    exist [1, BLOCK_M]: only these rows of x are stored.
    """
    place = share_places(exist, BLOCK_N, BLOCK_M)
    partial_ptr += (where.to(tl.int64) * SPLIT_K + share) * (BLOCK_N * BLOCK_M)
    tl.store(partial_ptr + place, accumulator, mask=exist)
    tl.debug_barrier()  # all of this share is written before it is counted
    return tl.atomic_add(arrived_ptr + where, 1, sem="acq_rel") != SPLIT_K - 1


@triton.jit
def sum_of_shares(
    partial_ptr, arrived_ptr, where, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, exist=None
):  # fmt: skip
    """The shares of block `where` added in order, fp32 [BLOCK_N, BLOCK_M]; for the program that came last.

    exist [1, BLOCK_M]: only these rows of x are read, as they were stored; others are 0.
    """
    tl.store(arrived_ptr + where, 0)  # ready for the next launch
    place = share_places(exist, BLOCK_N, BLOCK_M)
    partial_ptr += where.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + place
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    other_value = None if exist is None else 0.0
    for other in range(SPLIT_K):
        part_ptr = partial_ptr + other * (BLOCK_N * BLOCK_M)
        total += tl.load(part_ptr, mask=exist, other=other_value, cache_modifier=".cg")
    return total


@triton.jit
def chosen_expert(chosen_ptr, experts):
    """(a program's pair, its expert); numbers beyond the last stand for no expert, and nobody reads their outputs."""
    pair = tl.program_id(1)
    return pair, tl.minimum(tl.maximum(tl.load(chosen_ptr + pair), 0), experts - 1)
