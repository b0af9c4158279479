"""Speed of attention on packed keys and values on a GPU, after its correctness on that very GPU.

    python -m quantkit.evals.kv_speed --out FOLDER [--contexts 8192 32768 131072] [--batches 1 16] [--minutes 8]

One decode step of one layer (8 key heads of 128 channels, 4 queries each) is timed inside a CUDA graph, over more
tokens than the GPU's own cache holds, beside the faster of torch's bf16 attention and a bf16 split-KV kernel of our
own. Rows with a low-rank correction and with outliers say what these cost over the same codes without. Writes
kv_speed.json and kv_speed.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.evals.kernel_speed import Timer, call, copies, describe, write
from quantkit.kernels import launching
from quantkit.kernels.kv_attention import Packed, Plain, packed_attention
from quantkit.kernels.kv_attention_triton import merge_kernel, plain_share
from quantkit.kernels.timing import seconds_per_call
from quantkit.kvcache.codec import Grid, values

TOLERANCE = 2e-3


@dataclass(frozen=True)
class Form:
    """What is packed.

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
        """In a table."""
        return (
            f"{self.bits} bits" + f", rank {self.rank}" * (self.rank > 0) + f", {self.kept} outliers" * (self.kept > 0)
        )


FORMS = [Form(bits, rank, kept) for bits in (4, 3, 2) for rank, kept in ((0, 0), (4, 0), (4, 2))] + [Form(8)]


@dataclass(frozen=True)
class Timing:
    """One launch.

    Attributes:
        what: a form's name, "torch bf16" or "split-KV bf16".
        tokens, batch: in the cache.
        microseconds: median of a call.
        true_bits: of a cached number.
        gigabytes_per_second: bytes of the cache over the time.
        speed_up: time of the faster bf16 attention over this one's.
        over_codes: time over that of the same codes without corrections.
    """

    what: str
    tokens: int
    batch: int
    microseconds: float
    true_bits: float
    gigabytes_per_second: float
    speed_up: float
    over_codes: float


