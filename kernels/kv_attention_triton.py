"""The Triton kernel behind `kv_attention.packed`: queries of a decode step against packed keys and values.

One program has a row of the batch, a head of keys, and a share of its tokens (split-KV); all queries that read the head
are its rows. Nothing is decoded to memory:

    scores   (q * step) . code + q . minimum, with the step of a channel and its group of tokens folded into q
             + (q down) . up of the low-rank correction, + q gathered where keys have outliers
    output   sum of p * (code * step + minimum), by token

with a running maximum and sum, so that shares are merged afterwards.
"""

import triton
import triton.language as tl


@triton.jit
def _plane(ptr, n, inside, ROW: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Fields of one width, [tokens, D] uint16: channel c is field c % (8 / WIDTH) of its byte."""
    size: tl.constexpr = D * WIDTH // 8
    place = tl.arange(0, size)
    word = tl.load(ptr + n[:, None] * ROW + START + place[None, :], mask=inside[:, None], other=0).to(tl.uint16)
    if WIDTH == 8:
        fields = word
    elif WIDTH == 4:
        fields = tl.join(word & 15, word >> 4)
    elif WIDTH == 2:
        fields = tl.join(tl.join(word & 3, (word >> 4) & 3), tl.join((word >> 2) & 3, word >> 6))
    else:
        first = tl.join(tl.join(word & 1, (word >> 4) & 1), tl.join((word >> 2) & 1, (word >> 6) & 1))
        second = tl.join(tl.join((word >> 1) & 1, (word >> 5) & 1), tl.join((word >> 3) & 1, word >> 7))
        fields = tl.join(first, second)
    return tl.reshape(fields, (n.shape[0], D))


@triton.jit
def _codes(ptr, n, inside, BITS: tl.constexpr, D: tl.constexpr):
    """Codes of some tokens, [tokens, D] fp16: put behind the exponent of 1024, as a conversion would cost more."""
    ROW: tl.constexpr = D * BITS // 8
    if BITS == 3:
        codes = _plane(ptr, n, inside, ROW, 0, 2, D) + 4 * _plane(ptr, n, inside, ROW, D // 4, 1, D)
    else:
        codes = _plane(ptr, n, inside, ROW, 0, BITS, D)
    return (codes | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, k_scale_ptr, k_low_ptr, v_ptr, v_scale_ptr, v_low_ptr,
    qd_ptr, up_ptr, up_scale_ptr, up_low_ptr, index_ptr, kept_ptr, mask_ptr,
    acc_ptr, max_ptr, sum_ptr,
    tokens, share, k_head, k_scale_head, v_head, v_scale_head, up_head, up_scale_head, kept_head, mask_row, heads,
    scaling,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    RANK: tl.constexpr, UP_BITS: tl.constexpr, UP_GROUP: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """See the module; `*_head` are elements from one head's tensors to the next, `share` tokens of a program."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    real = row < ROWS
    q_at = q_ptr + (head * ROWS + row[:, None]) * D
    q = tl.load(q_at + d[None, :], mask=real[:, None], other=0.0).to(tl.float32) * (scaling * 1.4426950408889634)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    stop = tl.minimum(tokens, (split + 1) * share)
    for start in range(split * share, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < stop
        group = start // K_GROUP
        step = tl.load(k_scale_ptr + head * k_scale_head + group * D + d).to(tl.float32)
        low = tl.load(k_low_ptr + head * k_scale_head + group * D + d).to(tl.float32)
        codes = _codes(k_ptr + head * k_head, n, inside, K_BITS, D)
        scores = tl.dot((q * step[None, :]).to(tl.float16), tl.trans(codes))
        scores += tl.sum(q * low[None, :], 1)[:, None]
        for r in tl.static_range(RANK):
            qd = tl.load(qd_ptr + (head * ROWS + row) * RANK + r, mask=real, other=0.0)
            up = tl.load(up_ptr + head * up_head + n * RANK + r, mask=inside, other=0).to(tl.float32)
            if UP_BITS == 8:
                at = head * up_scale_head + (start // UP_GROUP) * RANK + r
                up = up * tl.load(up_scale_ptr + at).to(tl.float32) + tl.load(up_low_ptr + at).to(tl.float32)
            scores += (qd * (scaling * 1.4426950408889634))[:, None] * up[None, :]
        for j in tl.static_range(KEPT):
            at = head * kept_head + n * KEPT + j
            channel = tl.load(index_ptr + at, mask=inside, other=0).to(tl.int32)
            kept = tl.load(kept_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gathered = tl.load(q_at + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
            scores += gathered * (kept * (scaling * 1.4426950408889634))[None, :]
        seen = inside
        if MASKED:
            seen = seen & (tl.load(mask_ptr + (head // heads) * mask_row + n, mask=inside, other=0) != 0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # so far nothing is seen
        p = tl.exp2(scores - base[:, None])
        before = tl.exp2(highest - base)
        total = total * before + tl.sum(p, 1)
        values = _codes(v_ptr + head * v_head, n, inside, V_BITS, D)
        v_at = head * v_scale_head + n * GROUPS
        if GROUPS == 1:  # folded into p
            v_step = tl.load(v_scale_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
            v_low = tl.load(v_low_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
            acc = acc * before[:, None] + tl.sum(p * v_low[None, :], 1)[:, None]
            acc += tl.dot((p * v_step[None, :]).to(tl.float16), values)
        else:
            part = tl.arange(0, GROUPS)
            v_step = tl.load(v_scale_ptr + v_at[:, None] + part[None, :], mask=inside[:, None], other=0.0)
            v_low = tl.load(v_low_ptr + v_at[:, None] + part[None, :], mask=inside[:, None], other=0.0)
            grouped = tl.reshape(values, (BLOCK_N, GROUPS, D // GROUPS))
            grouped = grouped * v_step[:, :, None] + v_low[:, :, None]
            acc = acc * before[:, None] + tl.dot(p.to(tl.float16), tl.reshape(grouped, (BLOCK_N, D)))
        highest = higher
    at = (head * tl.num_programs(1) + split) * ROWS + row
    tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=real[:, None])
    tl.store(max_ptr + at, highest, mask=real)
    tl.store(sum_ptr + at, total, mask=real)
