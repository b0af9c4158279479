"""Ahead-of-time compile of the kernels: no GPU needed, and what the compiler made of them is held against bars.

    python -m quantkit.evals.kernel_build [--quick] [--arch 80 90 100 120] [--json FILE] [--against FILE]

Compiles every kernel in every configuration that the shape rules give (`kernel_families`), and prints registers,
spilled bytes, shared memory and the machine instructions that the inner loop spends on a weight: instructions of the
loop x threads / weights that pass (of rotations and searches, which have no such loop: of a program, on a number, or
on a state of those taken at once). Of these instructions those are also counted by themselves that go through

    ALU    half as many lanes a clock as threads that can be issued (64 a multiprocessor): logic, shifts, permutations,
           integer sums, comparisons, selections, conversions of fp32 to pairs of 16 bits
    FMA    multiplications, of integers too, and sums of floats, alone and in pairs of 16 bits

by opcode, as Nsight Compute's documentation describes the pipelines ("Metrics Decoder"); moves go where there is room
and count in neither. Programs that a multiprocessor holds follow from registers, shared memory and warps. Bytes in
flight are those of the packed weight that one multiprocessor of 132 waits for when 4096 x 4096 weights are multiplied:
the tiles that the loop asks for ahead, by cp.async one less than there are stages, by plain loads one, times the
programs that share a multiprocessor.

Asserts that nothing spills, that shared memory fits the GPU, and the bars on sm_90.
`--quick` is the subset for continuous integration. `--against` fails where a figure is more than 5% above a recorded
table that the same version of Triton made.
"""

import argparse
import importlib
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

from quantkit.evals.absent_gpu import SHARED_MEMORY
from quantkit.evals.kernel_families import FAMILIES, Build

SHARED_MEMORY_OF_ALL = {80: 167936, 90: 233472, 100: 233472, 120: 102400}
"""Bytes that the programs of a multiprocessor may use, 1 KiB a program for the driver included."""
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
"""Warps that a multiprocessor holds."""
_ALU = re.compile(
    r"^(LOP3|SHF|PRMT|IADD3?|LEA|ISETP|SEL|FSEL|FSETP|FMNMX3?|IMNMX|VIMNMX3?|VIADD|PLOP3|P2R|R2P|BMSK|SGXT|IABS|LOP|SHL"
    r"|SHR|F2FP|HSETP2|HMNMX2|VIADDMNMX|F2F|I2FP)\b"
)
_FMA = re.compile(r"^(FFMA2?|FMUL2?|FADD2?|IMAD|IMUL|IDP|HFMA2|HMUL2|HADD2|FSWZADD)\b")
MULTIPROCESSORS = 132
_MMA = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)\b")


@dataclass(frozen=True)
class Figures:
    """What came out of a build.

    Attributes:
        name: of the build.
        registers: a thread.
        spills: bytes of local memory a thread.
        shared: bytes of shared memory a program.
        instructions_per_weight: in the inner loop.
        alu_per_weight, fma_per_weight: of these, by pipeline.
        programs: that a multiprocessor holds.
        in_flight: bytes of the packed weight that a multiprocessor waits for; 0 where none streams.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions_per_weight: float
    alu_per_weight: float = 0.0
    fma_per_weight: float = 0.0
    programs: int = 0
    in_flight: int = 0


def builds(archs: list[int], quick: bool) -> Iterator[Build]:
    """All builds, or a subset that has each kernel on each GPU, and each width, once at least."""
    for family in FAMILIES:
        for arch in archs:
            yield from family(arch, quick)


def compile_build(build: Build) -> Any:
    """What Triton makes of a build."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = build.kernel.split(".")
    fn = getattr(importlib.import_module(f"quantkit.kernels.{module}"), function)
    signature, aligned = {}, {}
    for index, name in enumerate(fn.arg_names):
        signature[name] = "constexpr" if name in build.constants else build.types.get(name, "i32")
        if name in build.types or (
            name in build.values and name not in build.constants and build.values[name] % 16 == 0
        ):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, build.constants, aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "maxnreg": build.maxnreg}
    return triton_compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)


