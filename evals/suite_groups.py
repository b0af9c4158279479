"""What the GPU suite launches: groups of launches that can be compiled, checked and timed, each by itself.

Every launch is the one that a model makes: a `QuantizedLinear` moved to its device, so prepared. What is timed are CUDA
graphs over weights that no cache holds; what is checked are those very calls, against fp64, twice, and replayed three
times from the graph over outputs that were poisoned. A launch that is wrong is not timed.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.evals import suite_driver
from quantkit.evals.kernel_kinds import Kind, Layer
from quantkit.kernels import hadamard, trellis, viterbi
from quantkit.kernels.timing import Replays, copies, copy_bandwidth, timed

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
ROWS = (1, 16, 64, 300)
LIMIT = 6e-3
"""Limit of the relative error in bf16: one rounding of the result, and one of the weight or of x."""
GROUP_SECONDS = 60
"""What a group has; one that takes longer hangs: its process ends itself, and another goes on behind it."""


class Report:
    """Where a part writes what it finds.

    Args:
        path: of the results.
        part: its name.
    """

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part
        known = [record for record in suite_driver.read(path) if record.get("part") == part]
        self._begun = {(r["section"], r["place"], r["what"]) for r in known if r["kind"] == "begin"}
        self._key: dict[str, str] = {}

    def begin(self, section: str, place: str, what: str) -> bool:
        """Whether this group is new: the one of which an earlier attempt died, and those before it, are not repeated.

        Until the next `begin` all results are this group's.
        """
        self._key = {"section": section, "place": place, "what": what}
        if (section, place, what) in self._begun:
            return False
        self._write("begin")
        return True

    def check(self, column: str, detail: str, ok: bool) -> bool:
        """The result of a comparison, which is returned."""
        print(", ".join([*self._key.values(), column, detail]) + ("" if ok else ": WRONG"), flush=True)
        self._write("check", column=column, ok=ok, detail=detail)
        return ok

    def time(self, column: str, seconds: float, **more: Any) -> None:
        """A time; `more` as in `suite_driver`, a row of its own with `what`."""
        self._write("time", **{"column": column, "microseconds": round(1e6 * seconds, 3), **more})

    def note(self, text: str) -> None:
        """Something to be read."""
        suite_driver.append(self._path, {"kind": "note", "part": self._part, "text": text})

    def about(self, facts: dict[str, Any]) -> None:
        """What was measured on."""
        suite_driver.append(self._path, {"kind": "about", **facts})

    def _write(self, kind: str, **values: Any) -> None:
        suite_driver.append(self._path, {"kind": kind, "part": self._part, **self._key, **values})


class Run:
    """A part's run on a device.

    Args:
        device: the GPU.
        report: for its results.
        timing: whether launches are timed after they were checked.
        replays: makes a graph of calls.
        bandwidth: bytes a second of a copy on the device.
    """

    def __init__(
        self,
        device: torch.device,
        report: Report,
        timing: bool = True,
        replays: Callable[[Sequence[Callable[[], Any]]], Any] = Replays,
        bandwidth: float | None = None,
    ) -> None:
        self.device, self.report, self.timing, self.replays = device, report, timing, replays
        self.bandwidth = bandwidth or (copy_bandwidth(device) if timing else math.nan)
        self._known: dict[Any, Any] = {}

    def random(self, *shape: int) -> Tensor:
        """bf16 [*shape] of a normal distribution."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def distinct(self, nbytes: int, least: int = 8) -> int:
        """How many tensors of so many bytes a graph goes through."""
        return copies(nbytes, least) if self.timing else 2

    def dense(self, N: int, K: int, rows: Sequence[int]) -> dict[int, float]:
        """Seconds of torch's bf16 product by M; measured once a process, and reported."""

        def measure() -> dict[int, float]:
            """Times as many weights in turn as the caches do not hold."""
            weights = [self.random(N, K) for _ in range(self.distinct(2 * N * K))]
            found = {}
            for M in rows:
                x = self.random(M, K)
                found[M] = self.replays([call(torch.nn.functional.linear, x, weight) for weight in weights]).seconds()
                share = (2 * N * K + 2 * M * (N + K)) / found[M] / self.bandwidth
                self.baseline("torch bf16", f"M={M}", found[M], speed_up=1.0, bandwidth_share=share)
            return found

        return self.once(("dense", N, K), measure)

    def once(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, which a process calls once for a key."""
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def baseline(self, what: str, column: str, seconds: float, **more: Any) -> None:
        """Reports a time of what is not ours, which is not checked, beside the group's."""
        self.report.time(column, seconds, what=what, baseline=True, **more)

    def checked(self, column: str, calls: Sequence[Callable[[], Tensor]], exact: Tensor, limit: float = LIMIT) -> Any:
        """The calls' graph, or None where a result is wrong; exact, fp64 [...], is what the first call should give."""
        eager = calls[0]().clone(), calls[-1]().clone()
        error = relative_error(eager[0], exact)
        wrong = [] if error <= limit else [f"more than {limit:.0e} allows"]
        if not torch.equal(eager[0], calls[0]()):
            wrong.append("two runs differ")
        replays = self.replays(calls)
        for _ in range(3):
            found = replays.results[0], replays.results[-1]
            for result in found:
                result.fill_(math.nan)
            replays.replay()
            if not all(torch.equal(result, wanted) for result, wanted in zip(found, eager, strict=True)):
                wrong.append("a graph's replay gives another result")
                break
        detail = ", ".join([f"relative error {error:.2e}", *wrong])
        return replays if self.report.check(column, detail, not wrong) else None


@dataclass(frozen=True)
class Group:
    """Some launches of one kernel.

    Attributes:
        section, place, what: where a table shows them.
        launch: makes each once, on a device, to no end but that they are compiled.
        measure: checks and times them.
        patience: times GROUP_SECONDS that the group has.
    """

    section: str
    place: str
    what: str
    launch: Callable[[torch.device], object]
    measure: Callable[[Run], object]
    patience: int = 1

    def run(self, run: Run) -> None:
        """Measures, unless an earlier attempt did; what is raised is a wrong result, if the device still works."""
        if not run.report.begin(self.section, self.place, self.what):
            return
        signal.alarm(GROUP_SECONDS * self.patience)  # whose default action no waiting for a GPU holds up
        try:
            self.measure(run)
        except Exception as error:  # a kernel may raise anything
            run.report.check("raised", f"{type(error).__name__}: {_first_line(error)}", False)
            if run.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the process's context is lost, and a new one must go on
                torch.cuda.empty_cache()
        finally:
            signal.alarm(0)


def products(kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]], rows: Sequence[int] = ROWS) -> list[Group]:
    """Products with packed weights, every kind in every shape."""

    def group(kind: Kind, N: int, K: int) -> Group:
        """A weight's products with all numbers of rows."""

        def launch(device: torch.device) -> None:
            layer = kind.layer(N, K, device)
            for M in rows:
                layer.linear(torch.randn(M, K, device=device, dtype=torch.bfloat16))

        return Group("product", f"{N} x {K}", kind.name, launch, lambda run: _product(run, kind, N, K, rows))

    return [group(kind, N, K) for N, K in shapes for kind in kinds]


