"""The Triton kernels behind `codebook_matmul`; that file has the layout, the equations and the regimes.

A lane of the tensor core's left operand owns pairs of neighbouring columns in its rows of codes. It looks up the
vectors of both, and the j-th entries of the two make one register of the operand for the rows g v + j: each entry has
an operand and an accumulator of its own, so that v need be no power of two and nothing moves between lanes.

SOURCE says where vectors come from: "plain" is loads that Triton places; "shared" and "global" are inline assembly
(`codebook_table`), which leaves them in the lane that multiplies them.
"""

# Tuples grow by an entry at a time here, which mypy takes for errors.
# mypy: disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl

from quantkit.kernels.codebook_table import (
    constraints,
    field,
    gather_text,
    outputs,
    point_text,
    setup_text,
    store_text,
)
from quantkit.kernels.tiles import (
    column_order,
    dot,
    finish,
    in_columns,
    operand,
    pairs_of_codes,
    ragged_codes,
    round_to,
    share_places,
    spread,
    spread_two,
)


@triton.jit
def _code_pairs(
    row_ptr, tile, full_tiles, BITS: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr
):
    """Pairs of codes of a full tile, [BLOCK_N, lane, o3, o2, o1, o0]; above a code's bits there may be others'.

    TWO: [BLOCK_N, lane, o3, o2, o1] of two codes side by side, for one plane.
    """
    if TWO:
        pairs = spread_two(tl.load(row_ptr + tile * (4 * BITS) + tl.arange(0, 4 * BITS)[None, :]), BLOCK_N, BITS)
    elif BITS & (BITS - 1) == 0:
        pairs = spread(tl.load(row_ptr + tile * (4 * BITS) + tl.arange(0, 4 * BITS)[None, :]), BLOCK_N, BITS)
    else:
        pairs = pairs_of_codes(row_ptr, tile, full_tiles, 0, BITS, BLOCK_N, ASM)
    return pairs


