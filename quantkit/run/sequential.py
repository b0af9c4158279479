"""The walker: quantizes a model block by block, each block fed by the quantized prefix.

For every block, in order: gather the statistics of its linear layers' inputs, quantize the layers,
put the packed ones in their places, and run the block again so that the next one sees what it will
see at inference. Layers are taken in the order in which the block runs them, those that are fed by
the same tensor together (q, k, v; gate, up), so that each sees its own block's earlier layers
quantized and one Hessian serves all that share an input.

Two streams of activations may be carried: `quantized`, behind the layers quantized so far, and `full`,
of the untouched model, for quantizers that read both. An input embedding that is packed by itself comes first, so that
the blocks see it; one that shares the head's weight comes with the head, last. Memory is one block plus the streams,
and a packed embedding.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.core.device import free_memory
from quantkit.core.errors import CalibrationError
from quantkit.core.protocols import LayerHook, Needs
from quantkit.core.result import LayerResult
from quantkit.core.stats import LayerStats, StatsAccumulator
from quantkit.core.weight import QuantizedWeight
from quantkit.models.embedding import put
from quantkit.models.experts import Apart, is_apart, place, routed
from quantkit.models.forward import Batch, WeightSource, Wrap, bare, capture, inputs_of, outer_input, run_block
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import Plan, tied
from quantkit.models.replay import Order, Replay, execution_order, settings
from quantkit.models.structure import ends, find_blocks, is_lookup, linear_weight
from quantkit.run.aside import Aside
from quantkit.run.experts import Means, in_turns, place_of, pooled
from quantkit.run.fisher import Fisher
from quantkit.run.packing import Pack, packed

logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192
"""Tokens that run through a block together."""
REPLAY_FRACTION = 1 / 8
"""Fraction of the free memory in which a stream may keep what a block need not compute again."""


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

    def __post_init__(self) -> None:
        self._prefix, self._blocks = find_blocks(self.model)
        self._hook: LayerHook = Pack(self.plan) if self.hook is None else self.hook
        own = (layer for layer in self.plan if layer not in tied(self.plan))
        self._needs = max(map(self._hook.needs, own), default=Needs.NOTHING)
        self._batches: list[Batch] = []
        self._wrap: Wrap = bare
        self._order: Order | None = None

    @torch.no_grad()
    def run(self, sink: Sink) -> None:
        """Walks over the model; `sink` takes every finished block.

        Raises:
            CalibrationError: unusable statistics, with the layer's name.
        """
        outer = [layer for layer in self.plan if not layer.startswith(f"{self._prefix}.")]
        front = [layer for layer in outer if self.lookups_first and self._is_own_lookup(layer)]
        self._begin_streams()
        self.aside.begin(self.model, self.source, self.device, self.batch_tokens)
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
            done = sink.finished(index)
            if done is None:
                self._order = self._order if settings(block) == before else None
                before = settings(block)
                sink.write(index, name, self._quantize_block(index, name))
            else:
                self._pass_finished(index, name, done)
            self.aside.through_packed(index)
            for module in block.modules():
                if isinstance(module, QuantizedLinear):
                    module.release()
            self.source.release(name, block)
        last = [layer for layer in outer if layer not in front]
        self.aside.full_ends()
        sink.write(-1, "", results | self._quantize_outer(last))
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
        batches, self._wrap = capture(self.model, self._blocks, self.tokens, self.source, self.device, size)
        return batches

    def _reference(self, block: nn.Module) -> nn.Module | None:
        """The block as the full stream runs it, where there is such a stream."""
        return _shared_copy(block) if self._needs >= Needs.CROSS or self.tuner is not None else None

    def _pass_finished(self, index: int, name: str, done: dict[str, QuantizedWeight]) -> None:
        """Moves both streams past a block that an earlier run packed."""
        block = self._blocks[index]
        reference = self._reference(block)
        for layer, weight in done.items():
            _swap(block, layer.removeprefix(f"{name}."), weight.map(lambda tensor: tensor.to(self.device)))
        for batch in self._batches:
            batch.quantized = run_block(block, batch.quantized, batch.call(index))
        self._advance_full(reference, index)

    def _advance_full(self, reference: nn.Module | None, index: int) -> None:
        """Moves the full stream past a block that gathers nothing."""
        if reference is not None:
            for batch in self._batches:
                batch.full = run_block(reference, batch.full, batch.call(index, full=True))

    def _quantize_block(self, index: int, name: str) -> dict[str, LayerResult]:
        """Quantizes one block's layers in the order of their execution, and moves both streams past the block."""
        block = self._blocks[index]
        reference = self._reference(block)
        layers = [layer for layer in self.plan if layer.startswith(f"{name}.")]
        local = {layer.removeprefix(f"{name}."): self._hook.needs(layer) for layer in layers}
        if self._order is None or {one for group in self._order.groups for one in group} != set(local):
            with routed(block, everywhere=self.all_experts):
                self._order = execution_order(block, local, self._batches, index)
        order = self._order  # that of the block before is this block's too where it has the same layers
        stages = self._turns(block, order, local)
        budget = 0
        if self._batches and len(stages) > 1:
            budget = int(REPLAY_FRACTION * free_memory(self._batches[0].quantized.device))
        quantized = _Stream(block, Replay(block, local, order, budget), set())
        full = None
        if reference is not None:
            full = _Stream(reference, Replay(reference, local, order, budget), set(local))
        results: dict[str, LayerResult] = {}
        means: Means = {}
        for stage in stages:
            needs = {group[0]: max(local[one] for one in group) for group in stage}
            weights = {group[0]: self._token_weights([f"{name}.{one}" for one in group]) for group in stage}
            last = stage is stages[-1]
            stats = self._gather(quantized, full, f"{name}.", needs, weights, index, last, means)
            wanted = [layer for layer, need in needs.items() if need > Needs.NOTHING]
            if not self.all_experts or len(stats) < len(wanted):
                stats = pooled(stats, wanted, means)
            for group in stage:
                if needs[group[0]] > Needs.NOTHING and group[0] not in stats:
                    continue  # no token passes through it, and it stays as it is
                for one in group:
                    layer = f"{name}.{one}"
                    known = self._with_outputs(stats.get(group[0]), layer)
                    results[layer] = packed(self._hook, block.get_submodule(one), known, layer)
            for one in (one for group in stage for one in group):
                if (layer := f"{name}.{one}") in results:
                    _swap(block, one, results[layer].weight)
                quantized.settled.add(one)
        if not stages:
            self._advance_full(reference, index)
        if self.tuner is not None and results:
            quantized.replay.clear()  # its outputs are of layers that are about to change
            results = self._tuned(index, name, results)
        for batch_index, batch in enumerate(self._batches):
            with quantized.replay.running(batch_index, quantized.settled, keep=False):
                batch.quantized = run_block(block, batch.quantized, batch.call(index))
        for module in block.modules():
            if isinstance(module, Apart):
                module.taken = None
                module.let_go()
        return {layer: results[layer] for layer in layers if layer in results}

    def _turns(self, block: nn.Module, order: Order, needs: Mapping[str, Needs]) -> list[list[list[str]]]:
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
            return [None] * len(self._batches)
        return weights.to(self.device).split([len(batch.tokens) for batch in self._batches])

    def _with_outputs(self, stats: LayerStats | None, layer: str) -> LayerStats | None:
        """A layer's statistics with what the reverse pass found at its outputs."""
        if stats is None or self.fisher is None:
            return stats
        outputs = self.fisher.outputs(layer)
        return stats.of_layer(layer, None if outputs is None else outputs.to(self.device))

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

    def _gather(
        self,
        quantized: "_Stream",
        full: "_Stream | None",
        prefix: str,
        needs: dict[str, Needs],
        weights: Mapping[str, Sequence[Tensor | None]],
        index: int,
        advance: bool,
        means: Means,
    ) -> dict[str, LayerStats]:
        """Statistics of some groups' shared inputs, by each group's first layer; one pass of each stream.

        With `advance`, the full stream's pass runs to the block's end and its output becomes the next input.
        """
        probes = [name for name, need in needs.items() if need > Needs.NOTHING]
        crossed = [name for name in probes if needs[name] >= Needs.CROSS and self._is_matched(quantized.block, name)]
        accumulators: dict[str, StatsAccumulator] = {}
        for number, batch in enumerate(self._batches):
            inputs = self._inputs(quantized, probes, batch, number, index) if probes else {}
            wanted = self._full_inputs(full, quantized, crossed, batch, number, index, advance) if full else {}
            for name, x_q in inputs.items():
                x = wanted.get(name) if name in crossed else None
                if name in crossed and (x is None or x.shape != x_q.shape):
                    raise CalibrationError(
                        f"{prefix}{name}: the two streams send different tokens through this layer; use a target shift "
                        "of 0"
                    )
                if name not in accumulators:
                    accumulators[name] = StatsAccumulator(x_q.shape[-1], x is not None, x_q.device)
                accumulators[name].add(x_q, x, weights[name][number])
        for name in probes:
            lost = name not in accumulators and not self._is_beside(name, accumulators) and place_of(name) not in means
            if lost and place_of(name) is not None:
                raise CalibrationError(
                    f"{prefix}{name}: no calibration token reached any expert; leave it out (`ignore` '*{name}') or "
                    "use RTN"
                )
        return {name: accumulators.pop(name).finish(prefix + name) for name in [*accumulators]}

    def _inputs(self, stream: "_Stream", probes: list[str], batch: Batch, number: int, index: int) -> dict[str, Tensor]:
        """Inputs of some layers in the quantized stream; that moves no further than to the last of them."""
        with (
            stream.replay.running(number, stream.settled, keep=True),
            routed(stream.block, everywhere=self.all_experts, records=True),
        ):
            inputs, _ = inputs_of(stream.block, probes, batch.quantized, batch.call(index), to_the_end=False)
        stream.replay.reached(number, inputs)
        return inputs

    def _full_inputs(
        self,
        full: "_Stream",
        quantized: "_Stream",
        crossed: list[str],
        batch: Batch,
        number: int,
        index: int,
        advance: bool,
    ) -> dict[str, Tensor]:
        """Inputs of some layers in the full stream, which with `advance` goes on to the block's end.

        Experts see the tokens that have chosen them in the quantized stream.
        """
        call, wanted = batch.call(index, full=True), dict[str, Tensor]()
        apart = any(place(name) is not None for name in crossed)
        if crossed and (apart or not advance):
            alike, everywhere = (
                _routed_alike(full.block, quantized.block),
                routed(full.block, everywhere=self.all_experts),
            )
            with full.replay.running(number, full.settled, keep=not apart), alike, everywhere:
                wanted, _ = inputs_of(full.block, crossed, batch.full, call, to_the_end=False)
            if not apart:
                full.replay.reached(number, wanted)
        if advance:
            probes = [] if apart else crossed
            with full.replay.running(number, full.settled, keep=False):
                found, output = inputs_of(full.block, probes, batch.full, call, to_the_end=True)
            assert output is not None
            wanted, batch.full = wanted | found, output
        return wanted

    @staticmethod
    def _is_matched(block: nn.Module, name: str) -> bool:
        """Whether both streams can send the same tokens through a layer: not where experts route by themselves."""
        at = place(name)
        experts = None if at is None else block.get_submodule(at[0])
        return experts is None or (isinstance(experts, Apart) and experts.chooses)

    @staticmethod
    def _is_beside(name: str, others: Collection[str]) -> bool:
        """Whether a layer is one of an expert's, and known are those of others at the same place."""
        own = place(name)
        return own is not None and any((at := place(o)) is not None and at[::2] == own[::2] for o in others)

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
            stats = self._outer_stats(name)
            results[name] = packed(self._hook, self.model.get_submodule(name), stats, name)
            put(self.model, name, results[name].weight)
        for name, head in sharing.items():
            layout = self.plan[name].layout(*results[head].weight.shape)
            results[name] = replace(results[head], weight=layout)
            put(self.model, name, layout)
        self.source.release("", self.model)
        return results

    def _outer_stats(self, name: str) -> LayerStats | None:
        needs = self._hook.needs(name)
        if needs == Needs.NOTHING:
            return None
        accumulator = None
        for batch in self._batches:
            tokens = batch.tokens.to(self.device)
            x_q = outer_input(self.model, self._blocks, name, tokens, batch.quantized, self._wrap)
            x = None
            if needs >= Needs.CROSS:
                x = outer_input(self.model, self._blocks, name, tokens, batch.full, self._wrap)
            accumulator = accumulator or StatsAccumulator(x_q.shape[-1], x is not None, self.device)
            accumulator.add(x_q, x)
        assert accumulator is not None
        return accumulator.finish(name)


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
class _Stream:
    """A block as one of the streams runs it.

    Attributes:
        block: the module.
        replay: its children's outputs that can be used again.
        settled: planned layers whose weights in this stream are final.
    """

    block: nn.Module
    replay: Replay
    settled: set[str]


def _swap(root: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts the packed layer in place, its weight unpacked for as long as the calibration text runs through it."""
    dtype = linear_weight(root.get_submodule(name)).dtype
    linear = put(root, name, weight)
    assert isinstance(linear, QuantizedLinear)
    linear.hold(dtype)


def _shared_copy(block: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, so that replacing layers in one leaves the other whole."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, memo={id(tensor): tensor for tensor in tensors})
