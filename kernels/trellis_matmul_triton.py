"""The Triton kernels behind `trellis_matmul`; that file has the layout, the equation and the regimes.

A word with the two bf16 whose sum is a weight is a register of the tensor core's left operand as it stands: two
neighbouring columns of an operand [rows, 2 * columns], both multiplied by the same number of x. Nothing is added,
converted or packed, and no weight leaves the lane that decoded it.

A lane of mma.sync has a *run* of 16 neighbouring rows in 4 neighbouring columns of each *chunk* of 16 columns: 16 bytes
of each of the few lines of codes that hold the run's windows. They are read straight into registers, in the layout that
is multiplied. The warps of a program share out the columns of a tile, CHUNKS each; their products are a batch, which is
summed at the end. When a chunk has been decoded, its registers are what the same chunk of the next tile is read into,
with its steps and up to 8 rows of x: CHUNKS chunks a warp are on their way at the start, one less ever after.

Staged by cp.async through shared memory instead (four slots a warp, inline assembly, no barrier but a warp's), a weight
took 4.5 instructions where it now takes 4.2: reading the slots and keeping their order cost more than registers do.

x is multiplied by the columns' steps, and then split into bf16 whose sum it is: one of bf16, which is rounded, two of
fp16 and three of fp32.
"""

# Tuples grow by an entry at a time here, which mypy takes for errors.
# mypy: disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl

from quantkit.kernels import trellis
from quantkit.kernels.tiles import chosen_expert, dot, finish, leave_share, mask_or, round_to, row_order, sum_of_shares

_MULTIPLIER, _INCREMENT = tl.constexpr(trellis.MULTIPLIER), tl.constexpr(trellis.INCREMENT)
_MASK, _FLIP = tl.constexpr(trellis.MASK), tl.constexpr(trellis.FLIP)