@triton.jit
def _looked_up(
    codes, kind: tl.constexpr, STAGE: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
    COPIES: tl.constexpr, SECTIONS: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr, BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """WINDOW entries of the vectors of pairs of codes, each [BLOCK_N, 128], by inline assembly.

    To the compiler a lookup is a pure function of codes. What orders it behind the assembly that fills the tables and
    points at a range is that codes come from memory, whose reads stay behind it, and are multiplied before the next
    range begins. (An operand that said so took 1.5 instructions a weight.)
    """
    TEXT: tl.constexpr = gather_text(STAGE, V, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
    HOW: tl.constexpr = constraints(STAGE, WIDE)
    if outputs(WIDE) == 2:
        words = tl.inline_asm_elementwise(TEXT, HOW, codes, dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    elif outputs(WIDE) == 4:
        words = tl.inline_asm_elementwise(
            TEXT, HOW, codes, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        words = tl.inline_asm_elementwise(
            TEXT, HOW, codes, is_pure=True, pack=1,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        )  # fmt: skip
    entries = ()
    for j in tl.static_range(WINDOW):
        entry = tl.join(words[j], words[WINDOW + j]) if WIDE > WINDOW else words[j]
        entries += (operand(entry, kind, BLOCK_N, PAIRS),)
    return entries


@triton.jit
def _loaded(
    row_ptr, book_ptr, k, tile, K, left, BITS: tl.constexpr, TILED: tl.constexpr, TAIL: tl.constexpr, V: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """WINDOW entries of each code's vector, each [BLOCK_N, 128], by loads; from the `left`-th on they are 0."""
    entries = ()
    if TILED:
        pairs = _code_pairs(row_ptr, tile, K // 128, BITS, False, BLOCK_N, ASM)
        low = (pairs & ((1 << BITS) - 1)) * V
        high = ((pairs >> 16) & ((1 << BITS) - 1)) * V
        for j in tl.static_range(WINDOW):
            even = tl.load(book_ptr + low + j, mask=j < left, other=0.0)
            odd = tl.load(book_ptr + high + j, mask=j < left, other=0.0)
            entries += (in_columns(even, odd, BLOCK_N, PAIRS),)
    else:
        place = ragged_codes(row_ptr, k, tile, K, BITS, TAIL) * V
        for j in tl.static_range(WINDOW):
            entries += (tl.load(book_ptr + place + j, mask=j < left, other=0.0),)
    return entries


@triton.jit
def _half(books_ptr, vector, left, NUMBER: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, BITS: tl.constexpr,
          PAIRED: tl.constexpr):  # fmt: skip
    """An entry of each vector as 16 bits of an int32; 0 from the `left`-th on. PAIRED: `vector` numbers two codes."""
    if PAIRED:  # the range, and the code that the entry belongs to
        code = (vector >> (NUMBER // WINDOW * BITS)) & ((1 << BITS) - 1)
        vector = (vector >> (2 * BITS) << BITS) + code
    halves_ptr = books_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    half = tl.load(halves_ptr + vector * V + NUMBER % WINDOW, mask=NUMBER % WINDOW < left, other=0)
    return half.to(tl.int32) & 0xFFFF


@triton.jit
def _rounded(word, INTERPRETED: tl.constexpr):
    """A pair of fp16 as the nearest bf16."""
    low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low, high = round_to(low, tl.bfloat16, INTERPRETED), round_to(high, tl.bfloat16, INTERPRETED)
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _fill(
    books_ptr, table, left, ranges, STAGE: tl.constexpr, NUMBER: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr,
    WIDE: tl.constexpr, COPIES: tl.constexpr, SECTIONS: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr,
    ROUND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Writes a piece of the vectors of SECTIONS ranges, of which `ranges` exist, from global into shared memory."""
    ENTRIES: tl.constexpr = field("entries", NUMBER, STAGE, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
    if ENTRIES > 0:
        FIRST: tl.constexpr = field("first", NUMBER, STAGE, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
        SHIFT: tl.constexpr = field("shift", NUMBER, STAGE, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
        OFFSET: tl.constexpr = field("offset", NUMBER, STAGE, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
        WIDTH: tl.constexpr = MORE_BITS if STAGE else BITS
        CHUNK: tl.constexpr = 1 << min(WIDTH, 10)
        PAIRED: tl.constexpr = WIDE > WINDOW
        TEXT: tl.constexpr = store_text(ENTRIES)
        for start in range(0, SECTIONS << WIDTH, CHUNK):
            vector = start + tl.arange(0, CHUNK)
            at = table + OFFSET + (vector << SHIFT)
            source = vector if SECTIONS == 1 else tl.minimum(vector, (ranges << WIDTH) - 1)
            w = ()
            for i in tl.static_range(FIRST, FIRST + ENTRIES, 2):
                if V % 2 == 0 and WINDOW % 2 == 0 and not PAIRED:
                    pairs_ptr = books_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
                    word = tl.load(pairs_ptr + (source * V + i) // 2, mask=i < left, other=0)
                else:
                    word = _half(books_ptr, source, left, i, V, WINDOW, BITS // 2, PAIRED)
                    word |= _half(books_ptr, source, left, i + 1, V, WINDOW, BITS // 2, PAIRED) << 16
                w += (_rounded(word, INTERPRETED) if ROUND else word,)
            for copy in range(COPIES):
                # neighbouring lanes begin with different copies, or all would write to one bank
                to = at + ((copy + vector) & (COPIES - 1)) * (2 * ENTRIES)
                if ENTRIES == 2:
                    tl.inline_asm_elementwise(TEXT, "=r,r,r", [to, w[0]], dtype=tl.int32, is_pure=False, pack=1)
                elif ENTRIES == 4:
                    tl.inline_asm_elementwise(TEXT, "=r,r,r,r", [to, w[0], w[1]], dtype=tl.int32, is_pure=False, pack=1)
                else:
                    tl.inline_asm_elementwise(
                        TEXT, "=r,r,r,r,r,r", [to, w[0], w[1], w[2], w[3]], dtype=tl.int32, is_pure=False, pack=1
                    )


@triton.jit
def _ask_for(row_ptr, first, last, BITS: tl.constexpr):
    """Has the L2 cache fetch the codes of a share's first 3 tiles, which come while the tables are filled."""
    for line in tl.static_range((3 * 16 * BITS + 127) // 128):
        word = tl.minimum(first * (4 * BITS) + 32 * line, last * (4 * BITS) - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [row_ptr + tl.maximum(word, 0)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _point(
    books_ptr, more_books_ptr, section, V: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr,
    SECTIONS: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr,
):  # fmt: skip
    """What inline assembly looks up from now on belongs to a section's codebooks."""
    ONE: tl.constexpr = point_text(0, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
    MORE: tl.constexpr = point_text(1, WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
    if COPIES > 0:
        tl.inline_asm_elementwise(ONE, "=r,r", [section], dtype=tl.int32, is_pure=False, pack=1)
        if MORE_BITS > 0:
            tl.inline_asm_elementwise(MORE, "=r,r", [section], dtype=tl.int32, is_pure=False, pack=1)
    else:
        books_ptr += section * (V << BITS)
        tl.inline_asm_elementwise(ONE, "=r,l", [books_ptr], dtype=tl.int32, is_pure=False, pack=1)
        if MORE_BITS > 0:
            more_books_ptr += section * (V << MORE_BITS)
            tl.inline_asm_elementwise(MORE, "=r,l", [more_books_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _set_up(
    books_ptr, more_books_ptr, left, ranges, V: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
    COPIES: tl.constexpr, SECTIONS: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr, ROUND: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Declares what inline assembly uses and, where it reads shared memory, fills the tables."""
    TEXT: tl.constexpr = setup_text(WIDE, COPIES, SECTIONS, BITS, MORE_BITS)
    table = tl.inline_asm_elementwise(TEXT, "=r,r", [left], dtype=tl.int32, is_pure=False, pack=1)
    if COPIES > 0:
        for stage in tl.static_range(2 if MORE_BITS > 0 else 1):
            for number in tl.static_range(2):
                _fill(
                    more_books_ptr if stage else books_ptr, table, left, ranges, stage, number, V, WINDOW, WIDE,
                    COPIES, SECTIONS, BITS, MORE_BITS, ROUND, INTERPRETED,
                )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _multiplied(entries, more, x, sums, MORE: tl.constexpr, WINDOW: tl.constexpr, INTERPRETED: tl.constexpr):
    """sums + (entries + more) @ x. Two entries are added exactly: by the accumulator in fp16, else in fp32."""
    dtype: tl.constexpr = x.dtype
    new = ()
    for j in tl.static_range(WINDOW):
        weight = entries[j]
        if MORE and dtype != tl.float16:
            weight = round_to(weight.to(tl.float32) + more[j].to(tl.float32), dtype, INTERPRETED)
        elif weight.dtype != dtype:
            weight = round_to(weight.to(tl.float32), dtype, INTERPRETED)
        total = dot(weight, x, sums[j], INTERPRETED)
        if MORE and dtype == tl.float16:
            total = dot(more[j], x, total, INTERPRETED)
        new += (total,)
    return new


@triton.jit(do_not_specialize=["M"])  # one binary for 1 to BLOCK_M rows
def decode_kernel(
    x_ptr, codes_ptr, books_ptr, more_codes_ptr, more_books_ptr, bias_ptr, up_ptr, inner_ptr, y_ptr, partial_ptr,
    arrived_ptr, M, N, K, words, more_words, range_tiles, more_range_tiles, stride_xm, rank,
    V: tl.constexpr, WINDOW: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr, SECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, TILED: tl.constexpr, TAIL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SOURCE: tl.constexpr, COPIES: tl.constexpr,
    TWO: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Few rows of x: WINDOW entries of BLOCK_N vectors of W times BLOCK_M rows of x, over one of SPLIT_K shares of K.

    MORE_BITS > 0: a second code is added. SECTIONS: ranges of columns that a share may have a part in; inline assembly
    takes them one after another, loads find the codebook of each tile. TWO: assembly looks two codes up at once, in a
    table of all pairs of vectors. Shares leave fp32 partial sums; the last to arrive adds them in order.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PLAIN: tl.constexpr = SOURCE == "plain"
    SUM: tl.constexpr = MORE_BITS > 0 and dtype == tl.bfloat16 and not PLAIN
    ROUND: tl.constexpr = MORE_BITS == 0 and dtype == tl.bfloat16 and SOURCE == "shared"
    kind: tl.constexpr = tl.bfloat16 if SUM or ROUND else tl.float16
    WIDE: tl.constexpr = 2 * WINDOW if TWO else WINDOW
    WIDE_BITS: tl.constexpr = 2 * BITS if TWO else BITS
    block, tile_m, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    window = block % tl.cdiv(V, WINDOW)
    left = V - window * WINDOW
    vectors = (block // tl.cdiv(V, WINDOW)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(vectors, tl.cdiv(N, V) - 1)[:, None]  # vectors beyond the last are not stored
    row_ptr = codes_ptr + row * tl.multiple_of(words, 4)
    more_row_ptr = more_codes_ptr + row * tl.multiple_of(more_words, 4)
    books_ptr += window * WINDOW
    more_books_ptr += window * WINDOW
    k = column_order(PAIRS)
    x_row_ptr = x_ptr + tl.minimum(rows_m, M - 1)[None, :] * stride_xm + k[:, None]
    full_tiles = K // 128
    sums = ()
    for _ in tl.static_range(WINDOW):
        sums += (tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32),)
    tiles = tl.cdiv(K, 128)
    per_share = tl.cdiv(tiles, SPLIT_K)
    first, last = share * per_share, tl.minimum((share + 1) * per_share, tiles)
    origin = tl.minimum(first, tiles - 1) // range_tiles
    if not PLAIN:
        books_ptr += origin * (V << BITS)
        more_books_ptr += origin * (V << MORE_BITS)
        ranges = tl.cdiv(tiles, range_tiles) - origin
        if COPIES > 0:
            _ask_for(row_ptr, first, last, BITS)
            if MORE_BITS > 0:
                _ask_for(more_row_ptr, first, last, MORE_BITS)
        _set_up(
            books_ptr, more_books_ptr, left, ranges, V, WINDOW, WIDE, COPIES, SECTIONS, WIDE_BITS, MORE_BITS, ROUND,
            INTERPRETED,
        )  # fmt: skip
    for section in range(0, SECTIONS):
        if not PLAIN:
            _point(books_ptr, more_books_ptr, section, V, WIDE, COPIES, SECTIONS, WIDE_BITS, MORE_BITS)
        begin = first if SECTIONS == 1 else tl.maximum(first, (origin + section) * range_tiles)
        end = last if SECTIONS == 1 else tl.minimum(last, (origin + section + 1) * range_tiles)
        for tile in range(begin, end):
            if TILED:
                x = tl.load(x_row_ptr + tile * 128)
            else:
                x = tl.load(x_row_ptr + tile * 128, mask=(tile * 128 + k < K)[:, None], other=0.0)
            if PLAIN:
                entries = _loaded(
                    row_ptr, books_ptr + tile // range_tiles * (V << BITS), k, tile, K, left, BITS, TILED, TAIL, V,
                    WINDOW, BLOCK_N, PAIRS, ASM,
                )  # fmt: skip
                more = entries
                if MORE_BITS > 0:
                    more = _loaded(
                        more_row_ptr, more_books_ptr + tile // more_range_tiles * (V << MORE_BITS), k, tile, K, left,
                        MORE_BITS, TILED, TAIL, V, WINDOW, BLOCK_N, PAIRS, ASM,
                    )  # fmt: skip
            else:
                pairs = _code_pairs(row_ptr, tile, full_tiles, BITS, TWO, BLOCK_N, ASM)
                codes = [pairs]
                if MORE_BITS > 0:
                    more_pairs = _code_pairs(more_row_ptr, tile, full_tiles, MORE_BITS, False, BLOCK_N, ASM)
                    codes = [pairs, more_pairs] if SUM else codes
                entries = _looked_up(
                    codes, kind, 2 if SUM else 0, V, WINDOW, WIDE, COPIES, SECTIONS, WIDE_BITS, MORE_BITS, BLOCK_N,
                    PAIRS,
                )  # fmt: skip
                more = entries
                if MORE_BITS > 0 and not SUM:
                    more = _looked_up(
                        [more_pairs], kind, 1, V, WINDOW, WIDE, COPIES, SECTIONS, WIDE_BITS, MORE_BITS, BLOCK_N, PAIRS
                    )
            sums = _multiplied(entries, more, x, sums, MORE_BITS > 0 and not SUM, WINDOW, INTERPRETED)
    if SPLIT_K > 1:
        where = block * tl.num_programs(1) + tile_m
        exist = (rows_m < M)[None, :]
        place = share_places(exist, BLOCK_N, BLOCK_M)
        partial_ptr += where.to(tl.int64) * (SPLIT_K * WINDOW * BLOCK_N * BLOCK_M) + place
        for j in tl.static_range(WINDOW):
            tl.store(partial_ptr + (share * WINDOW + j) * (BLOCK_N * BLOCK_M), sums[j], mask=exist)
        tl.debug_barrier()  # all of this share is written before it is counted
        if tl.atomic_add(arrived_ptr + where, 1, sem="acq_rel") != SPLIT_K - 1:
            return
        tl.store(arrived_ptr + where, 0)  # ready for the next launch
    for j in tl.static_range(WINDOW):
        total = sums[j]
        if SPLIT_K > 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(SPLIT_K):
                part_ptr = partial_ptr + (other * WINDOW + j) * (BLOCK_N * BLOCK_M)
                total += tl.load(part_ptr, mask=exist, other=0.0, cache_modifier=".cg")
        rows_n = tl.where(j < left, vectors * V + (window * WINDOW + j), N)
        finish(
            total, bias_ptr, up_ptr, inner_ptr, y_ptr, rows_n, rows_m, M, N, rank,
            HAS_BIAS, BLOCK_R, INTERPRETED, INTERPRETED,
        )  # fmt: skip


@triton.jit
def dequantize_kernel(
    codes_ptr, books_ptr, more_codes_ptr, more_books_ptr, weight_ptr, N, K, words, more_words, range_tiles,
    more_range_tiles, V: tl.constexpr, BITS: tl.constexpr, MORE_BITS: tl.constexpr, TILED: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W [N, K] in weight_ptr's type; one program a tile of 128 columns and BLOCK_N vectors."""
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    column = tile * 128 + tl.arange(0, 128)
    row = tl.minimum(vectors, tl.cdiv(N, V) - 1)[:, None]
    book_ptr = books_ptr + tile // range_tiles * (V << BITS)
    entries = _loaded(
        codes_ptr + row * tl.multiple_of(words, 4), book_ptr, tl.arange(0, 128), tile, K, V, BITS, TILED,
        TAIL, V, V, BLOCK_N, 2, ASM,
    )  # fmt: skip
    more = entries
    if MORE_BITS > 0:
        book_ptr = more_books_ptr + tile // more_range_tiles * (V << MORE_BITS)
        more = _loaded(
            more_codes_ptr + row * tl.multiple_of(more_words, 4), book_ptr, tl.arange(0, 128), tile, K, V,
            MORE_BITS, TILED, TAIL, V, V, BLOCK_N, 2, ASM,
        )  # fmt: skip
    for j in tl.static_range(V):
        weight = entries[j].to(tl.float32)
        if MORE_BITS > 0:
            weight += more[j].to(tl.float32)
        rows_n = vectors * V + j
        tl.store(
            weight_ptr + rows_n[:, None] * K + column[None, :],
            round_to(weight, weight_ptr.dtype.element_ty, INTERPRETED),
            mask=(rows_n < N)[:, None] & (column < K)[None, :],
        )
