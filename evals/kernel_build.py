"""Ahead-of-time compile of the kernels: no GPU needed, and what the compiler made of them is held against bars.

    python -m quantkit.evals.kernel_build [--quick] [--arch 80 90 100 120] [--json FILE] [--against FILE]

Compiles every kernel in every configuration that the shape rules give, and prints registers, spilled bytes, shared
memory and the machine instructions that the inner loop spends on a weight (instructions of the loop x threads /
weights that pass). Asserts that nothing spills, that shared memory fits the GPU, and the bars on sm_90. `--quick` is
the subset for continuous integration. `--against` fails where a figure is more than 5% above a recorded table that the
same version of Triton made.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.kernels.bitpack import row_words
from quantkit.kernels.int_group_matmul import Problem, flags, gemm_rule, pairs, rule
from quantkit.kernels.tuning import Config

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that a program may use, by compute capability."""
BARS = {4: 3.2, 3: 4.2, 2: 3.3}
"""Most instructions per weight on sm_90 with up to 8 rows of x, by bits."""
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_MMA = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)\b")


@dataclass(frozen=True)
class Build:
    """One kernel as one launch would compile it.

    Attributes:
        kernel: its name without `_kernel`.
        arch: compute capability.
        problem: the launch.
        zeros: whether zero points are stored.
        rank: of a low-rank correction; 0 for none.
    """

    kernel: str
    arch: int
    problem: Problem
    zeros: bool = False
    rank: int = 0

    @property
    def config(self) -> Config:
        """The launch's sizes."""
        if self.kernel == "decode":
            return rule(self.problem)
        return gemm_rule(self.problem) if self.kernel == "gemm" else Config(1, 64, num_stages=3)

    def name(self) -> str:
        """Names the build in a table."""
        p, zeros = self.problem, " zeros" if self.zeros else ""
        rank = f" rank {self.rank}" if self.rank else ""
        ragged = f" K={p.K}" if p.K % 128 else ""
        return (
            f"{self.kernel} int{p.bits} g{p.group_size} M={p.M} {_DTYPES[p.dtype]}{zeros}{rank}{ragged} sm_{self.arch}"
        )