@triton.constexpr_function
def words_of_run(bits: int, state_bits: int, loaded: bool) -> int:
    """Words that hold the windows of 16 weights: where the first begins with a word, or as they are loaded."""
    start = 16 if loaded and bits % 2 else 0
    return -(-(start + 15 * bits + state_bits) // 32)


@triton.constexpr_function
def run_text(bits: int, state_bits: int) -> str:
    """PTX: $16 and following, the words of a run -> $0 to $15, the pairs of bf16 of its 16 weights.

    A window is moved to the top of a register and shifted down from there. Where two windows of 16 bits fill a
    register, the lower one need not be cut out: its product is that of both less that of the upper one, moved up by 16
    bits. This takes as many instructions, but the GPU multiplies beside shifting, and shifts more.
    """
    multiplier, increment, top = trellis.MULTIPLIER, trellis.INCREMENT, 32 - state_bits
    below = 0  # how many windows a lower one is below that whose register it shares
    if state_bits == 16 and 16 % bits == 0:
        below = 8 if bits == 1 else 16 // bits
    text = ".reg .b32 r, h, t; "
    for n in range(16):
        if below and n // below % 2 == 0:
            continue  # comes with window n + below
        word, shift = bits * n // 32 + 16, bits * n % 32 - top
        if shift > 0:
            text += f"shf.r.wrap.b32 r, ${word}, ${word + 1}, {shift}; "
        elif shift < 0:
            text += f"shl.b32 r, ${word}, {-shift}; "
        register = "r" if shift else f"${word}"
        text += f"shr.u32 h, {register}, {top}; mad.lo.u32 ${n}, h, {multiplier}, {increment}; "
        if below * bits == 16:
            text += f"mad.lo.u32 t, h, {-(multiplier << 16) & 0xFFFFFFFF}, {increment}; "
            text += f"mad.lo.u32 ${n - below}, {register}, {multiplier}, t; "
        elif below:  # it is 8 bits lower
            text += f"prmt.b32 h, {register}, 0, 0x4421; mad.lo.u32 ${n - below}, h, {multiplier}, {increment}; "
    for n in range(16):
        text += f"lop3.b32 ${n}, ${n}, {trellis.MASK}, {trellis.FLIP}, 0x6A; "
    return "{ " + text + "}"


@triton.constexpr_function
def _run_constraints(bits: int, state_bits: int) -> str:
    return ",".join(["=&r"] * 16 + ["r"] * words_of_run(bits, state_bits, False))


@triton.jit
def _aligned(words, middle, BITS: tl.constexpr, STATE_BITS: tl.constexpr, ASM: tl.constexpr):
    """The words of runs from their first bits on; of an odd BITS, runs with `middle` = 16 begin in that of a word."""
    found = ()
    for i in tl.static_range(words_of_run(BITS, STATE_BITS, False)):
        low = words[i]
        if BITS % 2:
            high = words[i + 1]
            if ASM:
                low = tl.inline_asm_elementwise(
                    "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, middle], tl.int32, is_pure=True, pack=1
                )
            else:
                low = tl.where(middle == 0, low, ((low >> 16) & 0xFFFF) | (high << 16))
        found = found + (low,)
    return found


@triton.jit
def _pair(words, FIRST: tl.constexpr, STATE_BITS: tl.constexpr):
    """The pair of bf16 of the window from bit FIRST of the words on."""
    state = words[FIRST // 32].to(tl.uint32, bitcast=True) >> (FIRST % 32)
    if FIRST % 32 + STATE_BITS > 32:
        state |= words[FIRST // 32 + 1].to(tl.uint32, bitcast=True) << (32 - FIRST % 32)
    pair = (state & ((1 << STATE_BITS) - 1)) * _MULTIPLIER + _INCREMENT
    return ((pair & _MASK) ^ _FLIP).to(tl.int32, bitcast=True)


@triton.jit
def _pairs(words, middle, BITS: tl.constexpr, STATE_BITS: tl.constexpr, ASM: tl.constexpr):
    """Words of runs, each [lanes, 4] -> the pairs of bf16 of their weights n, [lanes, 4, n0, n1, n2, n3] by bits."""
    words = _aligned(words, middle, BITS, STATE_BITS, ASM)
    if ASM:
        TEXT: tl.constexpr = run_text(BITS, STATE_BITS)
        HOW: tl.constexpr = _run_constraints(BITS, STATE_BITS)
        found = tl.inline_asm_elementwise(TEXT, HOW, words, dtype=(tl.int32,) * 16, is_pure=True, pack=1)
    else:
        found = ()
        for n in tl.static_range(16):
            found = found + (_pair(words, BITS * n, STATE_BITS),)
    joined = ()
    for i in tl.static_range(0, 16, 4):
        joined = joined + (tl.join(tl.join(found[i], found[i + 1]), tl.join(found[i + 2], found[i + 3])),)
    return tl.join(tl.join(joined[0], joined[1]), tl.join(joined[2], joined[3]))


@triton.jit
def _halves(pairs, UPCAST: tl.constexpr):
    """The two bf16 of each word, as fp32 where UPCAST."""
    if UPCAST:
        low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, high


@triton.jit
def _left(pairs, WARPS: tl.constexpr, TWICE: tl.constexpr, UPCAST: tl.constexpr):
    """Pairs [lanes, 4, n0, n1, n2, n3] -> the operand [warp, 128, 32], rows by `row_order`.

    TWICE: [warp, 128, 64], each pair also at the 2 places behind its own, so that the registers of one instruction are
    those of another.
    """
    low, high = _halves(pairs, UPCAST)
    both = tl.reshape(tl.join(low, high), (WARPS, 8, 4, 2, 2, 2, 2, 2, 2, 2))
    if TWICE:
        both = tl.permute(tl.join(both, both), (0, 8, 7, 6, 5, 1, 4, 3, 2, 10, 9))
    else:
        both = tl.permute(both, (0, 8, 7, 6, 5, 1, 3, 2, 4, 9))
    return tl.reshape(both, (WARPS, 128, 64 if TWICE else 32))


@triton.jit
def _right(part, other, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, TWICE: tl.constexpr):
    """Parts of x [rows / 8 * lanes, 4, 2] -> the operand [warp, 32, rows], of two [warp, 64, rows]."""
    x = tl.reshape(part, (BLOCK_M // 8, WARPS, 8, 4, 2, 2, 2))
    if TWICE:
        x = tl.join(x, tl.reshape(other, (BLOCK_M // 8, WARPS, 8, 4, 2, 2, 2)))
        x = tl.permute(x, (1, 5, 4, 3, 7, 6, 0, 2))
    else:
        x = tl.permute(x, (1, 4, 3, 5, 6, 0, 2))
    return tl.reshape(x, (WARPS, 64 if TWICE else 32, BLOCK_M))


@triton.jit
def _multiplied(
    pairs, parts, accumulator, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """accumulator + the weights of a chunk times all parts of x, two of them in one product."""
    if len(parts) > 1:
        weight, x = _left(pairs, WARPS, True, INTERPRETED), _right(parts[0], parts[1], WARPS, BLOCK_M, True)
        accumulator = dot(weight, x, accumulator, INTERPRETED)
    if len(parts) != 2:
        last: tl.constexpr = len(parts) - 1
        weight, x = _left(pairs, WARPS, False, INTERPRETED), _right(parts[last], None, WARPS, BLOCK_M, False)
        accumulator = dot(weight, x, accumulator, INTERPRETED)
    return accumulator


@triton.constexpr_function
def split_text(parts: int) -> str:
    """PTX: a number of fp32, the last operand -> the bf16s whose sum it is, the largest first, each twice in a word."""
    text = f".reg .f32 f, p; .reg .b32 t; mov.b32 f, ${parts}; "
    for i in range(parts):
        if i:
            text += f"shl.b32 t, ${i - 1}, 16; mov.b32 p, t; sub.f32 f, f, p; "
        text += f"cvt.rn.bf16x2.f32 ${i}, f, f; "
    return "{ " + text + "}"


@triton.jit
def _parts(numbers, PARTS: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 numbers of any shape -> the PARTS bf16s [shape, 2] whose sum it is, each twice; a tuple."""
    found = ()
    if ASM:
        HOW: tl.constexpr = "=r,f" if PARTS == 1 else "=&r,=&r,f" if PARTS == 2 else "=&r,=&r,=&r,f"
        words = tl.inline_asm_elementwise(
            split_text(PARTS), HOW, [numbers], dtype=(tl.int32,) * PARTS, is_pure=True, pack=1
        )
        for i in tl.static_range(PARTS):
            low, high = _halves(words[i], False)
            found = found + (tl.join(low, high),)
    else:
        for _ in tl.static_range(PARTS):
            part = round_to(numbers, tl.bfloat16, INTERPRETED)
            numbers -= part.to(tl.float32)
            found = found + (tl.join(part, part),)
    return found


@triton.jit
def _place(lanes, WARPS: tl.constexpr, CHUNKS: tl.constexpr):
    """Where lanes of mma.sync are, by their numbers in a program: (one of 8 rows, the first of 4 columns of a tile)."""
    return lanes // 4 % 8, lanes // 32 % WARPS * (16 * CHUNKS) + lanes % 4 * 4


@triton.jit
def _part(tile, ENDS: tl.constexpr):
    """(the part that a tile of rows belongs to, its first tile, the tile behind its last or -1 for all that follow)."""
    part, first, behind = tile * 0, tile * 0, tile * 0 - 1
    for i in tl.static_range(len(ENDS)):
        past = tile >= ENDS[i]
        part += past.to(tl.int32)
        first = tl.where(past, ENDS[i], first)
    for i in tl.static_range(len(ENDS)):
        behind = tl.where(part == i, ENDS[i], behind)
    return part, first, behind


@triton.jit
def _line_pointers(
    codes_ptr, row, column, K, lines, first, behind, BITS: tl.constexpr, STATE_BITS: tl.constexpr, ENDS: tl.constexpr
):  # fmt: skip
    """Where the words of lanes' runs begin, around the ends of their part's rings: a tuple of [lanes]."""
    line = ((tl.program_id(0) - first) * 8 + row) * BITS // 2
    if len(ENDS) > 0:
        codes_ptr += first.to(tl.int64) * (4 * BITS) * K
        lines = tl.where(behind < 0, lines, behind * (4 * BITS)) - first * (4 * BITS)
    found = ()
    for i in tl.static_range(words_of_run(BITS, STATE_BITS, True)):
        found = found + (codes_ptr + ((line + i) % lines).to(tl.int64) * K + column,)
    return found


@triton.jit
def _neighbours(n):
    """Four tensors [lanes] -> [lanes, 4]."""
    return tl.reshape(tl.join(tl.join(n[0], n[2]), tl.join(n[1], n[3])), (n[0].shape[0], 4))


@triton.jit
def _load(pointer, at, column, stop, older, WIDE: tl.constexpr, RAGGED: tl.constexpr):
    """Four neighbours from `at` columns behind pointers [lanes] on, [lanes, 4].

    From column `stop` on, where RAGGED, 0. Else whole chunks are inside or not: those that are not are `older`, which
    takes no register of its own; None where all are.

    Not WIDE: one by one, because else they would be read in another layout, and brought here through shared memory.
    """
    if WIDE:
        inside = (at + column < stop)[:, None] if RAGGED else None if older is None else at < stop
        x = tl.load((pointer + at)[:, None] + tl.arange(0, 4)[None, :], mask=inside, other=0 if RAGGED else older)
    else:
        n = ()
        for i in tl.static_range(4):
            n = n + (tl.load(pointer + at + i, mask=at + i + column < stop, other=0),)
        x = _neighbours(n)
    return x


@triton.jit
def _load_x(pointer, at, column, stop, older, WIDE: tl.constexpr, RAGGED: tl.constexpr):
    """As `_load`; where WIDE numbers of 16 bits are words [lanes, 2], whose halves `_numbers` takes without a move."""
    if WIDE and pointer.dtype.scalar.element_ty != tl.float32:
        inside = (at + column < stop)[:, None] if RAGGED else None if older is None else at < stop
        pointers = (pointer + at).to(tl.pointer_type(tl.int32))[:, None] + tl.arange(0, 2)[None, :]
        x = tl.load(pointers, mask=inside, other=0 if RAGGED else older)
    else:
        x = _load(pointer, at, column, stop, older, WIDE, RAGGED)
    return x


@triton.jit
def _numbers(x, dtype: tl.constexpr):
    """What `_load_x` gave -> fp32 [lanes, 4]."""
    if x.dtype == tl.int32:
        if dtype == tl.bfloat16:
            low, high = _halves(x, True)
        else:
            low, high = x.to(tl.int16).to(dtype, bitcast=True), (x >> 16).to(tl.int16).to(dtype, bitcast=True)
        x = tl.reshape(tl.join(low, high), (x.shape[0], 4))
    return x.to(tl.float32)


@triton.jit
def _load_steps(pointer, at, column, stop, older, WIDE: tl.constexpr, RAGGED: tl.constexpr):
    """As `_load`, of uint8: a word [lanes] of four where WIDE."""
    if WIDE:
        inside = at + column < stop if RAGGED else None if older is None else at < stop
        codes = tl.load((pointer + at).to(tl.pointer_type(tl.int32)), mask=inside, other=0 if RAGGED else older)
    else:
        codes = _load(pointer, at, column, stop, None, False, True).to(tl.int32)
    return codes


@triton.jit
def _steps(codes, WIDE: tl.constexpr, ASM: tl.constexpr):
    """What `_load_steps` gave -> fp32 steps [lanes, 4].

    Each code is moved to where a fp32 has its exponent's last bits and its fraction's first.
    """
    if WIDE:
        moved = _neighbours((codes << 19, codes << 11, codes << 3, codes >> 5))
    else:
        moved = codes << 19
    return mask_or(moved, 0xFF << 19, 112 << 23, ASM).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(line_ptrs, at, column, stop, older, WIDE: tl.constexpr, RAGGED: tl.constexpr):
    """The words of the chunk that begins at a column, a tuple of [lanes, 4]; `older` as in `_load`, words or None."""
    found = ()
    for i in tl.static_range(len(line_ptrs)):
        before = None if older is None else older[i]
        found = found + (_load(line_ptrs[i], at, column, stop, before, WIDE, RAGGED),)
    return found


@triton.jit(do_not_specialize=["M"])  # one binary for 1 to BLOCK_M rows
def multiply_kernel(
    x_ptr, codes_ptr, scales_ptr, scale_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, K, lines, stride_xm, rank,
    BITS: tl.constexpr, STATE_BITS: tl.constexpr, ENDS: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Few rows of x: 128 rows of W times BLOCK_M rows of x, over one of SPLIT_K shares of K's tiles.

    Shares leave fp32 partial sums; the last to arrive adds them in order.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    UPCAST: tl.constexpr = INTERPRETED or DTYPE == tl.float32
    PARTS: tl.constexpr = 1 if DTYPE == tl.bfloat16 else 2 if DTYPE == tl.float16 else 3
    STEP: tl.constexpr = 16 * CHUNKS * WARPS
    EARLY: tl.constexpr = BLOCK_M == 8 or CHUNKS == 4  # else x takes more registers than there are
    tile_n, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row_m = tile_m.to(tl.int64) * BLOCK_M
    row, column = _place(tl.arange(0, 32 * WARPS), WARPS, CHUNKS)
    part, first, behind = _part(tile_n, ENDS)
    line_ptrs = _line_pointers(codes_ptr, row, column, K, lines, first, behind, BITS, STATE_BITS, ENDS)
    middle = (row * (16 * BITS) % 32)[:, None]
    places = tl.arange(0, 4 * WARPS * BLOCK_M)  # of x: the lanes, once for every 8 of its rows
    row_m, column_x = _place(places, WARPS, CHUNKS)
    row_m += first_row_m + places // (32 * WARPS) * 8
    x_row_ptr = x_ptr + tl.minimum(row_m, M - 1) * stride_xm + column_x
    step_ptr = scales_ptr + part * K + column_x
    accumulator = tl.zeros((WARPS, 128, BLOCK_M), dtype=tl.float32)
    tiles = tl.cdiv(K, STEP)
    per_share = tl.cdiv(tiles, SPLIT_K)
    begin, end = share * per_share, tl.minimum((share + 1) * per_share, tiles)
    stop = tl.minimum(end * STEP, K)
    words, xs, steps = (), (), ()
    start = tl.minimum(begin, tiles - 1) * STEP  # a share may have no tile
    for chunk in tl.static_range(CHUNKS):
        at = start + 16 * chunk
        words = words + (_loaded(line_ptrs, at, column, stop, None, WIDE, RAGGED),)
        if EARLY:
            steps = steps + (_load_steps(step_ptr, at, column_x, stop, None, WIDE, RAGGED),)
    if PDL:  # all before is the weight's; what is read or written from here on may be the kernel's before
        tl.extra.cuda.gdc_wait()
    if EARLY:
        for chunk in tl.static_range(CHUNKS):
            xs = xs + (_load_x(x_row_ptr, start + 16 * chunk, column_x, stop, None, WIDE, RAGGED),)
    for tile in range(begin, end):
        next_words, next_xs, next_steps = (), (), ()
        for chunk in tl.static_range(CHUNKS):
            at = (tile + 1) * STEP + 16 * chunk
            pairs = _pairs(words[chunk], middle, BITS, STATE_BITS, ASM)
            next_words = next_words + (_loaded(line_ptrs, at, column, stop, words[chunk], WIDE, RAGGED),)
            if EARLY:
                x, codes = xs[chunk], steps[chunk]
                next_xs = next_xs + (_load_x(x_row_ptr, at, column_x, stop, x, WIDE, RAGGED),)
                next_steps = next_steps + (_load_steps(step_ptr, at, column_x, stop, codes, WIDE, RAGGED),)
            else:
                x = _load(x_row_ptr, at - STEP, column_x, stop, None, WIDE, RAGGED)
                codes = _load_steps(step_ptr, at - STEP, column_x, stop, None, WIDE, RAGGED)
            parts = _parts(_numbers(x, DTYPE) * _steps(codes, WIDE, ASM), PARTS, ASM, INTERPRETED)
            accumulator = _multiplied(pairs, parts, accumulator, WARPS, BLOCK_M, INTERPRETED)
        words, xs, steps = next_words, next_xs, next_steps
    total = tl.sum(accumulator, 0)
    rows_n = tile_n.to(tl.int64) * 128 + row_order(128, 1)
    rows_m = first_row_m + tl.arange(0, BLOCK_M)
    if SPLIT_K > 1:
        where = tile_n * tl.num_programs(1) + tile_m
        exist = (rows_m < M)[None, :]
        if leave_share(total, partial_ptr, arrived_ptr, where, share, SPLIT_K, 128, BLOCK_M, exist):
            return
        total = sum_of_shares(partial_ptr, arrived_ptr, where, SPLIT_K, 128, BLOCK_M, exist)
    total *= tl.load(scale_ptr + part)
    finish(
        total, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank, HAS_BIAS, BLOCK_R, INTERPRETED, UPCAST
    )


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, scale_ptr, weight_ptr, N, K, lines,
    BITS: tl.constexpr, STATE_BITS: tl.constexpr, ENDS: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program 128 rows and 16 columns a warp."""
    COLUMNS: tl.constexpr = 16 * WARPS
    first_row, at = tl.program_id(0).to(tl.int64) * 128, tl.program_id(1) * COLUMNS
    row, column = _place(tl.arange(0, 32 * WARPS), WARPS, 1)
    part, first, behind = _part(tl.program_id(0), ENDS)
    line_ptrs = _line_pointers(codes_ptr, row, column, K, lines, first, behind, BITS, STATE_BITS, ENDS)
    middle = (row * (16 * BITS) % 32)[:, None]
    words = _loaded(line_ptrs, at, column, K, None, WIDE, True)
    low, high = _halves(_pairs(words, middle, BITS, STATE_BITS, ASM), True)
    steps = _steps(_load_steps(scales_ptr + part * K + column, at, column, K, None, WIDE, True), WIDE, ASM)
    weight = (low + high) * steps[:, :, None, None, None, None] * tl.load(scale_ptr + part)
    weight = tl.reshape(weight, (WARPS, 8, 4, 4, 2, 2, 2, 2))
    weight = tl.permute(weight, (1, 7, 6, 5, 4, 0, 2, 3))
    weight = round_to(tl.reshape(weight, (128, COLUMNS)), weight_ptr.dtype.element_ty, INTERPRETED)
    rows_n, columns = first_row + tl.arange(0, 128), at + tl.arange(0, COLUMNS)
    inside = (rows_n < N)[:, None] & (columns < K)[None, :]
    tl.store(weight_ptr + rows_n[:, None] * K + columns[None, :], weight, mask=inside)


@triton.jit
def experts_kernel(
    x_ptr, chosen_ptr, codes_ptr, scales_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    experts, N, K, lines, stride_xm,
    PER_ROW: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
    ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[p] = x[p // PER_ROW] @ W[chosen[p]]^T + bias[chosen[p]] of a stack; a program 128 rows of W and one p."""
    pair, expert = chosen_expert(chosen_ptr, experts)
    far, row = expert.to(tl.int64), pair.to(tl.int64) * BLOCK_M
    multiply_kernel(
        x_ptr + (pair // PER_ROW).to(tl.int64) * stride_xm, codes_ptr + far * lines * K, scales_ptr + far * K,
        scale_ptr + expert, bias_ptr + far * N, y_ptr, y_ptr, y_ptr + (pair - row) * N, partial_ptr, arrived_ptr,
        row + 1, N, K, lines, 0, 0,
        BITS, STATE_BITS, (), WIDE, RAGGED, HAS_BIAS, 0, WARPS, CHUNKS, SPLIT_K, BLOCK_M, ASM, INTERPRETED, False,
    )  # fmt: skip
