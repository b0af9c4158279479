"""A run: a recipe applied to a source, in memory or in a folder, and what comes of it given to a destination."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.core.device import compute_dtype
from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.core.products import full_width
from quantkit.core.protocols import Needs
from quantkit.core.result import LayerResult
from quantkit.core.weight import QuantizedWeight
from quantkit.io import shim
from quantkit.io.checkpoint import CheckpointWriter
from quantkit.io.hf import attach
from quantkit.io.run_folder import Output
from quantkit.io.source import Loaded, Source, open_folder
from quantkit.models.experts import put_together
from quantkit.models.linear import Packed
from quantkit.models.plan import Plan, with_own_weight
from quantkit.models.structure import ends, find_blocks, linear_weight
from quantkit.models.unpacking import choose_unpacked
from quantkit.run.aside import Aside
from quantkit.run.check import HeldOut
from quantkit.run.fisher import Fisher, measure
from quantkit.run.processes import ALONE, Together, together
from quantkit.run.ranks import Survey, allocate_ranks, summary, with_ranks
from quantkit.run.recipe import Recipe
from quantkit.run.record import Run, and_others, begin, count_weights, files_of, model_notes
from quantkit.run.report import Check, Report, Samples
from quantkit.run.samples import Readings
from quantkit.run.sequential import Sink, Walker

Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _name: str) -> None:
    """The progress of a run that nobody watches."""


class Destination(Sink, Protocol):
    """Where the packed model goes: into memory, or into a folder."""

    def begin(self, identity: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[Any]:
        """The time in which the run with this identity, which may take a while to know, holds it.

        Raises:
            QuantkitError: another run holds it, or what is there is of other settings or may not be replaced.
        """

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """A folder for files that the run needs on its way."""

    def results(self) -> dict[str, LayerResult]:
        """All packed layers, without their tensors."""

    def finish(self, config: Mapping[str, Any], files: Callable[[], Mapping[str, bytes]]) -> None:
        """Completes it.

        Args:
            config: JSON of the model's config.json.
            files: gives further files by name.
        """


@full_width()
def run(
    source: Source,
    recipe: Recipe,
    destination: Destination,
    *,
    name: str = "",
    device: str | torch.device | None = None,
    progress: Progress = silent,
    shared: Together = ALONE,
) -> Report:
    """Quantizes a model.

    Args:
        source: the full-precision model.
        recipe: what to do.
        destination: of the packed one.
        name: of the model, for reports; by default the source's.
        device: where blocks are quantized; by default a GPU if there is one.
        progress: called with (blocks done, blocks in all, name).
        shared: processes that have the same source and recipe, and share the work.

    Returns:
        The report.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    where, start = begin(device)
    shared.check_same(source.fingerprint)
    plan = shared.alike(lambda: recipe.plan(source.model))
    shared.lead(source.check_finite)
    before = source.nbytes()
    tokens, held_out, unchecked = shared.first(lambda: _text(source, recipe, plan))

    def identity() -> dict[str, Any]:
        ours = {"run": "quantize", "low_rank_bits": recipe.low_rank_bits, "model": source.fingerprint()}
        return recipe.identity(plan, tokens) | ours | {"device": where.type, "dtype": str(source.model.dtype)}

    def arrange() -> None:
        """Brings the model into the form in which it is packed."""
        if recipe.rotation is not None:
            source.rotate(recipe.rotation)
        source.settle(plan)

    shared.alike(arrange)
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    counts = count_weights(source.model, plan)
    notes = (*source.notes, *model_notes(source.model, plan, source.untied, recipe.rotation is not None), *unchecked)
    with shared.within(lambda: destination.begin(identity)), source.walked(), destination.scratch("fisher") as scratch:
        folder = shared.first(lambda: scratch)
        fisher = _fisher(source, plan, tokens, where, folder, progress, shared) if recipe.runs_back(plan) else None
        if recipe.low_rank_bits:
            source, plan, note = _with_allocated_ranks(source, plan, tokens, recipe, where, progress, fisher, shared)
            notes = (*notes, note)
        text = recipe.calibration.source
        checked = shared.alike(lambda: Checked(source, plan, where, held_out if shared.is_first else None, text))
        Walker(
            source.model,
            plan,
            tokens,
            source.weights(plan),
            where,
            progress=progress,
            true_sequential=recipe.true_sequential,
            tuner=recipe.tuner,
            fisher=fisher,
            all_experts=recipe.all_experts,
            aside=checked.aside,
            together=shared,
        ).run(destination)

        def complete() -> Report:
            """Completes the destination, with all there is to say of it."""
            check, samples, more = checked.results(destination.finished)
            kept, settings, results = plan, recipe.settings(plan, tokens), destination.results()
            dense, counted = dense_bytes, counts
            if unreached := [layer for layer in plan if layer not in results]:
                kept = {layer: quantizer for layer, quantizer in plan.items() if layer in results}
                if not kept:
                    raise CalibrationError("no token of the calibration text passes through any layer")
                dense += source.packed_nbytes(unreached)
                own = with_own_weight(plan).keys() & unreached
                weights = sum(linear_weight(source.model.get_submodule(layer)).numel() for layer in own)
                counted = counts[0] - weights, counts[1]
                more = (*more, f"{and_others(unreached)} stay dense: no token of the text passes through them")
            this = Run(start, where, before, counted, settings, (*notes, *more))
            report = this.report(name or source.name, kept, results, dense, check, samples)
            config = source.config | ({"tie_word_embeddings": False} if source.untied else {})
            config |= shim.entries(source.model)
            destination.finish(
                config,
                lambda: source.files() | shim.files(source.model) | files_of(report, source.config, source.readme()),
            )
            return report

        return shared.first(complete)


