"""Processes that share a run's work, as torchrun and `accelerate launch` start them; one alone is one of them.

What is shared is divided in a way that does not depend on how many there are: batches are whole, sums are added up a
batch at a time in their order, a layer is packed by one process. So every number of processes ends with the same bytes.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from quantkit.core.device import pick_device
from quantkit.core.errors import Elsewhere, QuantkitError, first_line

T = TypeVar("T")
CPU = torch.device("cpu")
BUNDLE = 2**26
"""Bytes that are sent at once; every process holds what all have sent."""


def begin_processes(device: str | torch.device | None) -> tuple[PartialState, torch.device]:
    """(the processes that share the work, this one's device).

    They wait a day for one another: the first may calibrate a large model while the others have nothing to do.

    Raises:
        QuantkitError: there is no such device, there are more processes than GPUs, or they do not find one another.
    """
    where = pick_device(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if where.type == "cuda" and here > torch.cuda.device_count():
        raise QuantkitError(
            f"{here} processes of this run are on this machine, and torch sees {torch.cuda.device_count()} GPUs; start "
            "one process a GPU, or use `device` cpu"
        )
    on_cpu = where.type == "cpu"
    try:
        processes = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        PartialState._reset_state()  # else it takes itself for complete
        raise QuantkitError(
            f"this process does not find the others of its run ({first_line(error)}); start them with torchrun or "
            "accelerate launch, or unset RANK, LOCAL_RANK and WORLD_SIZE for one alone"
        ) from error
    if processes.num_processes == 1:
        return processes, where
    # a parameter that moves from cpu to cpu:0, which accelerate says, is a parameter no more
    return processes, CPU if processes.device.type == "cpu" else processes.device


@dataclass(frozen=True)
class Together:
    """The processes of a run, seen from one of them; all have to call the same methods in the same order.

    Attributes:
        rank: of this process, from 0.
        count: of all.
        device: of what is sent: NCCL takes nothing from a CPU.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads what others need not, writes, and tells."""
        return self.rank == 0

    @property
    def own(self) -> slice:
        """Of a list that is worked on in turns, what is this process's."""
        return slice(self.rank, None, self.count)

    def turns(self, count: int) -> range:
        """Of so many items the first one of each turn, in which every process has one, but for the last turn."""
        return range(0, count, self.count)

    def add(self, products: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Adds to places in sums what all processes have for them, in the processes' order.

        Args:
            products: places, which every process has in the same order, each with what this one adds, fp32 of its
                shape.
        """
        if self.count == 1:
            for place, product in products:
                place += product
            return
        for bundle in _bundles(products):
            sent = torch.cat([product.to(self.device).reshape(-1) for _, product in bundle])
            found = [torch.empty_like(sent) for _ in range(self.count)]
            with _others():
                dist.all_gather(found, sent)
            for of_one in found:
                parts = of_one.split([product.numel() for _, product in bundle])
                for (place, _), part in zip(bundle, parts, strict=True):
                    place += part.view(place.shape).to(place.device)

    def each(self, make: Callable[[], T]) -> list[T]:
        """What all processes make, in their order.

        Raises:
            QuantkitError: one of them could not.
        """
        if self.count == 1:
            return [make()]
        made: list[Any] = [None] * self.count
        own, error = _tried(make)
        with _others():
            dist.all_gather_object(made, (own, None if error is None else str(error)))
        if failed := [(rank, said) for rank, (_, said) in enumerate(made) if said is not None]:
            rank, said = failed[0]  # which says it for those that have failed alike
            raise error if error is not None and rank == self.rank else Elsewhere(said)
        return [value for value, _ in made]

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all.

        Raises:
            QuantkitError: it could not.
        """
        if self.count == 1:
            return make()
        own, error = _tried(make) if self.is_first else (None, None)
        told: list[Any] = [own, None if error is None else str(error)]
        with _others():
            dist.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        if told[1] is not None:
            raise Elsewhere(told[1])
        made: Any = own if self.is_first else told[0]
        return made  # type: ignore[no-any-return]

    def lead(self, make: Callable[[], T]) -> T | None:
        """What the first process makes, for itself alone; the others wait for it, and have None.

        Raises:
            QuantkitError: it could not.
        """
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else None

    @contextmanager
    def within(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """The time in which the first process is in a context, such as one that holds a folder; all know that it is.

        Raises:
            QuantkitError: it could not enter it.
        """
        with ExitStack() as stack:
            self.lead(lambda: stack.enter_context(make()))
            yield

    def alike(self, make: Callable[[], T]) -> T:
        """What this process makes as all others do, each for itself; none goes on before all have it.

        Raises:
            QuantkitError: one of them could not.
        """
        made: list[T] = []
        self.each(lambda: made.append(make()))
        return made[0]

    def check_same(self, fingerprint: Callable[[], Mapping[str, str]]) -> None:
        """Raises QuantkitError where processes, on several machines say, have not read the same model."""
        if self.count == 1:
            return
        wanted = self.first(fingerprint)

        def check() -> None:
            """Holds this process's model against the first one's."""
            found = fingerprint()
            if wrong := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
                raise QuantkitError(
                    f"{wrong[0]} of the model on {socket.gethostname()} is not that of the first process; give all "
                    "processes the same files"
                )

        self.alike(check)

    def beside(self, device: torch.device) -> int:
        """Processes that take of the memory of this one's device, at most: all of a CPU's, each a GPU's own."""
        return self.count if device.type == "cpu" else 1

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """Of pieces of work those that are this process's: the largest first, each to whom has least to do so far."""
        loads = [0.0] * self.count
        mine = set()
        for name in sorted(costs, key=lambda name: -costs[name]):
            least = min(reversed(range(self.count)), key=loads.__getitem__)  # the first has to write as well
            loads[least] += costs[name]
            mine |= {name} if least == self.rank else set()
        return [name for name in costs if name in mine]


ALONE = Together()
"""A process that shares its work with nobody."""


def together(device: str | torch.device | None) -> tuple[Together, torch.device]:
    """(the processes that share a run, this one's device)."""
    processes, where = begin_processes(device)
    return Together(processes.process_index, processes.num_processes, where), where


def _bundles(products: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Products, as many at a time as `BUNDLE` allows, and rows of those that are larger."""
    bundle: list[tuple[Tensor, Tensor]] = []
    left = BUNDLE
    for place, product in _rows(products):
        if bundle and product.nbytes > left:
            yield bundle
            bundle, left = [], BUNDLE
        bundle.append((place, product))
        left -= product.nbytes
    if bundle:
        yield bundle


def _rows(products: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Products, as many of their rows at a time as `BUNDLE` allows."""
    for place, product in products:
        rows = max(1, BUNDLE // product[:1].nbytes)
        yield from zip(place.split(rows), product.split(rows), strict=True)


def _tried(make: Callable[[], T]) -> tuple[T | None, QuantkitError | None]:
    try:
        return make(), None
    except QuantkitError as error:
        return None, error


@contextmanager
def _others() -> Iterator[None]:
    """While something is exchanged: what the libraries below say when another process is gone, in our words."""
    try:
        yield
    except torch.OutOfMemoryError:  # of this one's GPU
        raise
    except RuntimeError as error:
        raise QuantkitError("another process of this run has ended, and this one with it") from error
