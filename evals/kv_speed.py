"""Attention on packed keys and values: random caches, their specification, and launches for the GPU suite.

One decode step of one layer (8 key heads of 128 channels, 4 queries each) is timed inside a CUDA graph, over more
tokens than the GPU's own cache holds, beside the faster of torch's bf16 attention and a bf16 split-KV kernel of our
own. Rows with a low-rank correction and with outliers say what these cost over the same codes without.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.evals.suite_groups import Group, Run, call, relative_error
from quantkit.kernels import launching
from quantkit.kernels.kv_attention import Packed, Plain, packed_attention
from quantkit.kernels.kv_attention_triton import merge_kernel, plain_share
from quantkit.kvcache.codec import Grid, values

TOLERANCE, LIMIT = 2e-3, 4e-3
"""Limits of the relative error: in fp16, and in bf16."""


@dataclass(frozen=True)
class Form:
    """What a cache packs.

    Attributes:
        bits: of keys and of values.
        rank: of the keys' correction.
        kept: outliers of a token's keys.
    """

    bits: int
    rank: int = 0
    kept: int = 0

    @property
    def name(self) -> str:
        """Its name in a table."""
        return (
            f"{self.bits} bits" + f", rank {self.rank}" * (self.rank > 0) + f", {self.kept} outliers" * (self.kept > 0)
        )


FORMS = [Form(bits, rank, kept) for bits in (4, 3, 2) for rank, kept in ((0, 0), (4, 0), (4, 2))] + [Form(8)]


def random_packed(form: Form, batch: int, heads: int, tokens: int, size: int, device: torch.device) -> Packed:
    """A cache of a form; groups of 64, `tokens` a multiple of that."""

    def codes(channels: int, bits: int = 8, largest: int = 255) -> Tensor:
        shape = (batch, heads, tokens, channels * bits // 8)
        return torch.randint(0, largest + 1, shape, dtype=torch.uint8, device=device)

    def halves(*shape: int) -> Tensor:
        return torch.rand(batch, heads, *shape, device=device, dtype=torch.float16)

    groups, step = tokens // 64, 2.0**-form.bits
    packed = Packed(
        codes(size, form.bits), step * (0.5 + halves(groups, size)), halves(groups, size) - 1,
        codes(size, form.bits), step * (0.5 + halves(tokens, size // 64)), halves(tokens, size // 64) - 1,
        form.bits, form.bits,
    )  # fmt: skip
    if form.rank:
        up = codes(form.rank), halves(groups, form.rank) / 1024, -halves(groups, form.rank) / 8
        packed = packed._replace(down=halves(size, form.rank) - 0.5, up=up[0], up_scale=up[1], up_low=up[2])
    if form.kept:
        packed = packed._replace(places=codes(form.kept, largest=size - 1), kept=halves(tokens, form.kept) - 0.5)
    return packed


def decoded(packed: Packed) -> Plain:
    """What the packed tokens stand for, fp32."""
    k = values(Grid(packed.k, packed.k_scale, packed.k_low), packed.k_bits, by_token=False)
    v = values(Grid(packed.v, packed.v_scale, packed.v_low), packed.v_bits, by_token=True)
    if packed.up is not None and packed.down is not None:
        assert packed.up_scale is not None and packed.up_low is not None
        up = values(Grid(packed.up, packed.up_scale, packed.up_low), None, by_token=False)
        k += up @ packed.down.float().mT
    if packed.places is not None and packed.kept is not None:
        k.scatter_add_(3, packed.places.long(), packed.kept.float())
    return Plain(k, v)


def nbytes(packed: Packed) -> int:
    """Bytes of all tensors of a packed cache."""
    return sum(part.nbytes for part in packed if isinstance(part, Tensor))


CASES = ((64, 4, 1, 192), (128, 1, 5, 1024), (128, 8, 1, 4096), (256, 2, 3, 256))
"""(channels, queries of a key head, new tokens, packed tokens) that are compared with fp64."""


def deep_groups(forms: Sequence[Form] = FORMS, cases: Sequence[tuple[int, int, int, int]] = CASES) -> list[Group]:
    """All forms in all cases, among them tokens before and behind the packed ones, to be compared with fp64."""

    def group(form: Form, size: int, siblings: int, new: int, tokens: int) -> Group:
        """One form in one case, in fp16."""

        def inputs(device: torch.device) -> tuple:
            """The arguments of `packed_attention`: two sequences of two key heads, 37 tokens behind and 4 before."""
            torch.manual_seed(tokens)
            packed = random_packed(form, 2, 2, tokens, size, device)
            extra = [torch.randn(2, 2, count, size, device=device, dtype=torch.float16) for count in (37, 37, 4, 4)]
            q = torch.randn(2, 2, siblings * new, size, device=device, dtype=torch.float16)
            return q, packed, size**-0.5, Plain(*extra[:2]), Plain(*extra[2:]), new

        def measure(run: Run) -> None:
            """Compares the kernel with fp64."""
            q, packed, scaling, buffer, sink, _ = arguments = inputs(run.device)
            error = relative_error(packed_attention(*arguments), exact(q, packed, scaling, buffer, sink, new))
            run.report.check("fp16", f"relative error {error:.2e}", error <= TOLERANCE)

        place = f"heads of {size}, {siblings} x {new} queries"
        return Group("attention", place, form.name, lambda device: packed_attention(*inputs(device)), measure)

    pairs = [(form, case) for form in forms for case in cases]
    # groups of 64 of 256 channels are less than a word's field of 8 bits
    return [group(form, *case) for form, case in pairs if not (form.bits == 8 and case[0] == 256)]


def exact(
    q: Tensor, packed: Packed, scaling: float, buffer: Plain | None = None, sink: Plain | None = None, new: int = 1
) -> Tensor:
    """The specification of `packed_attention`.

    Args:
        q: [batch, key heads, queries of a key head * new, channels].
        packed: the packed tokens.
        scaling: of the scores.
        buffer, sink: tokens [batch, key heads, tokens, channels] after and before them, or None.
        new: tokens that are new, the last ones; query i is one of new token i % new, and sees none after that.

    Returns:
        fp64, of q's shape.
    """
    parts = [part for part in (sink, decoded(packed), buffer) if part is not None]
    k, v = (torch.cat(tensors, 2).double() for tensors in zip(*parts, strict=True))
    last = torch.arange(q.shape[2], device=q.device) % new + k.shape[2] - new
    hidden = torch.arange(k.shape[2], device=q.device)[None] > last[:, None]
    return (q.double() @ k.mT * scaling).masked_fill(hidden, -math.inf).softmax(-1) @ v


@triton.jit
def _plain_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, max_ptr, sum_ptr, tokens, share, rows,
    BLOCK_N: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Split-KV attention on keys and values as they are."""
    head, split, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, 16)
    place = (head * tl.num_programs(1) + split) * rows
    start = (head * tokens + split * share) * D
    count = tl.minimum(share, tokens - split * share)
    plain_share(
        q_ptr + head * rows * D, k_ptr + start, v_ptr + start, q_ptr, row, row < rows, count, row * 0 + count, 0,
        acc_ptr + place * D, max_ptr + place, sum_ptr + place, BLOCK_N, D, False, INTERPRETED,
    )  # fmt: skip