def _product(run: Run, kind: Kind, N: int, K: int, rows: Sequence[int]) -> None:
    base = run.dense(N, K, rows) if run.timing else {}
    layers = [kind.layer(N, K, run.device)]
    layers += [kind.layer(N, K, run.device, seed) for seed in range(1, run.distinct(layers[0].nbytes))]
    weight = layers[0].dequantize().double()
    for M in rows:
        x = run.random(M, K)
        calls = [call(layer.linear, x) for layer in layers]
        replays = run.checked(f"M={M}", calls, x.double() @ weight.T)
        if replays and run.timing:
            seconds = replays.seconds()
            moved = layers[0].nbytes + 2 * M * (N + K)
            share = moved / seconds / run.bandwidth
            run.report.time(f"M={M}", seconds, speed_up=base[M] / seconds, bandwidth_share=share)


def rotations(widths: Sequence[int], rows: Sequence[int] = ROWS) -> list[Group]:
    """Rotations by themselves."""

    def group(n: int) -> Group:
        def launch(device: torch.device) -> None:
            for M in rows:
                hadamard.rotate(torch.randn(M, n, device=device, dtype=torch.bfloat16), _signs(n, device))

        return Group("rotation", f"{n} features", "rotation", launch, lambda run: _rotation(run, n, rows))

    return [group(n) for n in widths]