def random_packed(form: Form, batch: int, heads: int, tokens: int, size: int, device: torch.device) -> Packed:
    """A cache of a form; groups of 64, `tokens` a multiple of that."""

    def codes(channels: int, bits: int = 8) -> Tensor:
        shape = (batch, heads, tokens, channels * bits // 8)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

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
        packed = packed._replace(places=codes(form.kept) % size, kept=halves(tokens, form.kept) - 0.5)
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
    """Of all its tensors."""
    return sum(part.nbytes for part in packed if isinstance(part, Tensor))


CASES = ((64, 4, 1, 192), (128, 1, 5, 1024), (128, 8, 1, 4096), (256, 2, 3, 256))
"""(channels, queries of a key head, new tokens, packed tokens) that are compared with fp64."""


def faults(
    device: torch.device, forms: Sequence[Form] = FORMS, cases: Sequence[tuple[int, int, int, int]] = CASES
) -> Iterator[str]:
    """What the kernels get wrong on this device; nothing, as it should be."""
    for form in forms:
        for size, siblings, new, tokens in cases:
            if form.bits == 8 and size == 256:
                continue  # groups of 64 are less than a word's field
            torch.manual_seed(tokens)
            packed = random_packed(form, 2, 2, tokens, size, device)
            extra = [torch.randn(2, 2, count, size, device=device, dtype=torch.float16) for count in (37, 37, 4, 4)]
            buffer, sink = Plain(*extra[:2]), Plain(*extra[2:])
            q = torch.randn(2, 2, siblings * new, size, device=device, dtype=torch.float16)
            scaling = size**-0.5
            found = packed_attention(q, packed, scaling, buffer, sink, new)
            plain = decoded(packed)
            k, v = (torch.cat([a, b, c], 2).double() for a, b, c in zip(sink, plain, buffer, strict=True))
            last = torch.arange(siblings * new, device=device) % new + k.shape[2] - new
            hidden = torch.arange(k.shape[2], device=device)[None] > last[:, None]
            wanted = (q.double() @ k.mT * scaling).masked_fill(hidden, -math.inf).softmax(-1) @ v
            error = float((found.double() - wanted).norm() / wanted.norm())
            if not error <= TOLERANCE:
                yield f"{form.name}, heads of {size}, {siblings} x {new} queries: relative error {error:.2e}"


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
    """What `packed_attention` is compared with: the same work on keys and values as they are."""
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


def measure(
    device: torch.device,
    contexts: Sequence[int],
    batches: Sequence[int],
    forms: Sequence[Form],
    timer: Timer,
    deadline: float = math.inf,
    heads: int = 8,
    size: int = 128,
    siblings: int = 4,
) -> Iterator[Timing]:
    """Times all launches.

    Args:
        device: the GPU.
        contexts: tokens of the cache, multiples of 64.
        batches: sequences.
        forms: what is packed; one without corrections comes before those with.
        timer: seconds of a call, given calls on distinct tensors.
        deadline: of time.monotonic(); no launch is begun after it.
        heads, size, siblings: of the layer: key heads, channels, queries of a key head.
    """
    for batch in batches:
        for tokens in contexts:
            elements = 2 * batch * heads * tokens * size
            q = torch.randn(batch, heads, siblings, size, device=device, dtype=torch.bfloat16)
            pairs = [
                tuple(torch.randn(batch, heads, tokens, size, device=device, dtype=torch.bfloat16) for _ in range(2))
                for _ in range(copies(2 * elements, 1, 16))
            ]
            flat = q.view(batch, heads * siblings, 1, size)
            base = timer([call(_torch, flat, *pair) for pair in pairs])
            one = Timing("torch bf16", tokens, batch, 1e6 * base, 16.0, 2 * elements / base / 1e9, 1.0, 1.0)
            ours = min(
                timer([call(plain_attention, q, *pair, block_n, warps) for pair in pairs])
                for block_n, warps in ((32, 1), (64, 2), (64, 4))
            )
            best = min(base, ours)
            yield replace(one, speed_up=best / base)
            yield replace(
                one, what="split-KV bf16", microseconds=1e6 * ours, gigabytes_per_second=2 * elements / ours / 1e9,
                speed_up=best / ours,
            )  # fmt: skip
            del pairs
            codes: dict[int, float] = {}
            for form in forms:
                if time.monotonic() > deadline:
                    return
                first = random_packed(form, batch, heads, tokens, size, device)
                size_of = nbytes(first)
                caches = [first]
                caches += [
                    random_packed(form, batch, heads, tokens, size, device) for _ in range(copies(size_of, 1, 16) - 1)
                ]
                seconds = timer([call(packed_attention, q, cache, size**-0.5) for cache in caches])
                codes.setdefault(form.bits, seconds)
                yield Timing(
                    form.name, tokens, batch, 1e6 * seconds, 8 * size_of / elements, size_of / seconds / 1e9,
                    best / seconds, seconds / codes[form.bits],
                )  # fmt: skip


def _torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def table(timings: Sequence[Timing]) -> str:
    """Markdown: a row a form, a column a context and batch; speed-up over the faster bf16, microseconds."""
    columns = list(dict.fromkeys((timing.batch, timing.tokens) for timing in timings))
    heads = [f"{tokens / 1024:g}k, batch {batch}" for batch, tokens in columns]
    lines = ["| cache | true bits | " + " | ".join(heads) + " |", "|---" * (len(columns) + 2) + "|"]
    for what in dict.fromkeys(timing.what for timing in timings):
        found = {(timing.batch, timing.tokens): timing for timing in timings if timing.what == what}
        cells = []
        for column in columns:
            timing = found.get(column)
            more = f", {100 * (timing.over_codes - 1):+.0f}%" if timing and timing.over_codes != 1 else ""
            cells.append(f"{timing.speed_up:.2f}x ({timing.microseconds:.1f} us{more})" if timing else "")
        bits = next(iter(found.values())).true_bits
        lines.append(f"| {what} | {bits:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for kv_speed.json and kv_speed.md")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--minutes", type=float, default=8, help="no launch is begun after so long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU and there is none here")
    if any(tokens % 64 or tokens < 64 for tokens in arguments.contexts):
        sys.exit("error: --contexts are multiples of 64")
    device, begun = torch.device("cuda"), time.monotonic()
    about = describe(device)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    wrong = list(faults(device))
    for line in wrong:
        print(line)
    if wrong:
        sys.exit("error: wrong results; nothing was timed")
    timings = []
    deadline = begun + 60 * arguments.minutes
    try:
        for timing in measure(device, arguments.contexts, arguments.batches, FORMS, seconds_per_call, deadline):
            timings.append(timing)
            place = f"{timing.what:28} {timing.tokens:7} x {timing.batch:2}"
            print(f"{place} {timing.microseconds:9.1f} us {timing.speed_up:5.2f}x", flush=True)
    finally:
        write(Path(arguments.out), "kv_speed", about, timings, table(timings))
    if time.monotonic() > deadline:
        print(f"cut after {arguments.minutes:g} minutes; give more with --minutes")


if __name__ == "__main__":
    main()
