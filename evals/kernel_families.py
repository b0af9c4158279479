"""What `kernel_build` compiles: the launches that each kernel's rules give, without a GPU and without tensors.

A family is a function (compute capability, quick) -> builds; `quick` is a subset for continuous integration: each width
once, on sm_90, which the bars are for, and each other GPU once, with one of the widths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from quantkit.kernels import (
    codebook_rule,
    hadamard,
    int_group_layout,
    int_group_matmul,
    kv_attention,
    pyramid_matmul,
    trellis_matmul,
)
from quantkit.kernels.bitpack import row_words
from quantkit.kernels.launching import pairs
from quantkit.kernels.trellis import ring_length
from quantkit.kernels.tuning import Config

INTEGER_BARS = {4: 3.2, 3: 4.2, 2: 3.3}
"""Most instructions per weight on sm_90 with up to 8 rows of x in bf16, by bits."""
PYRAMID_BARS = {("factored", 4, 32): 4.0, ("table", 16, 8): 5.6}
"""The same, by form, bits and dimension."""
CODEBOOK_BARS = {(4, 8, 0): 3.0, (6, 12, 0): 3.0}
"""The same, by v, bits and residual bits."""
TRELLIS_BARS = {(1, 8): 4.6, (2, 8): 4.5, (3, 8): 5.2, (4, 8): 4.5, (1, 16): 5.0, (2, 16): 4.9, (4, 16): 4.9}
"""The same, by bits and rows of x."""
NO_BAR = float("inf")
HALF, BRAIN = torch.float16, torch.bfloat16
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_SIZE = 4096
"""Rows and columns of the weights."""


@dataclass(frozen=True)
class Build:
    """One kernel as one launch would compile it.

    Attributes:
        name: of the build, in a table.
        arch: compute capability.
        kernel: the module and the function, "int_group_matmul_triton.decode_kernel".
        types: of pointer arguments.
        values: of integer arguments; what is a multiple of 16 is compiled as such. Those without one may be anything.
        constants: compile-time arguments.
        num_warps, num_stages: Triton's.
        weights: that one pass through the inner loop multiplies.
        static_shared: bytes of shared memory beside those that Triton knows of.
        bar: most instructions a weight.
        whole: whether all instructions count, instead of those of the inner loop.
        maxnreg: registers a thread, Triton's option; None leaves the choice to the assembler.
        stream: bytes of the packed weight that one pass through the inner loop reads.
        grid: programs of the launch.
    """

    name: str
    arch: int
    kernel: str
    types: dict[str, str]
    values: dict[str, int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    weights: int
    static_shared: int = 0
    bar: float = NO_BAR
    whole: bool = False
    maxnreg: int | None = None
    stream: float = 0
    grid: int = 0


Form = TypeVar("Form")


def _taken(forms: Sequence[Form], arch: int, quick: bool) -> Sequence[Form]:
    """The widths that are built for a GPU: all; in a quick run all on sm_90, and one on each other GPU."""
    if not quick or arch == 90:
        return forms
    return [forms[(80, 100, 120).index(arch) % len(forms)]]


def int_group(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `int_group_matmul`."""

    def build(
        kernel: str, M: int, bits: int, dtype: torch.dtype, zeros=False, rank=0, group=128, K=_SIZE, wide=False
    ) -> Build:
        arranged = not wide and int_group_layout.prefers(bits, K, group)
        problem = int_group_matmul.Problem(M, _SIZE, K, bits, group, dtype, arch, arranged=arranged)
        return _int_group(kernel, problem, zeros, rank, wide)

    for bits in _taken((2, 3, 4, 8), arch, quick):
        for M in (8,) if quick else (8, 16, 32):
            for dtype in (BRAIN,) if quick else (HALF, BRAIN):
                yield build("decode", M, bits, dtype)
                if not quick:
                    yield build("decode", M, bits, dtype, zeros=True)
    if quick and arch != 90:
        return
    for bits in (3,) if quick else (2, 3, 4, 8):
        if not quick:
            for M in (8, 16, 32):
                yield build("decode", M, bits, BRAIN, M > 8, group=64)
            yield build("decode", 16, bits, HALF, rank=64)
            yield build("decode", 8, bits, HALF, True, 16, group=32)
            yield build("gemm", 32, bits, HALF, K=4100)
            yield build("gemm", 8, bits, BRAIN, True, K=4100, group=64)
            yield build("gemm", 8, bits, BRAIN, True, group=48)
            yield build("gemm", 32, bits, BRAIN, True, group=16)
            yield build("dequantize", 256, bits, HALF)
        for M in (64,) if quick else (64, 128):
            yield build("gemm", M, bits, BRAIN, True)
        yield build("dequantize", 256, bits, BRAIN, True)
    for bits in () if quick else (4, 5):  # offsets of other programs' blocks
        for kernel, M in (("decode", 8), ("decode", 16), ("gemm", 64), ("dequantize", 256)):
            yield build(kernel, M, bits, BRAIN, True, group=32, wide=True)


