"""Compiles what parts of the GPU suite would launch, many processes side by side, without touching a GPU.

    python -m quantkit.evals.suite_builds PART ... [--results FILE] [--arch 90] [--jobs N]

Processes that see no GPU call the parts' own groups on one that is not there (`absent_gpu`), so that what is compiled
is what is launched. The kernels come to Triton's cache on disk, where the parts find them. Told are kernels that do not
compile, spill registers, or ask for more shared memory than the GPU has; exit code 1 then.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.evals import suite_driver
from quantkit.evals.absent_gpu import GPU, SHARED_MEMORY, Compiled, absent_gpu, shared_memory
from quantkit.evals.kernel_build import resources
from quantkit.evals.suite_parts import PARTS


@dataclass(frozen=True)
class Built:
    """A binary.

    Attributes:
        what: it was compiled for.
        compiled: what Triton says of it.
        registers: a thread.
        spills: bytes of local memory a thread.
        shared: bytes of shared memory a program, static and dynamic.
        seconds: of a processor, for all that the launch did since the one before it, which is to compile.
    """

    what: str
    compiled: Compiled
    registers: int
    spills: int
    shared: int
    seconds: float

    def faults(self, arch: int) -> list[str]:
        """What is wrong with it."""
        name, most = f"{self.what}: {self.compiled.kernel}", shared_memory(arch)
        wrong = [f"{name}: {self.spills} bytes spilled"] if self.spills else []
        over = f"{name}: {self.shared} bytes of shared memory; sm_{arch} has {most}"
        return [*wrong, over] if self.shared > most else wrong


Job = tuple[str, str, GPU]


def jobs_of(parts: Sequence[str], gpu: GPU) -> list[Job]:
    """(part, what, GPU): the groups of one kernel are one job, as they have binaries in common; long ones first."""
    sizes: dict[str, tuple[int, str]] = {}
    for part in parts:
        for group in PARTS[part].groups():
            count, _ = sizes.get(group.what, (0, ""))
            sizes[group.what] = count + 1, f"{sizes[group.what][1]}\n{part}" if count else part
    found = [(count, "\n".join(dict.fromkeys(names.split("\n"))), what) for what, (count, names) in sizes.items()]
    return [(names, what, gpu) for _, names, what in sorted(found, reverse=True)]


def compile_job(job: Job) -> tuple[list[Built], list[str]]:
    """(binaries, what failed) of a job."""
    parts, what, gpu = job
    compiled: dict[str, tuple[Compiled, float]] = {}
    failed, before = [], _processor_seconds()

    def told(one: Compiled) -> None:
        """Keeps a kernel with the processor's seconds since the one before."""
        nonlocal before
        now = _processor_seconds()
        compiled.setdefault(one.key, (one, now - before))
        before = now

    for part in parts.split("\n"):
        for group in PARTS[part].groups():
            if group.what != what:
                continue
            try:
                with absent_gpu(gpu, told) as device:
                    group.launch(device)
            except Exception as error:  # Triton's passes and ptxas raise many kinds
                lines = str(error).strip().splitlines() or [""]
                failed.append(f"{what}, {group.place}: {type(error).__name__}: {lines[0]}")
    built = []
    for one, seconds in compiled.values():
        registers, spills, static = resources(Path(one.cubin).read_bytes())
        built.append(Built(what, one, registers, spills, one.shared + static, seconds))
    return built, failed


def _processor_seconds() -> float:
    """Of this process and those that it waited for, the assembler among them."""
    return sum(os.times()[:4])


def compile_all(parts: Sequence[str], gpu: GPU, jobs: int) -> Iterator[tuple[list[Built], list[str]]]:
    """The jobs' results as they come."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in the processes: each would take memory of a GPU for its context
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(compile_job, jobs_of(parts, gpu))


def gpu_in(results: Path | None, arch: int) -> GPU:
    """The GPU that the results tell of, or one of a compute capability."""
    for record in suite_driver.read(results) if results else []:
        if record["kind"] == "about" and "arch" in record:
            return GPU(record["arch"], record["multiprocessors"], record["gpu"])
    return GPU(arch)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--results", type=Path, help="the suite's results, which say what GPU there is")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_MEMORY), help="where they do not")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, which turns the compiler off; unset it")
    sys.exit(run(arguments.parts, gpu_in(arguments.results, arguments.arch), arguments.jobs, arguments.results))


def run(parts: Sequence[str], gpu: GPU, jobs: int, results: Path | None = None) -> int:
    """Compiles, prints a line for each binary and a sum, and returns the exit code."""
    import triton

    begun, keys, wrong, seconds, spills, new = time.monotonic(), set(), [], 0.0, 0, 0
    print(f"triton {triton.__version__}, sm_{gpu.arch}, {jobs} processes")
    print(f"{'for':42} {'kernel':26} {'registers':>9} {'spills':>6} {'shared':>7} {'seconds':>7}")
    for built, failed in compile_all(parts, gpu, jobs):
        wrong += failed
        for one in built:
            if one.compiled.key in keys:
                continue
            keys.add(one.compiled.key)
            wrong += one.faults(gpu.arch)
            spills += one.spills
            seconds += 0.0 if one.compiled.cached else one.seconds
            new += not one.compiled.cached
            took = "cached" if one.compiled.cached else f"{one.seconds:.1f}"
            sizes = f"{one.registers:9} {one.spills:6} {one.shared:7} {took:>7}"
            print(f"{one.what[:42]:42} {one.compiled.kernel:26} {sizes}", flush=True)
    text = f"{len(keys)} kernels in {time.monotonic() - begun:.0f} s by {jobs} processes; {new} were new, "
    text += f"{seconds:.0f} s of a processor; {spills} bytes spilled"
    for line in (text, *wrong):
        print(line, flush=True)
        if results:
            suite_driver.append(results, {"kind": "note", "part": "compile", "text": line})
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
