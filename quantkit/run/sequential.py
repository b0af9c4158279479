"""The walker: quantizes a model block by block, each block fed by the quantized prefix.

For every block, in order: gather the statistics of its linear layers' inputs, quantize the layers,
put the packed ones in their places, and run the block again so that the next one sees what it will
see at inference. Layers are taken in the order in which the block runs them, those that are fed by
the same tensor together (q, k, v; gate, up), so that each sees its own block's earlier layers
quantized and one Hessian serves all that share an input. A layer that is called at several depths is
packed by what flows at the first of them alone; the others have the packed weight when the walk comes there.

Two streams of activations may be carried: `quantized`, behind the layers quantized so far, and `full`,
of the untouched model, for quantizers that read both. An input embedding that is packed by itself comes first, so that
the blocks see it; one that shares the head's weight comes with the head, last. Memory is one block plus the streams,
and a packed embedding.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantkit.core.device import free_memory
from quantkit.core.errors import CalibrationError
from quantkit.core.protocols import LayerHook, Needs
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats, StatsAccumulator
from quantkit.core.weight import QuantizedWeight
from quantkit.models.embedding import put
from quantkit.models.experts import Apart, routed
from quantkit.models.forward import (
    BATCH_TOKENS,
    Batch,
    WeightSource,
    Wrap,
    bare,
    capture,
    divided,
    outer_input,
    run_block,
)
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import Plan, tied
from quantkit.models.replay import REPLAY_FRACTION, Order, Replay, execution_order, settings
from quantkit.models.structure import ends, find_blocks, is_lookup, linear_weight
from quantkit.run.aside import Aside
from quantkit.run.experts import Means, in_turns, pooled
from quantkit.run.fisher import Fisher
from quantkit.run.gathering import Gathering, Stream
from quantkit.run.packing import Pack, packed
from quantkit.run.processes import ALONE, CPU, Together

logger = logging.getLogger(__name__)
K = TypeVar("K")


class Tuner(Protocol):
    """Improves a block once its layers are packed."""

    @property
    def batch_tokens(self) -> int:
        """Tokens that run through a block together."""

    def __call__(
        self,
        block: nn.Module,
        names: list[str],
        batches: list[Batch],
        index: int,
        progress: Callable[[int, int], None],
    ) -> tuple[float, float]:
        """See `tuning.block.BlockTuning`."""


class Sink(Protocol):
    """Where finished blocks go; also remembers the ones finished by an earlier, interrupted run."""

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The layers of block `index` if it is already done."""

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes a finished block; index -1 stands for all that lies outside the blocks."""


@dataclass
class Walker:
    """Quantizes all layers of a plan and leaves packed layers in the model.

    Attributes:
        model: a causal language model; its weights may be on the meta device until `source` loads them.
        plan: quantizers by layer name.
        tokens: calibration text, int64 [sequences, seqlen]; None where no layer needs statistics.
        source: loads and releases modules.
        device: where blocks run.
        hook: packs each layer of the plan; None for `Pack`, which does as the plan says.
        true_sequential: let each layer see its own block's earlier layers quantized, at the price of a pass of the
            streams per group of layers instead of one per block.
        tuner: improves every block that has packed layers; None for none.
        lookups_first: let the blocks see the packed embedding.
        aside: what rides along and is read by nobody else, such as held-out sequences; see `run.check`.
        batch_tokens: tokens that run through a block together.
        progress: called with (blocks done, blocks in all, name of the block begun or "").
        fisher: what the model's predictions feel, which weighs tokens and outputs; None where all count alike.
        all_experts: gather each expert's statistics from all tokens, not from those alone that choose it.
        together: processes that walk over the same model; each moves some batches along, and packs some layers. The
            first one's `sink` remembers finished blocks, all take them.
    """

    model: nn.Module
    plan: Plan
    tokens: Tensor | None
    source: WeightSource
    device: torch.device
    hook: LayerHook | None = None
    true_sequential: bool = True
    tuner: Tuner | None = None
    lookups_first: bool = True
    aside: Aside = field(default_factory=Aside)
    batch_tokens: int = BATCH_TOKENS
    progress: Callable[[int, int, str], None] = lambda done, total, name: None
    fisher: Fisher | None = None
    all_experts: bool = False
    together: Together = ALONE

    def __post_init__(self) -> None:
        self._streams = self.together if self.tuner is None else ALONE  # who tunes a block needs all batches
        self._prefix, self._blocks = find_blocks(self.model)
        self._hook: LayerHook = Pack(self.plan) if self.hook is None else self.hook
        own = (layer for layer in self.plan if layer not in tied(self.plan))
        self._needs = max(map(self._hook.needs, own), default=Needs.NOTHING)
        self._sizes: list[int] = []  # sequences of each batch
        self._batches: list[Batch] = []  # this process's
        self._wrap: Wrap = bare
        self._order: Order | None = None
        inside = f"{self._prefix}."
        self._tied = {layer: first for layer, first in tied(self.plan).items() if layer.startswith(inside)}
        self._kept: dict[str, QuantizedWeight] = {}  # of layers that have others tied to them, packed by now

    @torch.no_grad()
    def run(self, sink: Sink) -> None:
        """Walks over the model; `sink` takes every finished block.

        Raises:
            CalibrationError: unusable statistics, with the layer's name.
        """
        outer = [layer for layer in self.plan if not layer.startswith(f"{self._prefix}.")]
        front = [layer for layer in outer if self.lookups_first and self._is_own_lookup(layer)]
        self._begin_streams()
        self.together.alike(partial(self.aside.begin, self.model, self.source, self.device, self.batch_tokens))
        for layer in front:
            self.progress(0, len(self._blocks), layer)
        results = self._quantize_outer(front)
        if front and self._batches:
            for batch, behind in zip(self._batches, self._captured(), strict=True):
                batch.quantized = behind.quantized
        if front:
            self.aside.front_packed()
        before: list[tuple] = []
        for index, block in enumerate(self._blocks):
            name = f"{self._prefix}.{index}"
            self.progress(index, len(self._blocks), name)
            self.source.load(name, block, self.device)
            self.aside.through_full(index)
            done = self.together.first(partial(sink.finished, index))
            if done is None:
                self._order = self._order if settings(block) == before else None
                before = settings(block)
                made = self._quantize_block(index, name)
                self.together.each(partial(sink.write, index, name, made))
            else:
                self._pass_finished(index, name, done)
            self.aside.through_packed(index)
            for module in block.modules():
                if isinstance(module, QuantizedLinear):
                    module.release()
            self.source.release(name, block)
            self._tie(index)
        last = [layer for layer in outer if layer not in front]
        self.aside.full_ends()
        made = results | self._quantize_outer(last)
        self.together.each(partial(sink.write, -1, "", made))
        self.aside.finish(any(layer != ends(self.model)[1] for layer in last), sink.finished)
        self.progress(len(self._blocks), len(self._blocks), "")

    def _is_own_lookup(self, layer: str) -> bool:
        return layer not in tied(self.plan) and is_lookup(self.model.get_submodule(layer))

    def _begin_streams(self) -> None:
        """Runs the calibration text up to the first block, where anything reads what flows there."""
        if self._needs == Needs.NOTHING and self.tuner is None:
            return
        if self.tokens is None:
            raise CalibrationError("this run reads what flows through the layers; give calibration text")
        self._batches = self._captured()

    def _captured(self) -> list[Batch]:
        assert self.tokens is not None
        size = self.batch_tokens if self.tuner is None else min(self.batch_tokens, self.tuner.batch_tokens)
        batches, self._wrap = self.together.alike(
            partial(
                capture, self.model, self._blocks, self.tokens, self.source, self.device, size, only=self._streams.own
            )
        )
        self._sizes = [len(part) for part in divided(self.tokens, size)]
        return batches

    def _turns(self) -> Iterator[tuple[int, Batch | None]]:
        """Batches in their order, those of all processes at the same time: each with its number, or no batch."""
        for turn, first in enumerate(self._streams.turns(len(self._sizes))):
            yield first + self._streams.rank, self._batches[turn] if turn < len(self._batches) else None

    def _reference(self, block: nn.Module) -> nn.Module | None:
        """The block as the full stream runs it, where there is such a stream."""
        return _shared_copy(block) if self._needs >= Needs.CROSS or self.tuner is not None else None

    def _pass_finished(self, index: int, name: str, done: dict[str, QuantizedWeight]) -> None:
        """Moves both streams past a block that an earlier run packed."""
        block = self._blocks[index]
        reference = self._reference(block)
        self._take_shared(name)
        for layer, weight in done.items():
            if layer not in self._tied:
                _swap(block, layer.removeprefix(f"{name}."), weight.map(lambda tensor: tensor.to(self.device)))
        self._keep(done)
        for batch in self._batches:
            batch.quantized = run_block(block, batch.quantized, batch.call(index))
        self._advance_full(reference, index)

    def _take_shared(self, name: str) -> None:
        """Puts packed layers in a block's places that share them."""
        for layer, first in self._tied.items():
            if layer.startswith(f"{name}.") and first in self._kept:
                _swap(self.model, layer, self._kept[first].map(lambda tensor: tensor.to(self.device)))

    def _keep(self, layers: Mapping[str, QuantizedWeight]) -> None:
        """Keeps those of a block's packed layers that other blocks share."""
        self._kept |= {first: layers[first] for first in {*self._tied.values()} if first in layers}

    def _tie(self, index: int) -> None:
        """Makes shared layers one that have been packed up to a block."""
        names = tuple(f"{self._prefix}.{block}." for block in range(index + 1))
        for layer, first in self._tied.items():
            if first in self._kept and layer.startswith(names):
                put(self.model, layer, self.plan[layer].layout(*self._kept[first].shape))

    def _advance_full(self, reference: nn.Module | None, index: int) -> None:
        """Moves the full stream past a block that gathers nothing."""
        if reference is not None:
            for batch in self._batches:
                batch.full = run_block(reference, batch.full, batch.call(index, full=True))

    def _quantize_block(self, index: int, name: str) -> dict[str, LayerResult]:
        """Quantizes one block's layers in the order of their execution, and moves both streams past the block."""
        block = self._blocks[index]
        reference = self._reference(block)
        self._take_shared(name)
        layers = [layer for layer in self.plan if layer.startswith(f"{name}.") and layer not in self._tied]
        local = {layer.removeprefix(f"{name}."): self._hook.needs(layer) for layer in layers}
        if self._order is None or {one for group in self._order.groups for one in group} != set(local):
            with routed(block, everywhere=self.all_experts):
                own = execution_order(block, local, self._batches, index)
            self._order = replace(own, stages=self.together.first(lambda: own.stages))
        order = self._order  # that of the block before is this block's too where it has the same layers
        stages = self._stages(block, order, local)
        budget = 0
        if self._batches and len(stages) > 1:
            where = self._batches[0].quantized.device
            budget = int(REPLAY_FRACTION * free_memory(where) / self.together.beside(where))
        quantized = Stream(block, Replay(block, local, order, budget), set())
        full = None
        if reference is not None:
            full = Stream(reference, Replay(reference, local, order, budget), set(local))
        gathering = Gathering(
            f"{name}.", index, quantized, full, self._turns, self.device, self._streams, self.all_experts
        )
        results: dict[str, LayerResult] = {}
        means: Means = {}
        for stage in stages:
            needs = {group[0]: max(local[one] for one in group) for group in stage}
            weights = {group[0]: self._token_weights([f"{name}.{one}" for one in group]) for group in stage}
            stats = gathering.gather(needs, weights, stage is stages[-1], means)
            wanted = [layer for layer, need in needs.items() if need > Needs.NOTHING]
            if not self.all_experts or len(stats) < len(wanted):
                stats = pooled(stats, wanted, means)
            known = {
                f"{name}.{one}": stats.get(group[0])
                for group in stage
                for one in group
                if needs[group[0]] == Needs.NOTHING or group[0] in stats  # else no token passes through it
            }
            results |= self._packed(known)
            for one in (one for group in stage for one in group):
                if (layer := f"{name}.{one}") in results:
                    _swap(block, one, results[layer].weight)
                quantized.settled.add(one)
        if not stages:
            self._advance_full(reference, index)
        if self.tuner is not None and results:
            quantized.replay.clear()  # its outputs are of layers that are about to change
            results = self._tuned_by_first(index, name, results)
        for batch_index, batch in enumerate(self._batches):
            with quantized.replay.running(batch_index, quantized.settled, keep=False):
                batch.quantized = run_block(block, batch.quantized, batch.call(index))
        for module in block.modules():
            if isinstance(module, Apart):
                module.taken = None
                module.let_go()
        self._keep({layer: result.weight for layer, result in results.items()})
        made = {layer: results[layer] for layer in layers if layer in results}
        sharing = {layer: made[first] for layer, first in self._tied.items() if first in made}
        return made | {layer: self._laid_out(layer, result) for layer, result in sharing.items()}

    def _laid_out(self, layer: str, result: LayerResult) -> LayerResult:
        """What is stored of a layer that shares a packed weight."""
        return replace(result, weight=self.plan[layer].layout(*result.weight.shape))

    def _packed(self, stats: Mapping[str, LayerStats | None]) -> dict[str, LayerResult]:
        """Layers as they are packed, each by one of the processes; those of `stats`, which says what is known of each.

        Layers that share statistics share their factors too, where one process packs them.
        """
        modules = {layer: self.model.get_submodule(layer) for layer in stats}
        mine = self.together.share({layer: linear_weight(module).numel() for layer, module in modules.items()})

        def make() -> dict[str, LayerResult]:
            found = {}
            for layer in mine:
                known = self._with_outputs(stats[layer], layer)
                found[layer] = packed(self._hook, modules[layer], known, layer)
            return found if self.together.count == 1 else moved(found, CPU)

        made = {layer: result for found in self.together.each(make) for layer, result in found.items()}
        return {layer: made[layer] for layer in stats} if self.together.count == 1 else moved(made, self.device, stats)

    def _stages(self, block: nn.Module, order: Order, needs: Mapping[str, Needs]) -> list[list[list[str]]]:
        """The stages in which a block's layers are packed: groups whose statistics one pass gathers."""

        def nbytes(layer: str) -> int:
            moments = 2 if needs[layer] >= Needs.CROSS else 1 if needs[layer] > Needs.NOTHING else 0
            return 4 * moments * linear_weight(block.get_submodule(layer)).shape[1] ** 2

        stages = order.stages if self.true_sequential else [order.groups]
        return [turn for stage in stages for turn in in_turns(stage, nbytes)]

    def _token_weights(self, layers: list[str]) -> Sequence[Tensor | None]:
        """Of the tokens of each batch, for layers that share an input; None where all count alike."""
        weights = None if self.fisher is None else self.fisher.token_weights(layers)
        if weights is None:
            return [None] * len(self._sizes)
        return weights.to(self.device).split(self._sizes)

    def _with_outputs(self, stats: LayerStats | None, layer: str) -> LayerStats | None:
        """A layer's statistics with what the reverse pass found at its outputs."""
        if stats is None:
            return None
        inside = layer.startswith(f"{self._prefix}.")
        outputs = self.fisher.outputs(layer) if inside and self.fisher is not None else None
        return stats.of_layer(layer, None if outputs is None else outputs.to(self.device))

    def _tuned_by_first(self, index: int, name: str, results: dict[str, LayerResult]) -> dict[str, LayerResult]:
        """A block's layers as the first process has improved them; the others take them over."""
        if self.together.count == 1:
            return self._tuned(index, name, results)
        results = moved(self.together.first(lambda: moved(self._tuned(index, name, results), CPU)), self.device)
        if not self.together.is_first:
            for layer, result in results.items():
                _swap(self.model, layer, result.weight)
        return results

    def _tuned(self, index: int, name: str, results: dict[str, LayerResult]) -> dict[str, LayerResult]:
        """A block's layers improved, while the streams still stand before (quantized) and behind (full) it."""
        assert self.tuner is not None
        block, blocks = self._blocks[index], len(self._blocks)

        def told(step: int, steps: int) -> None:
            self.progress(index, blocks, f"{name}, tuning {step}/{steps}")

        names = [layer.removeprefix(f"{name}.") for layer in results]
        losses = self.tuner(block, names, batches=self._batches, index=index, progress=told)
        changed = {}
        for layer, result in results.items():
            linear = block.get_submodule(layer.removeprefix(f"{name}."))
            assert isinstance(linear, QuantizedLinear)
            changed[layer] = replace(result, weight=linear.packed, tuned=losses)
        return changed

    def _quantize_outer(self, layers: list[str]) -> dict[str, LayerResult]:
        """Quantizes layers outside the blocks.

        A head's inputs are those of the model's own forward with stubbed blocks.
        """
        results: dict[str, LayerResult] = {}
        if not layers:
            return results
        self.source.load("", self.model, self.device)
        sharing = {name: head for name, head in tied(self.plan).items() if name in layers}
        for name in (name for name in layers if name not in sharing):
            results |= self._packed({name: self._outer_stats(name)})
            put(self.model, name, results[name].weight)
        for name, head in sharing.items():
            results[name] = self._laid_out(name, results[head])
            put(self.model, name, results[name].weight)
        self.source.release("", self.model)
        return results

    def _outer_stats(self, name: str) -> LayerStats | None:
        needs = self._hook.needs(name)
        if needs == Needs.NOTHING:
            return None
        in_features = linear_weight(self.model.get_submodule(name)).shape[1]
        accumulator = StatsAccumulator(in_features, needs >= Needs.CROSS, self.device)
        for _, batch in self._turns():
            streams = [torch.empty(0, in_features, device=self.device)] * 2
            if batch is not None:
                tokens, hidden = batch.tokens.to(self.device), [batch.quantized, batch.full]
                streams = [
                    outer_input(self.model, self._blocks, name, tokens, each, self._wrap)
                    for each in (hidden if needs >= Needs.CROSS else hidden[:1])
                ]
            crossed = streams[-1] if needs >= Needs.CROSS else None
            self._streams.add(accumulator.products(streams[0], crossed))
        return self.together.alike(partial(accumulator.finish, name))


def _swap(root: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts the packed layer in place, its weight unpacked for as long as the calibration text runs through it."""
    dtype = linear_weight(root.get_submodule(name)).dtype
    linear = put(root, name, weight)
    assert isinstance(linear, QuantizedLinear)
    linear.hold(dtype)


def moved(
    results: Mapping[K, LayerResult], device: torch.device, order: Iterable[K] | None = None
) -> dict[K, LayerResult]:
    """Results by any key, with their tensors on a device, in an order."""
    return {
        key: replace(results[key], weight=results[key].weight.map(lambda tensor: tensor.to(device)))
        for key in (results if order is None else order)
    }


def _shared_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, so that replacing layers in one leaves the other whole."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, memo={id(tensor): tensor for tensor in tensors})