def _signs(n: int, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, device=device)


def _rotation(run: Run, n: int, rows: Sequence[int]) -> None:
    signs = _signs(n, run.device)
    for M in rows:
        inputs = [run.random(M, n) for _ in range(8)]
        calls = [call(hadamard.rotate, x, signs) for x in inputs]
        replays = run.checked(f"M={M}", calls, hadamard.reference(inputs[0].double(), signs))
        if replays and run.timing:
            seconds = replays.seconds()
            run.report.time(f"M={M}", seconds, bandwidth_share=4 * M * n / seconds / run.bandwidth)


def host(kinds: Sequence[Kind], size: int = 4096, linears: int = 200) -> list[Group]:
    """Host time of calls, as of the linears of a token."""

    def group(kind: Kind | None) -> Group:
        def launch(device: torch.device) -> None:
            if kind:
                kind.layer(size, size, device).linear(torch.randn(1, size, device=device, dtype=torch.bfloat16))

        name = kind.name if kind else "torch bf16"
        return Group("host", f"{linears} linears", name, launch, lambda run: _host(run, kind, size, linears))

    return [group(kind) for kind in (None, *kinds)]


def _host(run: Run, kind: Kind | None, size: int, linears: int) -> None:
    x, column = run.random(1, size), "a call, eager"
    if kind is None:
        calls = [call(torch.nn.functional.linear, x, run.random(size, size)) for _ in range(linears)]
    else:
        layers: list[Layer] = [kind.layer(size, size, run.device, seed) for seed in range(linears)]
        calls = [call(layer.linear, x) for layer in layers]
        error = relative_error(calls[0](), x.double() @ layers[0].dequantize().double().T)
        if not run.report.check(column, f"relative error {error:.2e}", error <= LIMIT):
            return
    times = []
    for _ in range(6):  # the first warms up
        timed(run.device, lambda: None)
        start = time.perf_counter()
        for one in calls:
            one()
        times.append((time.perf_counter() - start) / linears)
    run.report.time(column, statistics.median(times[1:]), baseline=kind is None)


def searches(forms: Sequence[tuple[int, int]], size: int = 4096) -> list[Group]:
    """Viterbi's search for the codes of a layer; forms are (state bits, bits)."""

    def group(state_bits: int, bits: int) -> Group:
        def launch(device: torch.device) -> None:
            x = torch.randn(4, 64, device=device)
            viterbi.search(x, torch.empty(1 << state_bits, device=device), bits)

        name = f"trellis K={bits} L={state_bits}"
        return Group("search", f"{size} x {size}", name, launch, lambda run: _search(run, state_bits, bits, size))

    return [group(*form) for form in forms]


def _search(run: Run, state_bits: int, bits: int, size: int) -> None:
    values = trellis.table(state_bits, run.device).float()
    values = values / trellis.deviation(state_bits)
    x = torch.randn(4, 64, device=run.device)
    free = torch.full((4,), viterbi.FREE, dtype=torch.int64, device=run.device)
    losses = [
        float((x - values[states.long()]).square().sum())
        for states in (viterbi.search(x, values, bits), viterbi.reference(x, values, bits, free, free))
    ]
    difference = abs(losses[0] / losses[1] - 1)
    if run.report.check("a layer", f"loss differs by {difference:.1e}", difference < 1e-4) and run.timing:
        rings = torch.randn(size, size, device=run.device)
        viterbi.encode(rings[:8], values, bits)
        run.report.time("a layer", timed(run.device, lambda: viterbi.encode(rings, values, bits))[0])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| of [...] and fp64 [...], NaN where any number is."""
    return float((found.double() - exact).norm() / exact.norm())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def call(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """The call, to be made later."""
    return lambda: function(*arguments)


@torch.inference_mode()
def run_groups(groups: Iterator[Group] | Sequence[Group], run: Run, seconds: float = math.inf) -> None:
    """Measures one after the other; none is begun after so many seconds."""
    end = time.monotonic() + seconds
    for group in groups:
        if time.monotonic() > end:
            run.report.note(f"{seconds:.0f} s were not enough; the rest was left out")
            return
        group.run(run)