def _int_group(kernel: str, p: int_group_matmul.Problem, zeros: bool, rank: int, wide: bool = False) -> Build:
    config = Config(1, 64, num_stages=3)
    if kernel != "dequantize":
        config = int_group_matmul.rule(p) if kernel == "decode" else int_group_matmul.gemm_rule(p)
    zero = int_group_layout.STORED if zeros else int_group_layout.WHOLE if p.bits > 2 else int_group_layout.BETWEEN
    constants = int_group_matmul.flags(p, zero) | {"BLOCK_N": config.block_n}
    if kernel != "decode":
        constants |= int_group_matmul.shape_flags(p)
    if kernel != "dequantize":
        constants |= {"BLOCK_M": config.block_m, "PAIRS": pairs(p.capability, config.block_m)}
    if kernel == "decode":
        constants |= {"SPLIT_K": config.split_k}
    types = {"codes_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*fp32" if wide else "*fp16"}
    words = p.K // 128 * constants["BLOCK_WORDS"] if p.arranged else row_words(p.K, p.bits)
    values = {"group_size": p.group_size, "full_tiles": p.K // 128, "words": words}
    plain = kernel == "decode" and p.capability == 90 and p.M <= 8 and p.group_size == 128
    name = f"{kernel} int{p.bits} g{p.group_size} M={p.M} {_NAMES[p.dtype]}{' zeros' if zeros else ''}"
    name += (" in fp32" if wide else "") + (f" rank {rank}" if rank else "") + (f" K={p.K}" if p.K % 128 else "")
    return _product(
        name, f"int_group_matmul_triton.{kernel}_kernel", p, config, types, values, constants, rank,
        bar=INTEGER_BARS.get(p.bits, NO_BAR) if plain else NO_BAR, bits=p.bits,
    )  # fmt: skip


def pyramid(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `pyramid_matmul`: forms are (bits, dimension, bits of an index)."""

    def build(kernel: str, M: int, form: tuple[int, int, int], dtype=BRAIN, rank=0, K=_SIZE) -> Build:
        return _pyramid(kernel, pyramid_matmul.Problem(M, _SIZE, K, *form, dtype, arch), rank)

    factored, table = (4, 32, 0), (16, 8, 15)
    for form in _taken((factored, table), arch, quick):
        for M in (8,) if quick else (8, 16, 32):
            yield build("", M, form)
            if not quick:
                yield build("", M, form, HALF)
    if quick and arch != 90:
        return
    for form in (factored, table):
        yield build("dequantize_", 256, form)
        if not quick:
            yield build("", 8, form, K=4100)
            yield build("", 32, form, HALF, K=4100)
            yield build("", 16, form, HALF, rank=64)
            yield build("", 8, form, torch.float32)
            yield build("dequantize_", 256, form, HALF)
    if not quick:
        for form in [*[(bits, 32, 0) for bits in (2, 3, 5, 6, 7, 8)], (4, 16, 0), (4, 64, 0), (5, 9, 0), (5, 6, 0)]:
            for M in (8, 16, 32):
                yield build("", M, form)
        for form in ((12, 8, 12), (14, 8, 12), (10, 8, 4)):
            yield build("", 8, form)


def _pyramid(kernel: str, p: pyramid_matmul.Problem, rank: int) -> Build:
    config = pyramid_matmul.dequantize_config(p) if kernel else pyramid_matmul.rule(p)
    constants = pyramid_matmul.constants(p, config) | {"BLOCK_N": config.block_n}
    if not kernel:
        constants |= {"BLOCK_M": config.block_m, "PAIRS": pyramid_matmul.pairs(p, config), "SPLIT_K": config.split_k}
        constants |= {} if p.index_bits else {"RAGGED": p.K % 128 != 0}
    types = dict.fromkeys(("codes_ptr", "factors_ptr", "points_ptr"), "*i32")
    types |= dict.fromkeys(("scales_ptr", "gains_ptr"), "*fp32")
    columns = p.K if p.index_bits else pyramid_matmul.padded(p.K)
    values = {"tiles": -(-p.K // 128), "words": row_words(columns, p.bits), "dimension": p.dimension}
    values |= {"factor_words": row_words(columns, 16)}
    name = f"pyramid {p.kernel} {kernel.replace('_', ' ')}D={p.dimension} {p.bits} bits M={p.M} {_NAMES[p.dtype]}"
    name += (f" rank {rank}" if rank else "") + (f" K={p.K}" if p.K % 128 else "")
    plain = not kernel and p.capability == 90 and p.M <= 8 and p.K % 128 == 0 and p.dtype == BRAIN
    return _product(
        name, f"pyramid_matmul_triton.{p.kernel}_{kernel}kernel", p, config, types, values, constants, rank,
        bar=PYRAMID_BARS.get((p.kernel, p.bits, p.dimension), NO_BAR) if plain else NO_BAR,
        bits=p.bits / 8 if p.index_bits else p.bits + 16 / p.dimension,
    )  # fmt: skip


def codebook(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `codebook_matmul`: forms are (v, bits, residual bits), first those of 2 bits, then of 3."""

    def build(kernel: str, M: int, form: tuple[int, int, int], dtype=BRAIN, rank=0, K=_SIZE, ranges=1) -> Build:
        more = ranges if form[2] else 0
        return _codebook(kernel, codebook_rule.Problem(M, _SIZE, K, *form, ranges, more, dtype, arch), rank)

    forms = ((2, 4, 0), (3, 6, 0), (4, 8, 0), (6, 12, 0), (8, 8, 8), (2, 6, 0), (4, 12, 0))
    for form in _taken(forms[2:5] if quick else forms, arch, quick):
        for M in (8,) if quick else (8, 16, 32):
            yield build("decode", M, form)
        if not quick:
            yield build("decode", 8, form, HALF)
    if quick and arch != 90:
        return
    yield build("dequantize", 256, (4, 8, 0))
    if quick:
        return
    yield build("decode", 8, (8, 16, 0))
    yield build("decode", 8, (4, 8, 0), K=4100)
    for form in ((1, 2, 0), (5, 9, 3), (7, 11, 0), (8, 8, 0), (12, 12, 0), (16, 16, 0)):
        yield build("decode", 8, form)
    for form in ((4, 8, 0), (6, 12, 0), (8, 8, 8)):
        yield build("decode", 8, form, ranges=4)
        yield build("decode", 8, form, HALF, rank=64)
        yield build("decode", 32, form, HALF, K=4100)
        yield build("dequantize", 256, form, HALF, ranges=4)


def _codebook(kernel: str, p: codebook_rule.Problem, rank: int) -> Build:
    config, weights, table = Config(1, 16, num_warps=8), 128 * 16 * p.v, 0
    if kernel == "decode":
        config = codebook_rule.rule(p)
        found = codebook_rule.lookup(p, config)
        weights, table = 128 * config.block_n * p.v // -(-p.v // found.window), found.table(p)
    constants: dict[str, Any] = p.flags | {"BLOCK_N": config.block_n}
    if kernel == "decode":
        constants |= {"WINDOW": found.window, "SECTIONS": found.sections, "SOURCE": found.source}
        constants |= {"COPIES": found.copies, "TWO": found.two, "BLOCK_M": config.block_m}
        constants |= {"PAIRS": pairs(p.capability, config.block_m), "SPLIT_K": config.split_k}
    types = dict.fromkeys(("codes_ptr", "more_codes_ptr"), "*i32")
    types |= dict.fromkeys(("books_ptr", "more_books_ptr"), "*fp16")
    values = {"words": row_words(p.K, p.bits), "more_words": row_words(p.K, p.residual_bits or p.bits)}
    values["range_tiles"], values["more_range_tiles"] = p.range_tiles
    bits = f"{p.bits}+{p.residual_bits}" if p.residual_bits else p.bits
    name = f"codebook {kernel} v{p.v} {bits} bits M={p.M} {_NAMES[p.dtype]}"
    name += (f" rank {rank}" if rank else "") + (f" K={p.K}" if p.K % 128 else "")
    name += f" {p.ranges} ranges" if p.ranges > 1 else ""
    plain = kernel == "decode" and p.capability == 90 and p.M <= 8 and p.K % 128 == 0 and p.dtype == BRAIN
    build = _product(
        name, f"codebook_matmul_triton.{kernel}_kernel", p, config, types, values, constants, rank, weights, table,
        bar=CODEBOOK_BARS.get((p.v, p.bits, p.residual_bits), NO_BAR) if plain else NO_BAR,
        bits=(p.bits + p.residual_bits) / p.v,
    )  # fmt: skip
    return replace(build, maxnreg=codebook_rule.registers(p, config) if kernel == "decode" else None)


def trellis(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `trellis_matmul`."""

    def build(kernel: str, M: int, bits: int, dtype=BRAIN, rank=0, K=_SIZE, state_bits=16, ends=()) -> Build:
        form = bits, state_bits, dtype, arch, 132, K, ends
        return _trellis(kernel, trellis_matmul.Problem(M, _SIZE, K, *form), rank)

    for bits in (2,) if quick else range(1, 9):
        for M in _taken((8, 16), arch, quick) if quick else (8, 16, 32):
            yield build("multiply", M, bits)
            if not quick:
                yield build("multiply", M, bits, HALF)
    if quick and arch != 90:
        return
    for bits in (3,) if quick else (2, 3):
        yield build("dequantize", 256, bits)
        yield build("multiply", 8, bits, HALF if quick else torch.float32)
        yield build("multiply", 8, bits, ends=(16, 24))
        if not quick:
            yield build("dequantize", 256, bits, ends=(16, 24))
            for M in (8, 16, 32):
                yield build("multiply", M, bits, state_bits=12)
                yield build("multiply", M, bits, K=4112)
                yield build("multiply", M, bits, HALF, K=4112)
                yield build("multiply", M, bits, HALF, K=4100)
            yield build("multiply", 16, bits, rank=64)
            yield build("multiply", 32, bits, torch.float32, K=4100)
            yield build("dequantize", 256, bits, HALF, K=4100)


def _trellis(kernel: str, p: trellis_matmul.Problem, rank: int) -> Build:
    config, maxnreg = Config(1, trellis_matmul.BLOCK_N, num_stages=1), None
    constants, columns = trellis_matmul.constants(p, config.num_warps), 16
    if kernel == "multiply":
        config = trellis_matmul.rule(p)
        constants = trellis_matmul.constants(p, config.num_warps) | trellis_matmul.tile_constants(p, config)
        maxnreg, columns = trellis_matmul.registers(p, config), 16 * constants["CHUNKS"]
        constants["PDL"] = False
    types = {"codes_ptr": "*i32", "scales_ptr": "*u8", "scale_ptr": "*fp32"}
    values = {"lines": ring_length(p.N) * p.bits // 32}
    name = f"trellis {kernel} K={p.bits} L={p.state_bits} M={p.M} {_NAMES[p.dtype]}"
    name += (f" rank {rank}" if rank else "") + (f" {p.K} columns" if p.K % 128 else "")
    name += f" {len(p.ends) + 1} parts" if p.ends else ""
    plain = kernel == "multiply" and (p.capability, p.dtype, p.state_bits, p.K % 128) == (90, BRAIN, 16, 0)
    found = _product(
        name, f"trellis_matmul_triton.{kernel}_kernel", p, config, types, values, constants, rank,
        weights=128 * columns * config.num_warps,
        bar=TRELLIS_BARS.get((p.bits, p.M), NO_BAR) if plain else NO_BAR, bits=p.bits,
    )  # fmt: skip
    return replace(found, maxnreg=maxnreg)


def experts(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of experts' kernels, of the forms in which a GPU holds weights."""
    for bits in _taken((2, 3, 4, 8), arch, quick):
        for dtype in (BRAIN,) if quick else (HALF, BRAIN):
            for zeros, group in ((False, 128),) if quick else ((False, 128), (True, 128), (False, 64), (True, 32)):
                arranged = int_group_layout.prefers(bits, _SIZE, group)
                problem = int_group_matmul.Problem(1, _SIZE, _SIZE, bits, group, dtype, arch, arranged=arranged)
                build = _of_experts(_int_group("decode", problem, zeros, 0), "int_group_matmul_triton")
                config = int_group_matmul.expert_rule(problem, zeros)
                constants = build.constants | {"BLOCK_N": config.block_n}
                weights = 128 * config.block_n
                yield replace(build, constants=constants, num_warps=config.num_warps, weights=weights)
    quickly = (3,) if arch in (90, 120) else ()
    for bits in quickly if quick else range(1, 9):
        for dtype in (BRAIN,) if quick else (HALF, BRAIN, torch.float32):
            for state_bits in (16,) if quick or bits not in (2, 3) else (12, 16):
                p = trellis_matmul.Problem(1, _SIZE, _SIZE, bits, state_bits, dtype, arch, 132, _SIZE)
                most = trellis_matmul.expert_registers(p, trellis_matmul.rule(p))
                yield replace(_of_experts(_trellis("multiply", p, 0), "trellis_matmul_triton"), maxnreg=most)


def _of_experts(build: Build, module: str) -> Build:
    """The build of a single weight's kernel as that of a stack's."""
    constants = {name: value for name, value in build.constants.items() if name not in ("BLOCK_R", "ENDS", "PDL")}
    return replace(
        build, name=f"experts {build.name}", kernel=f"{module}.experts_kernel", bar=NO_BAR,
        types=build.types | {"chosen_ptr": "*i64"}, values=build.values | {"codes_each": 4096, "scales_each": 4096},
        constants=constants | {"PER_ROW": 8}, grid=8 * build.grid,
    )  # fmt: skip


def rotation(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `rotate`: widths with and without a core, few rows and many."""
    widths = (4096, 14336) if quick else (64, 896, 4096, 5120, 11008, 14336, 18944, 28672)
    for n in _taken(widths, arch, quick):
        for rows in (1,) if quick else (1, 2048):
            for dtype in (BRAIN,) if quick else (BRAIN, torch.float32):
                chosen = hadamard.sizes(rows, n, dtype)
                constants: dict[str, Any] = hadamard.constants(n, False, chosen)
                constants |= {"INTERPRETED": False, "PDL": False}
                pointer = f"*{_NAMES[dtype]}"
                yield Build(
                    f"rotate {n} M={rows} {_NAMES[dtype]} sm_{arch}", arch, "hadamard_triton.rotate_kernel",
                    {"x_ptr": pointer, "y_ptr": pointer, "signs_ptr": "*u8"}, {"stride_x": n}, constants,
                    chosen.num_warps, 1, chosen.inner * chosen.block_v * min(chosen.block_g, constants["CORE"]),
                    whole=True,
                )  # fmt: skip


def kv_cache(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `kv_attention`, the merging of its shares among them."""
    widths = ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8))
    for k_bits, v_bits in ((3, 3),) if quick else widths:
        for size in (128,) if quick else (64, 128, 256):
            if v_bits == 8 and size == 256:
                continue  # its groups of 64 channels are less than a word's field, which the kernel refuses
            corrections = ((0, 0), (4, 0), (4, 2)) if not quick else ((4, 2),) if arch == 90 else ((0, 0),)
            for rank, kept in corrections if k_bits < 8 else ((0, 0),):
                yield _kv_cache(arch, k_bits, v_bits, size, rank, kept)
    for size in (64, 128, 256) if not quick else (128,) if arch == 90 else ():
        types = dict.fromkeys(("acc_ptr", "max_ptr", "sum_ptr"), "*fp32") | {"output_ptr": "*bf16"}
        warps, constants = max(1, size // 64), {"D": size, "BLOCK": 16}
        name = f"kv attention merge D={size} sm_{arch}"
        yield Build(
            name, arch, "kv_attention_triton.merge_kernel", types, {}, constants, num_warps=warps, num_stages=2,
            weights=16 * size,
        )  # fmt: skip


def _kv_cache(arch: int, bits: int, v_bits: int, size: int, rank: int, kept: int) -> Build:
    pointers = {
        "fp16": "scaled k_scale k_low v_scale v_low down up_scale up_low kept turned buffer_k buffer_v sink_k sink_v",
        "i16": "k v", "fp32": "acc max sum", "u8": "up index mask", "bf16": "q",
    }  # fmt: skip
    types = {f"{name}_ptr": f"*{kind}" for kind, names in pointers.items() for name in names.split()}
    types["factor"] = "fp32"
    heads = ("q", "k", "k_scale", "v", "v_scale", "up", "up_scale", "kept", "buffer", "sink")
    values = {f"{name}_head": 16 for name in heads} | {"tokens": 16, "share": 64, "q_batch": 16, "q_row": 16}
    block, warps, stages = kv_attention.launch_shape(size, 64, bits, v_bits, rank, kept, arch)
    constants = {
        "BLOCK_N": block, "D": size, "K_BITS": bits, "V_BITS": v_bits, "K_GROUP": 64, "GROUPS": size // 64,
        "RANK": rank, "UP_BITS": 8, "UP_GROUP": 64, "KEPT": kept, "MASKED": False, "ASM": True, "INTERPRETED": False,
    }  # fmt: skip
    parts = [f"kv attention int{bits}/{v_bits} D={size}", f" rank {rank}" * (rank > 0), " sparse" * (kept > 0)]
    return Build(
        "".join(parts) + f" sm_{arch}", arch, "kv_attention_triton.decode_kernel", types, values, constants,
        num_warps=warps, num_stages=stages, weights=2 * block * size, maxnreg=255,
    )  # fmt: skip


def viterbi(arch: int, quick: bool) -> Iterator[Build]:
    """Builds of `viterbi`'s search: most states, and fewer."""
    from quantkit.kernels import viterbi_triton

    forms = [(states, bits) for states in (16, 12, 8) for bits in range(1, 9) if 2 * bits <= states]
    for state_bits, bits in _taken(((16, 2), (16, 4)), arch, quick) if quick else forms:
        constants, options = viterbi_triton.sizes(bits, 1 << state_bits)
        types = dict.fromkeys(("x_ptr", "values_ptr", "cost_ptr"), "*fp32") | {"states_ptr": "*i32"}
        types |= dict.fromkeys(("first_ptr", "last_ptr"), "*i64") | {"choice_ptr": "*u8"}
        yield Build(
            f"viterbi L={state_bits} K={bits} sm_{arch}", arch, "viterbi_triton.search_kernel", types, {}, constants,
            weights=constants["BLOCK"] * constants["UNROLL"], whole=True, **options,
        )  # fmt: skip


FAMILIES = (int_group, pyramid, codebook, trellis, experts, rotation, kv_cache, viterbi)


def _product(
    name: str, kernel: str, problem: Any, config: Config, types: dict[str, str], values: dict[str, int],
    constants: dict[str, Any], rank: int, weights: int | None = None, static_shared: int = 0, bar: float = NO_BAR,
    bits: float = 0,
) -> Build:  # fmt: skip
    """What all kernels that multiply or dequantize have in common is added here; `bits` are those of a weight."""
    dense = dict.fromkeys(("x_ptr", "up_ptr", "inner_ptr", "bias_ptr", "y_ptr", "weight_ptr"))
    types = dict.fromkeys(dense, f"*{_NAMES[problem.dtype]}") | {"partial_ptr": "*fp32", "arrived_ptr": "*i32"} | types
    values = {"N": problem.N, "K": problem.K, "stride_xm": problem.K, "rank": rank} | values
    constants = {"ASM": True, "INTERPRETED": False} | constants
    if "BLOCK_M" in constants:
        constants |= {"HAS_BIAS": False, "BLOCK_R": 16 if rank else 0}
    weights = weights or 128 * config.block_n
    found = Build(
        f"{name} sm_{problem.capability}", problem.capability, kernel, types, values, constants, config.num_warps,
        config.num_stages, weights, static_shared, bar,
    )  # fmt: skip
    if "SPLIT_K" not in constants:
        return found
    blocks = _codebook_blocks(problem, config) if "V" in constants else -(-problem.N // config.block_n)
    grid = blocks * -(-problem.M // config.block_m) * config.split_k
    return replace(found, stream=weights * bits / 8, grid=grid)


def _codebook_blocks(p: codebook_rule.Problem, config: Config) -> int:
    return -(-p.vectors // config.block_n) * -(-p.v // codebook_rule.lookup(p, config).window)