def _fisher(
    source: Source,
    plan: Plan,
    tokens: Tensor | None,
    device: torch.device,
    folder: Path,
    progress: Progress,
    shared: Together,
) -> Fisher | None:
    """What the reverse pass finds at the planned layers of the blocks; None where there is nothing to find."""
    inside = f"{find_blocks(source.model)[0]}."
    own = with_own_weight(plan)
    layers = [name for name in own if name.startswith(inside)]  # those that read nothing share inputs with others
    if tokens is None or not any(plan[name].needs > Needs.NOTHING for name in layers):
        return None
    return measure(
        source.model, layers, tokens, source.weights(plan, head=True), device, folder,
        progress=lambda done, total, name: progress(done, total, f"reverse pass: {name}" if name else name),
        together=shared,
    )  # fmt: skip


def _text(source: Source, recipe: Recipe, plan: Plan) -> tuple[Tensor | None, Tensor | None, tuple[str, ...]]:
    """The text of a run.

    Returns:
        (int64 [samples, seqlen] to calibrate on, None where nothing reads it; int64 [sequences, seqlen] to check on, or
        None; why there are none although they were asked for).

    Raises:
        QuantkitError: there is no text to calibrate on.
    """
    reads = recipe.reads_text(plan)
    if not reads and not recipe.check:
        return None, None, ()
    tokens: Tensor | None
    try:
        tokens, others = recipe.calibration.sequences_apart(source.tokenizer(), source.model, recipe.check)
    except QuantkitError as error:
        if reads:
            raise
        return None, None, (f"the check was left out: {error}",)
    if not recipe.check:
        return tokens, None, ()
    if not reads:  # nothing calibrates, and all of the text is held out
        others, tokens = (others if len(others) else tokens[: recipe.check]), None
    why = ""
    if tokens is not None and not len(others):
        why = f"the text holds nothing beside the {len(tokens)} sequences that calibrate"
    elif ends(source.model)[1] is None:
        why = f"{type(source.model).__name__} does not say which of its modules gives logits"
    return (tokens, None, (f"the check was left out: {why}",)) if why else (tokens, others, ())


