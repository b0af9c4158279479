"""The Triton kernels behind `kv_attention.packed_attention`: queries of a decode step against packed keys and values.

One program, a single warp, has a row of the batch, a head of keys, up to 16 of the queries that read the head, and a
share of its tokens (split-KV). Nothing is decoded to memory:

    scores   (q * step) . code + q . minimum, with the step of a channel and its group of tokens folded into q
             + (q down) . up of the low-rank correction, + q gathered where keys have outliers
    output   (p * step) . code + p . minimum, with the step of a token and its group of channels folded into p

with a running maximum and sum. Two more shares are the newest tokens and the first ones, which are not packed;
`merge_kernel` joins them all.

Loops read q in fp16 and scaled for powers of 2 again and again, which is not to cost them instructions, nor a decode
step launches before this one: every program first writes it (`_scaled`). Programs of one head write the same numbers to
the same places, and each reads them after it has written them itself.

Codes are multiplied as they lie in their word: some bits of it, with the others masked off, are a subnormal float of
fp16, code * 2^(shift - 24), which PTX's mma takes as exactly as any other. So a code costs half an instruction, and
the powers of two go into q and into the result. Fields of a word are channels D / fields apart, and are multiplied one
after another; none is moved to another lane.
"""

import triton
import triton.language as tl

from quantkit.kernels.tiles import dot


@triton.constexpr_function
def _width(bits):
    """Width of the fields in the words of a code's low bits."""
    return 2 if bits == 3 else bits


@triton.constexpr_function
def _shift(bits, field):
    """Shift of a field in the lower or the upper byte of its word."""
    return _width(bits) * field % 8


@triton.constexpr_function
def _folded(bits, field):
    """The power of two that goes into q for a field; half of what evens out the shifts, so that fp16 has room for q."""
    return 2.0 ** ((8 - _width(bits)) // 2 - _shift(bits, field))


@triton.constexpr_function
def _of_two(template, *numbers):
    """Assembly on two words of 16 bits at once."""
    return template.format(*(number * 0x10001 for number in numbers))


@triton.jit
def _upper(words, by, ASM: tl.constexpr):
    """Words whose lower byte is their upper one, where `by` is 8; what is in the upper byte then does not matter.

    `by` [tokens, words] is 0 or 8, the same for a pair of words, or None for 8 everywhere.
    """
    if not ASM:
        found = words >> (8 if by is None else by)
    elif by is None:
        found = tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [words], tl.int16, is_pure=True, pack=2)
    else:
        TEXT: tl.constexpr = "{ .reg .b32 by; and.b32 by, $2, 8; shr.u32 $0, $1, by; }"
        found = tl.inline_asm_elementwise(TEXT, "=r,r,r", [words, by], tl.int16, is_pure=True, pack=2)
    return found


@triton.jit
def _moved_up(words, by, ASM: tl.constexpr):
    """Words whose lower byte is moved up by 1 or 2 bits, the same for a pair; their upper bits do not matter."""
    if ASM:
        TEXT: tl.constexpr = "{ .reg .b32 by; and.b32 by, $2, 3; shl.b32 $0, $1, by; }"
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [words, by], tl.int16, is_pure=True, pack=2)
    return words << by