def plain_attention(q: Tensor, k: Tensor, v: Tensor, block_n: int, num_warps: int) -> Tensor:
    """What `packed_attention` is compared with: the same work on keys and values as they are.

    Args:
        q: [batch, key heads, queries of a key head, channels].
        k, v: fp16 or bf16 [batch, key heads, tokens, channels].
        block_n, num_warps: of the launch.

    Returns:
        Of q's shape and dtype.
    """
    batch, heads, rows, size = q.shape
    tokens = k.shape[2]
    _, processors, _ = launching.properties(q.device)
    splits = max(1, min(tokens // 256, 4 * processors // (batch * heads)))
    share = -(-tokens // (splits * block_n)) * block_n
    splits = -(-tokens // share)
    acc = torch.empty(batch * heads * splits * rows, size, dtype=torch.float32, device=q.device)
    highest, total = torch.empty(2, len(acc), dtype=torch.float32, device=q.device)
    output = torch.empty_like(q)
    scaled = q.half() * (size**-0.5 / math.log(2))
    _plain_kernel[(batch * heads, splits)](
        scaled, k, v, acc, highest, total, tokens, share, rows,
        BLOCK_N=block_n, D=size, INTERPRETED=not q.is_cuda, num_warps=num_warps, num_stages=3,
    )  # fmt: skip
    merge_kernel[(batch * heads, rows)](acc, highest, total, output, splits, rows, D=size, BLOCK=16, num_warps=2)
    return output


def groups(
    places: Sequence[tuple[int, int]], forms: Sequence[Form], heads: int = 8, size: int = 128, siblings: int = 4
) -> list[Group]:
    """One decode step of one layer.

    Args:
        places: (tokens of the cache, a multiple of 64; sequences).
        forms: what is packed; one without corrections comes before those with.
        heads, size, siblings: of the layer: key heads, channels, queries of a key head.
    """

    def group(form: Form, tokens: int, batch: int) -> Group:
        def launch(device: torch.device) -> None:
            q = torch.randn(batch, heads, siblings, size, device=device, dtype=torch.bfloat16)
            packed_attention(q, random_packed(form, batch, heads, tokens, size, device), size**-0.5)

        def measure(run: Run) -> None:
            _step(run, form, (batch, heads, tokens, size), siblings)

        return Group("attention", f"{tokens / 1024:g}k, batch {batch}", form.name, launch, measure)

    return [group(form, *place) for place in places for form in forms]


def _step(run: Run, form: Form, shape: tuple[int, int, int, int], siblings: int) -> None:
    batch, heads, tokens, size = shape
    best = run.once(("attention", shape), lambda: _dense(run, shape, siblings)) if run.timing else math.nan
    first = random_packed(form, *shape, run.device)
    read = nbytes(first)
    caches = [first] + [random_packed(form, *shape, run.device) for _ in range(run.distinct(read, 1) - 1)]
    q = run.random(batch, heads, siblings, size)
    calls = [call(packed_attention, q, cache, size**-0.5) for cache in caches]
    replays = run.checked("a step", calls, exact(q, first, size**-0.5), LIMIT)
    if not replays or not run.timing:
        return
    seconds = replays.seconds()
    run.report.time("a step", seconds, speed_up=best / seconds, bandwidth_share=read / seconds / run.bandwidth)
    codes = run.once(("codes", shape, form.bits), lambda: seconds)
    if form.rank or form.kept:
        bits = 4 * read / (batch * heads * tokens * size)
        run.report.note(
            f"{form.name}, {tokens} tokens: {bits:.2f} bits, {seconds / codes - 1:+.0%} over the codes alone"
        )


def _dense(run: Run, shape: tuple[int, int, int, int], siblings: int) -> float:
    """Seconds of the faster bf16 attention."""
    batch, heads, _, size = shape
    read = 4 * math.prod(shape)
    q = run.random(batch, heads, siblings, size)
    pairs = [(run.random(*shape), run.random(*shape)) for _ in range(run.distinct(read, 1))]
    flat = q.view(batch, heads * siblings, 1, size)
    found = {"torch bf16": run.replays([call(_torch, flat, *pair) for pair in pairs]).seconds()}
    found["split-KV bf16"] = min(
        run.replays([call(plain_attention, q, *pair, block_n, warps) for pair in pairs]).seconds()
        for block_n, warps in ((32, 1), (64, 2), (64, 4))
    )
    best = min(found.values())
    for what, seconds in found.items():
        run.baseline(what, "a step", seconds, speed_up=best / seconds, bandwidth_share=read / seconds / run.bandwidth)
    return best


def _torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
