"""The statistics of a block's layers, gathered from passes of the streams through it.

Every process takes its own batches through; sums are made up batch by batch in their order (`Together.add`),
so that all end with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.core.errors import CalibrationError
from quantkit.core.protocols import Needs
from quantkit.core.stats import LayerStats, StatsAccumulator
from quantkit.models.experts import Apart, is_apart, place, routed
from quantkit.models.forward import Batch, inputs_of
from quantkit.models.structure import linear_weight
from quantkit.run.experts import Means, place_of
from quantkit.run.processes import Together

if TYPE_CHECKING:
    from quantkit.models.replay import Replay

Turns = Callable[[], Iterator[tuple[int, Batch | None]]]
"""Batches in their order, those of all processes at the same time: each with its number, or no batch."""


@contextmanager
def _routed_alike(block: nn.Module, other: nn.Module) -> Iterator[None]:
    """While it lasts, a block's experts are chosen as another's last were, a copy of it."""
    pairs = [(module, other.get_submodule(name)) for name, module in block.named_modules() if is_apart(module)]
    try:
        for module, twin in pairs:
            module.given = twin.taken
        yield
    finally:
        for module, _ in pairs:
            module.given = None


@dataclass
class Stream:
    """A block as one of the streams runs it.

    Attributes:
        block: the module.
        replay: its children's outputs that can be used again.
        settled: planned layers whose weights in this stream are final.
    """

    block: nn.Module
    replay: Replay
    settled: set[str]


@dataclass
class Gathering:
    """Gathers statistics of one block's layers.

    Attributes:
        prefix: of the layers' names in the model, with a dot.
        index: of the block among the model's.
        quantized, full: the block as each stream runs it; no `full` where nothing reads that stream.
        turns: gives the batches.
        device: where they run.
        together: processes that gather together.
        all_experts: every expert sees all tokens.
    """

    prefix: str
    index: int
    quantized: Stream
    full: Stream | None
    turns: Turns
    device: torch.device
    together: Together
    all_experts: bool

    def gather(
        self,
        needs: dict[str, Needs],
        weights: Mapping[str, Sequence[Tensor | None]],
        advance: bool,
        means: Means,
    ) -> dict[str, LayerStats]:
        """Statistics of some groups' shared inputs, by each group's first layer; one pass of each stream.

        Args:
            needs: of these layers.
            weights: of the tokens of every batch, for each of them.
            advance: run the full stream's pass to the block's end, and make its output the next block's input.
            means: of experts that were gathered before.
        """
        probes = [name for name, need in needs.items() if need > Needs.NOTHING]
        crossed = [name for name in probes if needs[name] >= Needs.CROSS and self._is_matched(name)]
        accumulators: dict[str, StatsAccumulator] = {}
        for turn, (number, batch) in enumerate(self.turns()):
            inputs: dict[str, Tensor] = {}
            wanted: dict[str, Tensor] = {}
            if batch is not None:
                inputs = self._inputs(probes, batch, turn) if probes else {}
                wanted = self._full_inputs(self.full, crossed, batch, turn, advance) if self.full else {}
            reached = self._reached(probes, inputs)
            given = {}
            for name in reached:
                in_features = linear_weight(self.quantized.block.get_submodule(name)).shape[1]
                none = torch.empty(0, in_features, device=self.device)
                x_q, x = inputs.get(name, none), wanted.get(name, none) if name in crossed else None
                if x is not None and x.shape != x_q.shape:
                    raise CalibrationError(
                        f"{self.prefix}{name}: the two streams send different tokens through this layer; use a target "
                        "shift of 0"
                    )
                if name not in accumulators:
                    accumulators[name] = StatsAccumulator(in_features, x is not None, self.device)
                given[name] = x_q, x, weights[name][number] if name in inputs else None
            self.together.add(pair for name in reached for pair in accumulators[name].products(*given[name]))

        def finished() -> dict[str, LayerStats]:
            """The means, which all processes make of the same sums."""
            for name in probes:
                known = name in accumulators or self._is_beside(name, accumulators) or place_of(name) in means
                if not known and place_of(name) is not None:
                    raise CalibrationError(
                        f"{self.prefix}{name}: no calibration token reached any expert; leave it out (`ignore` "
                        f"'*{name}') or use RTN"
                    )
            return {name: accumulators.pop(name).finish(self.prefix + name) for name in [*accumulators]}

        return self.together.alike(finished)

    def _reached(self, probes: Collection[str], inputs: Collection[str]) -> list[str]:
        """Layers that the batch of some process has reached."""
        found = set().union(*self.together.each(lambda: set(inputs)))
        return [name for name in probes if name in found]

    def _inputs(self, probes: list[str], batch: Batch, turn: int) -> dict[str, Tensor]:
        """Inputs of some layers in the quantized stream; that moves no further than to the last of them."""
        stream = self.quantized
        with (
            stream.replay.running(turn, stream.settled, keep=True),
            routed(stream.block, everywhere=self.all_experts, records=True),
        ):
            inputs, _ = inputs_of(stream.block, probes, batch.quantized, batch.call(self.index), to_the_end=False)
        stream.replay.reached(turn, inputs)
        return inputs

    def _full_inputs(
        self, full: Stream, crossed: list[str], batch: Batch, turn: int, advance: bool
    ) -> dict[str, Tensor]:
        """Inputs of some layers in the full stream, which with `advance` goes on to the block's end.

        Experts see the tokens that have chosen them in the quantized stream.
        """
        call, wanted = batch.call(self.index, full=True), dict[str, Tensor]()
        apart = any(place(name) is not None for name in crossed)
        if crossed and (apart or not advance):
            alike = _routed_alike(full.block, self.quantized.block) if apart else nullcontext()  # else outputs are kept
            everywhere = routed(full.block, everywhere=self.all_experts)
            with full.replay.running(turn, full.settled, keep=not apart), alike, everywhere:
                wanted, _ = inputs_of(full.block, crossed, batch.full, call, to_the_end=False)
            if not apart:
                full.replay.reached(turn, wanted)
        if advance:
            probes = [] if apart else crossed
            with full.replay.running(turn, full.settled, keep=False):
                found, output = inputs_of(full.block, probes, batch.full, call, to_the_end=True)
            assert output is not None
            wanted, batch.full = wanted | found, output
        return wanted

    def _is_matched(self, name: str) -> bool:
        """Whether both streams can send the same tokens through a layer: not where experts route by themselves."""
        at = place(name)
        experts = None if at is None else self.quantized.block.get_submodule(at[0])
        return experts is None or (isinstance(experts, Apart) and experts.chooses)

    @staticmethod
    def _is_beside(name: str, others: Collection[str]) -> bool:
        """Whether a layer is one of an expert's, and known are those of others at the same place."""
        own = place(name)
        return own is not None and any((at := place(o)) is not None and at[::2] == own[::2] for o in others)