def figures(build: Build) -> Figures:
    """Compiles, and reads the machine code."""
    binary = compile_build(build)
    registers, spills, _ = resources(binary.asm["cubin"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = _nvidia_tool("nvdisasm", "-c", file.name)
    loop = inner_loop(listing, build.whole)
    shared = binary.metadata.shared + build.static_shared
    total, alu, fma = (
        round(count * 32 * build.num_warps / build.weights, 2)
        for count in (len(loop), _count(loop, _ALU), _count(loop, _FMA))
    )
    programs = resident(build.arch, registers, shared, build.num_warps)
    ahead = build.num_stages - 1 if any(text.startswith("LDGSTS") for text in loop) else 1
    in_flight = round(build.stream * ahead * min(programs, build.grid / MULTIPROCESSORS))
    return Figures(build.name, registers, spills, shared, total, alu, fma, programs, in_flight)


def _count(instructions: list[str], opcodes: re.Pattern[str]) -> int:
    """Moves that are written as a multiplication are moves."""
    return sum(bool(opcodes.match(text)) and not text.startswith("IMAD.MOV") for text in instructions)


def resident(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds; registers come in units of 256 a warp, shared memory with 1 KiB more."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, SHARED_MEMORY_OF_ALL[arch] // (shared + 1024), WARPS[arch] // warps, 32)


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of local memory a thread, bytes of static shared memory a program) of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
    registers, shared = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "SHARED"))
    return registers, sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)), shared


def attempt(build: Build) -> Figures | str:
    """The figures of a build, or why there are none."""
    try:
        return figures(build)
    except Exception as error:  # Triton's passes and ptxas raise many kinds
        return f"{build.name}: does not compile ({str(error).splitlines()[0]})"


def inner_loop(listing: str, whole: bool = False) -> list[str]:
    """The instructions of the longest loop with a tensor-core instruction. All where `whole` or there is none."""
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
    return max(multiplying, key=len) if multiplying and not whole else instructions


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
    if build.static_shared and found.shared > 49152 >= found.shared - build.static_shared:
        wrong.append(f"{found.name}: Triton asks the driver for more than 48 KiB only where its own buffers take more")
    if found.instructions_per_weight > build.bar:
        wrong.append(f"{found.name}: {found.instructions_per_weight} instructions a weight; the bar is {build.bar}")
    return wrong


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the subset for continuous integration")
    parser.add_argument("--only", help="builds whose name this regular expression finds")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_MEMORY), choices=sorted(SHARED_MEMORY))
    parser.add_argument("--json", type=Path, help="write the table")
    parser.add_argument("--against", type=Path, help="a recorded table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, which turns the compiler off; unset it")
    import triton

    print(f"triton {triton.__version__}")
    heads = f"{'instructions/weight':>19} {'ALU':>5} {'FMA':>5} {'programs':>8} {'in flight':>9}"
    print(f"{'build':60} {'registers':>9} {'spills':>6} {'shared':>7} {heads}")
    every = builds(arguments.arch, arguments.quick)
    todo, rows, wrong = [build for build in every if re.search(arguments.only or "", build.name)], [], []
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:  # all is imported, and nothing has run yet
        for build, found in zip(todo, pool.imap(attempt, todo), strict=True):
            if isinstance(found, str):
                wrong.append(found)
                continue
            rows.append(found)
            wrong += faults(build, found)
            print(
                f"{found.name:60} {found.registers:9} {found.spills:6} {found.shared:7} "
                f"{found.instructions_per_weight:19.2f} {found.alu_per_weight:5.2f} {found.fma_per_weight:5.2f} "
                f"{found.programs:8} {found.in_flight:9}",
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