class Checked:
    """The check of a run, where there is text for one.

    Args:
        source: the full-precision model, in which nothing is packed yet.
        plan: of the run.
        device: where blocks run.
        tokens: int64 [sequences, seqlen] that are held out, or None.
        text: what they are of.

    Attributes:
        aside: rides along the walk.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device, tokens: Tensor | None, text: Any) -> None:
        self.aside, self._text = Aside(), str(text) if isinstance(text, str | Path) else "documents"
        self._readings: Readings | None = None
        if tokens is not None:
            self.aside = HeldOut(tokens)
            with self.aside.timed():
                self._readings = Readings(source, plan, device, self.aside, source.tokenizer())

    def results(
        self, finished: Callable[[int], dict[str, QuantizedWeight] | None]
    ) -> tuple[Check | None, Samples | None, tuple[str, ...]]:
        """(figures, samples, what there is to say instead), once all is packed; see `Sink.finished`."""
        if self._readings is None or not isinstance(self.aside, HeldOut):
            return None, None, ()
        with self.aside.timed():
            samples = self._readings.samples(finished)
        check = self.aside.figures(self._text)
        return check, samples, () if check else ("the check has no figures: a model predicts NaN or Inf on it",)


def _with_allocated_ranks(
    source: Source,
    plan: Plan,
    tokens: Tensor | None,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    fisher: Fisher | None,
    shared: Together,
) -> tuple[Source, Plan, str]:
    """(the source as it was, the plan with the ranks that a first pass finds best, and a sentence about them)."""
    again, survey = source.unpacked(plan), shared.alike(lambda: Survey(plan))
    Walker(
        source.model,
        plan,
        tokens,
        source.weights(plan),
        device,
        survey,
        recipe.true_sequential,
        progress=lambda done, total, name: progress(done, total, f"ranks: {name}" if name else name),
        fisher=fisher,
        all_experts=recipe.all_experts,
        together=shared,
    ).run(InMemory(source.model))
    made = {name: one for found in shared.each(lambda: survey.spectra) for name, one in found.items()}
    spectra = {name: made[name] for name in plan if name in made}
    ranks = allocate_ranks(spectra, recipe.low_rank_bits)
    return again(), with_ranks(plan, ranks), summary(spectra, ranks, recipe.low_rank_bits)


class InMemory:
    """The destination of a model that is packed in place.

    Args:
        model: the model, which learns to save itself as a packed checkpoint.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers: dict[str, LayerResult] = {}

    def begin(self, identity: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[Any]:
        """See `Destination`; a model in memory belongs to this process."""
        return nullcontext()

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder that goes when the context ends."""
        with TemporaryDirectory(prefix=f"quantkit-{name}-") as folder:
            yield Path(folder)

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """Nothing: no block was packed before."""
        return None

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Takes note of a block's layers; their tensors live in the model."""
        for layer, result in layers.items():
            self._layers[layer] = replace(result, weight=result.weight.map(lambda tensor: tensor.to("meta")))

    def results(self) -> dict[str, LayerResult]:
        """See `Destination`."""
        return self._layers

    def finish(self, config: Mapping[str, Any], files: Callable[[], Mapping[str, bytes]]) -> None:
        """See `Destination`; nothing lies beside a model in memory."""
        attach(self._model, {name: result.weight.metadata() for name, result in self._layers.items()})
        choose_unpacked(self._model)


def quantize_model(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Quantizes a loaded model in place and returns it; see `run`.

    Args:
        model: a decoder-only transformers model.
        tokenizer: its tokenizer; None where the recipe reads no text.
        recipe, device, progress: see `run`.

    Returns:
        The same model, with packed layers and the run's report as `model.quantkit_report`.

    Raises:
        QuantkitError: bad input; the message says what would work.
    """
    try:
        source = Loaded(model, tokenizer)
        made = run(source, recipe, InMemory(model), device=device, progress=progress)
        model.quantkit_report = made  # type: ignore[assignment]
    except BaseException:
        if not any(isinstance(module, Packed) for module in model.modules()):
            put_together(model, ())  # experts as the model came with them
        raise
    return model


def report(model: PreTrainedModel) -> Report:
    """The report of a model that was quantized in memory, with its layers as they are now.

    One with a merged adapter is larger than the run left it, and `model.quantkit_report` stays the run's.

    Raises:
        QuantkitError: no run has packed the model in memory.
    """
    made = getattr(model, "quantkit_report", None)
    if not isinstance(made, Report):
        raise QuantkitError("this model was not quantized in memory; `quantkit inspect` reports on a checkpoint")
    modules = dict(model.named_modules())
    weights = {}
    for name in (layer.name for layer in made.layers):
        inside = name
        while f"{inside}.base_layer" in modules:  # peft's layers around it, whose adapters may be merged into it
            inside = f"{inside}.base_layer"
        if isinstance(module := modules.get(inside), Packed):
            weights[name] = QuantizedWeight.empty(module.metadata)
    return made.remeasured(weights)


def quantize_checkpoint(
    folder: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    name: str = "",
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Quantizes a folder of safetensors shards into another, with one block in memory at a time; see `run`.

    Processes that torchrun or `accelerate launch` has started share the work, and the first one writes.

    Args:
        folder: the model, as transformers saves it.
        output: the folder to make; it appears whole or not at all.
        resume, overwrite: see `io.run_folder.Output`.
        recipe, name, device, progress: see `run`.

    Returns:
        The report, which is also written beside the checkpoint as quantkit_report.json.

    Raises:
        QuantkitError: bad input, or a folder that cannot be read or written; the message says what would work.
    """
    folder = Path(folder)
    shared, where = together(device)
    target = shared.lead(lambda: Output(Path(output), folder, resume=resume, overwrite=overwrite))
    source = shared.alike(lambda: open_folder(folder, compute_dtype(where)))
    destination: Destination = InMemory(source.model)  # which the others' results go to
    if target is not None:
        destination = CheckpointWriter(target, len(source.blocks), source.dense)
    return run(source, recipe, destination, name=name, device=where, progress=progress, shared=shared)