@triton.jit
def _field(words, more, FIELD: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Codes * 2^(shift - 24) of a field that lies in the words' lower byte, fp16."""
    LOW: tl.constexpr = (2 ** _width(BITS) - 1) << _shift(BITS, FIELD)
    HIGH: tl.constexpr = 4 << _shift(BITS, FIELD)
    if ASM:
        if BITS == 3:
            BOTH: tl.constexpr = _of_two("and.b32 $0, $1, {}; lop3.b32 $0, $2, {}, $0, 0xEA;", LOW, HIGH)
            return tl.inline_asm_elementwise(BOTH, "=&r,r,r", [words, more], tl.float16, is_pure=True, pack=2)
        ONE: tl.constexpr = _of_two("and.b32 $0, $1, {};", LOW)
        return tl.inline_asm_elementwise(ONE, "=r,r", [words], tl.float16, is_pure=True, pack=2)
    codes = words & LOW
    if BITS == 3:
        codes |= more & HIGH
    return codes.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _codes(ptr, n, inside, place, BITS: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr):
    """All fields of some tokens' words [tokens, place], a tuple.

    Where there are fewer words than places, the words' upper bytes are the rest, and have no fields of their own.
    """
    ROW: tl.constexpr = D * BITS // 16
    W: tl.constexpr = D * _width(BITS) // 16
    PER: tl.constexpr = 8 // _width(BITS)
    FOLDED: tl.constexpr = place.shape[0] > W
    at = ptr + n[:, None] * ROW
    words = tl.load(at + (place % W)[None, :], mask=inside[:, None], other=0)
    more, by = words, words
    if BITS == 3:  # the highest bit of field f is bit 2 f of these words, or 2 f + 1 of the same ones
        more = tl.load(at + W + (place % (W // 2))[None, :], mask=inside[:, None], other=0)
        by = tl.broadcast_to((2 - place // (W // 2) % 2).to(tl.int16)[None, :], words.shape)
    if FOLDED:
        half = tl.broadcast_to((place // W * 8).to(tl.int16)[None, :], words.shape)
        words, more = _upper(words, half, ASM), _upper(more, half, ASM)
    moved = _moved_up(more, by, ASM) if BITS == 3 else words
    found = ()
    for field in tl.static_range(PER):
        found = found + (_field(words, moved, field, BITS, ASM),)
    if not FOLDED:
        upper = _upper(words, None, ASM)
        moved = _moved_up(_upper(more, None, ASM), by, ASM) if BITS == 3 else upper
        for field in tl.static_range(PER):
            found = found + (_field(upper, moved, field, BITS, ASM),)
    return found


@triton.jit
def _seen(scores, inside, mask_ptr, start, n, real, MASKED: tl.constexpr):
    """Scores, minus infinity where a token is not seen. mask_ptr [rows] points at the rows' masks."""
    seen = inside
    if MASKED:
        seen = seen & (tl.load(mask_ptr[:, None] + (start + n)[None, :], mask=seen & real[:, None], other=0) != 0)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _softmax(scores, highest, total):
    """(p, the new maximum, the new sum, what older sums are multiplied by)."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # so far nothing is seen
    p = tl.exp2(scores - base[:, None])
    before = tl.exp2(highest - base)
    return p, higher, total * before + tl.sum(p, 1), before


@triton.jit
def _scaled(q_ptr, scaled_ptr, turned_ptr, row, real, row_stride, factor, D: tl.constexpr, TURNED: tl.constexpr):
    """Writes rows of q [rows, D] times a factor in fp16, and where TURNED side by side, [D, 16], 0 for those that are
    not real; what the program's lanes read of it from here on is there."""
    d = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * row_stride + d[None, :], mask=real[:, None], other=0.0)
    q = (q.to(tl.float32) * factor).to(tl.float16)
    tl.store(scaled_ptr + row[:, None] * D + d[None, :], q, mask=real[:, None])
    if TURNED:
        tl.store(turned_ptr + d[None, :] * 16 + tl.arange(0, 16)[:, None], q)
    tl.debug_barrier()


@triton.jit
def packed_share(
    q_ptr, k_ptr, k_scale_ptr, k_low_ptr, v_ptr, v_scale_ptr, v_low_ptr,
    down_ptr, up_ptr, up_scale_ptr, up_low_ptr, index_ptr, kept_ptr, turned_ptr, mask_ptr,
    row, real, first, stop, mask_start, acc_ptr, max_ptr, sum_ptr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    GROUPS: tl.constexpr, RANK: tl.constexpr, UP_BITS: tl.constexpr, UP_GROUP: tl.constexpr, KEPT: tl.constexpr,
    MASKED: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Stores maximum, sum and output, not normalised, of packed tokens first ... stop - 1."""
    KW: tl.constexpr = D * _width(K_BITS) // 16
    KF: tl.constexpr = 16 // _width(K_BITS) if KW >= 16 else 8 // _width(K_BITS)
    VF: tl.constexpr = 16 // _width(V_BITS)
    VW: tl.constexpr = D // VF
    k_place = tl.arange(0, KW if KW > 16 else 16)  # a tensor core sums over 16 at least
    k_channel = k_place % KW + k_place // KW * (D // 2)
    v_place = tl.arange(0, VW)
    twin = tl.arange(0, 8)[:, None] * 0  # eight equal rows make a vector an operand
    q_at = q_ptr + row[:, None] * D
    r = tl.arange(0, 16)
    if RANK > 0:
        projected = tl.zeros((16, 16), tl.float32)
        for f in tl.static_range(KF):
            part = tl.load(q_at + f * KW + k_channel[None, :], mask=real[:, None], other=0.0)
            channel_at = down_ptr + (f * KW + k_channel[:, None]) * RANK
            down = tl.load(channel_at + r[None, :], mask=r[None, :] < RANK, other=0.0)
            projected = dot(part, down, projected, INTERPRETED)
        projected = projected.to(tl.float16)
    unit = (r[:, None] == r[None, :]).to(tl.float16)  # brings what is gathered by token under the rows
    highest = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc, shift = (), ()
    for _ in tl.static_range(VF):
        acc = acc + (tl.zeros((16, VW), tl.float32),)
    for _ in tl.static_range(GROUPS):
        shift = shift + (tl.zeros((16,), tl.float32),)
    for start in tl.range(first, stop, BLOCK_N, disable_licm=True):  # what is hoisted would need registers
        n = start + tl.arange(0, BLOCK_N)
        inside = n < stop
        codes = _codes(k_ptr, n, inside, k_place, K_BITS, D, ASM)
        scores = tl.zeros((16, BLOCK_N), tl.float32)
        lowest = tl.zeros((16, 8), tl.float32)
        for f in tl.static_range(KF):
            at = start // K_GROUP * D + f * KW + k_channel
            step = tl.load(k_scale_ptr + at) * _folded(K_BITS, f)
            low = tl.load(k_low_ptr + at[None, :] + twin)
            # loaded in every round: registers are scarcer than reads of what the caches hold
            q = tl.load(q_at + f * KW + k_channel[None, :], mask=real[:, None], other=0.0)
            scores = dot(q * step[None, :], tl.trans(codes[f]), scores, INTERPRETED)
            lowest = dot(q, tl.trans(low), lowest, INTERPRETED)
        scores = scores * (16777216 / _folded(K_BITS, 0))
        if RANK > 0:
            in_rank = r < RANK
            up = tl.load(up_ptr + n[:, None] * RANK + r[None, :], mask=inside[:, None] & in_rank[None, :], other=0)
            if UP_BITS == 8:
                at = start // UP_GROUP * RANK + r
                step = tl.load(up_scale_ptr + at, mask=in_rank, other=0.0)
                low = tl.load(up_low_ptr + at[None, :] + twin, mask=in_rank[None, :], other=0.0)
                lowest = dot(projected, tl.trans(low), lowest, INTERPRETED)
                codes_up = (up.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
                scores = dot(projected * step[None, :], tl.trans(codes_up), scores, INTERPRETED)
            else:
                scores = dot(projected, tl.trans(up), scores, INTERPRETED)
        scores += tl.max(lowest, 1)[:, None]
        for j in tl.static_range(KEPT):
            channel = tl.load(index_ptr + n * KEPT + j, mask=inside, other=0).to(tl.int32)
            kept = tl.load(kept_ptr + n * KEPT + j, mask=inside, other=0.0)
            gathered = tl.load(turned_ptr + channel[:, None] * 16 + r[None, :]) * kept[:, None]
            scores = dot(unit, tl.trans(gathered), scores, INTERPRETED)
        scores = _seen(scores, inside[None, :], mask_ptr, mask_start, n, real, MASKED)
        p, highest, total, before = _softmax(scores, highest, total)
        codes = _codes(v_ptr, n, inside, v_place, V_BITS, D, ASM)
        sums, shifts = (), ()
        for g in tl.static_range(GROUPS):
            step = tl.load(v_scale_ptr + n * GROUPS + g, mask=inside, other=0.0).to(tl.float32)
            low = tl.load(v_low_ptr + n * GROUPS + g, mask=inside, other=0.0).to(tl.float32)
            shifts = shifts + (shift[g] * before + tl.sum(p * low[None, :], 1),)
            scaled = (p * step[None, :]).to(tl.float16)
            for j in tl.static_range(VF // GROUPS):
                older = acc[g * (VF // GROUPS) + j] * before[:, None]
                sums = sums + (dot(scaled, codes[g * (VF // GROUPS) + j], older, INTERPRETED),)
        acc, shift = sums, shifts
    for f in tl.static_range(VF):
        part = acc[f] * (16777216 / 2 ** _shift(V_BITS, f)) + shift[f * GROUPS // VF][:, None]
        tl.store(acc_ptr + row[:, None] * D + f * VW + v_place[None, :], part, mask=real[:, None])
    tl.store(max_ptr + row, highest, mask=real)
    tl.store(sum_ptr + row, total, mask=real)


@triton.jit
def plain_share(
    q_ptr, k_ptr, v_ptr, mask_ptr, row, real, count, before_last, mask_start, acc_ptr, max_ptr, sum_ptr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As `packed_share`, over `count` tokens as they are; a row sees those up to `before_last` [rows]."""
    d = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    highest = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, D), tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < count)[:, None]
        at = n[:, None] * D + d[None, :]
        keys = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float16)
        scores = dot(q, tl.trans(keys), tl.zeros((16, BLOCK_N), tl.float32), INTERPRETED)
        causal = (n[None, :] <= before_last[:, None]) & (n < count)[None, :]
        scores = _seen(scores, causal, mask_ptr, mask_start, n, real, MASKED)
        p, highest, total, before = _softmax(scores, highest, total)
        values = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float16)
        acc = dot(p.to(tl.float16), values, acc * before[:, None], INTERPRETED)
    tl.store(acc_ptr + row[:, None] * D + d[None, :], acc, mask=real[:, None])
    tl.store(max_ptr + row, highest, mask=real)
    tl.store(sum_ptr + row, total, mask=real)


@triton.jit(do_not_specialize=["tokens", "share", "splits", "buffered", "sinks", "new"])
def decode_kernel(
    q_ptr, scaled_ptr, k_ptr, k_scale_ptr, k_low_ptr, v_ptr, v_scale_ptr, v_low_ptr,
    down_ptr, up_ptr, up_scale_ptr, up_low_ptr, index_ptr, kept_ptr, turned_ptr,
    buffer_k_ptr, buffer_v_ptr, sink_k_ptr, sink_v_ptr, mask_ptr, acc_ptr, max_ptr, sum_ptr,
    tokens, share, splits, buffered, sinks, new, rows, heads,
    k_head, k_scale_head, v_head, v_scale_head, up_head, up_scale_head, kept_head, buffer_head, sink_head, mask_row,
    q_batch, q_head, q_row, factor,
    BLOCK_N: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    GROUPS: tl.constexpr, RANK: tl.constexpr, UP_BITS: tl.constexpr, UP_GROUP: tl.constexpr, KEPT: tl.constexpr,
    MASKED: tl.constexpr, ASM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """See the module. `*_head` are elements from one head's tensors to the next, `share` the tokens of a program; q is
    scaled by `factor`, scaled_ptr [heads, rows, D] and turned_ptr [heads, tiles of rows, D, 16] are room for it;
    share number `splits` is the buffer, whose newest tokens are the `new` queries' own, and the next one the sinks."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2) * 16 + tl.arange(0, 16)
    real = row < rows
    q_ptr += head // heads * q_batch + head % heads * q_head
    scaled_ptr += head * rows * D
    turned_ptr += (head * tl.num_programs(2) + tl.program_id(2)) * (D * 16)
    _scaled(q_ptr, scaled_ptr, turned_ptr, row, real, q_row, factor, D, KEPT > 0)
    masks = mask_ptr + ((head // heads) * new + row % new) * mask_row
    place = (head * tl.num_programs(1) + split) * rows
    acc_ptr, max_ptr, sum_ptr = acc_ptr + place * D, max_ptr + place, sum_ptr + place
    if split < splits:
        packed_share(
            scaled_ptr, k_ptr + head * k_head, k_scale_ptr + head * k_scale_head, k_low_ptr + head * k_scale_head,
            v_ptr + head * v_head, v_scale_ptr + head * v_scale_head, v_low_ptr + head * v_scale_head,
            down_ptr + head * (D * RANK), up_ptr + head * up_head, up_scale_ptr + head * up_scale_head,
            up_low_ptr + head * up_scale_head, index_ptr + head * kept_head, kept_ptr + head * kept_head,
            turned_ptr, masks,
            row, real, split * share, tl.minimum(tokens, (split + 1) * share), sinks, acc_ptr, max_ptr, sum_ptr,
            BLOCK_N, D, K_BITS, V_BITS, K_GROUP, GROUPS, RANK, UP_BITS, UP_GROUP, KEPT, MASKED, ASM, INTERPRETED,
        )  # fmt: skip
    else:
        is_buffer = split == splits
        stride = tl.where(is_buffer, buffer_head, sink_head)
        k_plain = tl.where(is_buffer, buffer_k_ptr, sink_k_ptr) + head * stride
        v_plain = tl.where(is_buffer, buffer_v_ptr, sink_v_ptr) + head * stride
        count = tl.where(is_buffer, buffered, sinks)
        # a mask says itself what a row sees; without one, a new token sees itself and what was there before it
        last = row * 0 + count if MASKED else tl.where(is_buffer, buffered - new + row % new, count + row * 0)
        plain_share(
            scaled_ptr, k_plain, v_plain, masks, row, real, count, last, tl.where(is_buffer, sinks + tokens, 0),
            acc_ptr, max_ptr, sum_ptr, 16, D, MASKED, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["shares"])
def merge_kernel(acc_ptr, max_ptr, sum_ptr, output_ptr, shares, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Attention over all shares' tokens; a program has one row of a head."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, s = tl.arange(0, D), tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, shares, BLOCK):
        at = (head * shares + start + s) * rows + row
        highest = tl.maximum(highest, tl.load(max_ptr + at, mask=start + s < shares, other=float("-inf")))
    base = tl.max(highest, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    acc = tl.zeros((D,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, shares, BLOCK):
        at = (head * shares + start + s) * rows + row
        here = start + s < shares
        weight = tl.exp2(tl.load(max_ptr + at, mask=here, other=float("-inf")) - base)
        total += weight * tl.load(sum_ptr + at, mask=here, other=0.0)
        part = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    found = acc / tl.maximum(tl.sum(total, 0), 1e-30)
    tl.store(output_ptr + (head * rows + row) * D + d, found.to(output_ptr.dtype.element_ty))