@dataclass(frozen=True)
class Figures:
    """What came out of a build.

    Attributes:
        name: of the build.
        registers: a thread.
        spills: bytes of local memory a thread.
        shared: bytes of shared memory a program.
        instructions_per_weight: in the inner loop.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions_per_weight: float


def builds(archs: list[int], quick: bool) -> Iterator[Build]:
    """All builds, or a subset that has each kernel, width and GPU once at least."""
    for arch in archs:

        def problem(M: int, bits: int, dtype: torch.dtype, group_size: int = 128, K: int = 4096, arch: int = arch):
            return Problem(M, 4096, K, bits, group_size, dtype, arch)

        half, brain = torch.float16, torch.bfloat16
        for bits in (2, 3, 4, 8):
            for M in (8,) if quick else (8, 16, 32):
                for dtype in (brain,) if quick else (half, brain):
                    yield Build("decode", arch, problem(M, bits, dtype))
                    if not quick:
                        yield Build("decode", arch, problem(M, bits, dtype), zeros=True)
        if quick and arch != 90:
            continue
        for bits in (3,) if quick else (2, 3, 4, 8):
            if not quick:
                for M in (8, 16, 32):
                    yield Build("decode", arch, problem(M, bits, brain, group_size=64), zeros=M > 8)
                yield Build("decode", arch, problem(16, bits, half), rank=64)
                yield Build("decode", arch, problem(8, bits, half, group_size=32), zeros=True, rank=16)
                yield Build("gemm", arch, problem(32, bits, half, K=4100))
                yield Build("gemm", arch, problem(8, bits, brain, K=4100, group_size=64), zeros=True)
                yield Build("gemm", arch, problem(8, bits, brain, group_size=48), zeros=True)
                yield Build("gemm", arch, problem(32, bits, brain, group_size=16), zeros=True)
                yield Build("dequantize", arch, problem(256, bits, half))
            for M in (64,) if quick else (64, 128):
                yield Build("gemm", arch, problem(M, bits, brain), zeros=True)
            yield Build("dequantize", arch, problem(256, bits, brain), zeros=True)


def compile_build(build: Build) -> tuple[Any, Config]:
    """(what Triton made, the launch's sizes)."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import quantkit.kernels.int_group_matmul_triton as kernels

    p, config = build.problem, build.config
    fn = getattr(kernels, f"{build.kernel}_kernel")
    machine = {"ASM": True, "INTERPRETED": False, "BLOCK_N": config.block_n}
    constants: dict[str, Any] = {**flags(p, build.zeros), **machine}
    if build.kernel != "dequantize":
        block_r = min(32, build.rank)
        constants |= {"HAS_BIAS": False, "BLOCK_R": block_r, "BLOCK_M": config.block_m, "PAIRS": pairs(p, config)}
    if build.kernel == "decode":
        groups = 128 // p.group_size if p.group_size < 128 else 1
        constants |= {"GROUPS": groups, "SPLIT_K": config.split_k}
        constants = {k: v for k, v in constants.items() if not k.startswith(("TAIL", "WHOLE"))}
    x = f"*{_DTYPES[p.dtype]}"
    types = dict.fromkeys(("x_ptr", "up_ptr", "inner_ptr", "bias_ptr", "y_ptr", "weight_ptr"), x)
    types |= {"codes_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*fp16"}
    types |= {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    values = {"N": p.N, "K": p.K, "stride_xm": p.K, "group_size": p.group_size, "full_tiles": p.K // 128}
    values |= {"words": row_words(p.K, p.bits), "rank": build.rank}
    signature, aligned = {}, {}
    for index, name in enumerate(fn.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in types or (name in values and name not in constants and values[name] % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton_compile(source, target=GPUTarget("cuda", build.arch, 32), options=options), config


def figures(build: Build) -> Figures:
    """Compiles, and reads the machine code."""
    binary, config = compile_build(build)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        listing = _nvidia_tool("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    loop = inner_loop(listing)
    weights = 128 * config.block_n
    per_weight = len(loop) * 32 * config.num_warps / weights
    return Figures(build.name(), registers, spills, binary.metadata.shared, round(per_weight, 2))


def attempt(build: Build) -> Figures | str:
    """The figures of a build, or why there are none."""
    try:
        return figures(build)
    except Exception as error:  # Triton's passes and ptxas raise many kinds
        return f"{build.name()}: does not compile ({str(error).splitlines()[0]})"


def inner_loop(listing: str) -> list[str]:
    """The instructions of the longest loop with a tensor-core instruction (of the whole kernel where there is none)."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            text = re.sub(r"^@!?U?P\w+\s+", "", instruction.group(1))
            instructions.append(text)
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
            if target and target.group(1) in labels:
                loops.append(instructions[labels[target.group(1)] :])
    multiplying = [loop for loop in loops if any(_MMA.match(text) for text in loop)]
    return max(multiplying, key=len) if multiplying else instructions


def _nvidia_tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def faults(build: Build, found: Figures) -> list[str]:
    """What is wrong with a build."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.name}: {found.spills} bytes spilled")
    if found.shared > SHARED_MEMORY[build.arch]:
        wrong.append(
            f"{found.name}: {found.shared} bytes of shared memory; sm_{build.arch} has {SHARED_MEMORY[build.arch]}"
        )
    p = build.problem
    plain = build.kernel == "decode" and build.arch == 90 and p.M <= 8 and p.group_size == 128
    if plain and found.instructions_per_weight > BARS.get(p.bits, float("inf")):
        wrong.append(f"{found.name}: {found.instructions_per_weight} instructions a weight; the bar is {BARS[p.bits]}")
    return wrong


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the subset for continuous integration")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_MEMORY), choices=sorted(SHARED_MEMORY))
    parser.add_argument("--json", type=Path, help="write the table")
    parser.add_argument("--against", type=Path, help="a recorded table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, which turns the compiler off; unset it")
    import triton

    print(f"triton {triton.__version__}")
    print(f"{'build':60} {'registers':>9} {'spills':>6} {'shared':>7} {'instructions/weight':>19}")
    todo, rows, wrong = list(builds(arguments.arch, arguments.quick)), [], []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for build, found in zip(todo, pool.imap(attempt, todo), strict=True):
            if isinstance(found, str):
                wrong.append(found)
                continue
            rows.append(found)
            wrong += faults(build, found)
            print(
                f"{found.name:60} {found.registers:9} {found.spills:6} {found.shared:7} "
                f"{found.instructions_per_weight:19.2f}",
                flush=True,
            )
    if arguments.against:
        wrong += regressions(json.loads(arguments.against.read_text()), rows, triton.__version__)
    if arguments.json:
        table = {"triton": triton.__version__, "builds": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    for line in wrong:
        print(line)
    print(f"spills: {sum(row.spills for row in rows)}")
    sys.exit(1 if wrong else 0)


def regressions(recorded: dict[str, Any], rows: list[Figures], version: str) -> list[str]:
    """Figures more than 5% above those of a table that the same Triton made."""
    if recorded["triton"] != version:
        print(f"the recorded table is of triton {recorded['triton']}; not compared")
        return []
    before = {row["name"]: row["instructions_per_weight"] for row in recorded["builds"]}
    return [
        f"{row.name}: {row.instructions_per_weight} instructions a weight; {before[row.name]} were recorded"
        for row in rows
        if row.name in before and row.instructions_per_weight > 1.05 * before[row.name]
    ]


if __name__ == "__main__":
    main()
