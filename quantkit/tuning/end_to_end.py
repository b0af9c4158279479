"""End-to-end tuning: a packed model learns to predict what its teacher predicts.

    loss = mean over tokens of  kl KL(teacher || student) + ce CE(text, student) + hidden |h - h'|^2 / |h'|^2

KL is over all logits, h and h' are what the heads read. Held-out sequences of the same text are measured from time to
time, by KL, and the best state is the one that is kept. Tuned are the packed layers (`quantkit.tuning.pv`) and the
model's norms, or the layers' low-rank corrections alone (`quantkit.tuning.adapters`).

Several processes (`accelerate launch`, torchrun) share the sequences of every step. Each holds the whole model, adds up
gradients with the others and takes the same step.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from quantkit.core.device import multiplies_bf16
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.formats.low_rank import LowRankWeight
from quantkit.io.run_folder import RunFolder
from quantkit.io.shards import checksum_of
from quantkit.models.forward import patched_forwards
from quantkit.models.linear import Packed, QuantizedLinear, put_in_places
from quantkit.models.structure import check_vocabulary
from quantkit.run.recipe import Calibration
from quantkit.run.teacher import CachedTeacher, Teacher, predict
from quantkit.tuning.adapters import AdaptedLinear, correction_outside, packed_linears
from quantkit.tuning.columns import ColumnScaledLinear, by_columns
from quantkit.tuning.parts.base import tunable
from quantkit.tuning.pv import PVOptimizer, TunedLinear, TunedTensor, rate
from quantkit.tuning.request import PACKED_TEACHER
from quantkit.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

_STATE = "state.pt"
AVERAGED = 0.1
"""The fraction of a run, at its end, over which everything continuous is averaged: the steps' noise falls out."""
EMBEDDING_RATE = 0.5
"""Learning rate of embedding and head, beside that of scales: more of it learns the tuning text by heart."""


@dataclass
class Progress:
    """Progress of a run after one of its steps.

    Attributes:
        step, steps: taken, and in all.
        loss: on the step's sequences, nats a token where it is the KL alone.
        changed: units that got another code in it.
        kl: held-out KL at the last measurement; best: the least of all.
    """

    step: int
    steps: int
    loss: float
    changed: int
    kl: float
    best: float


@dataclass(frozen=True)
class Watch:
    """Functions that a run of tuning calls on its way.

    Attributes:
        progress: called after each step.
        caching: called with (sequences done, sequences in all) while the teacher's predictions are kept.
    """

    progress: Callable[[Progress], None] = lambda _progress: None
    caching: Callable[[int, int], None] = lambda _done, _total: None


def tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    *,
    calibration: Calibration | str = "wikitext2",
    settings: TuningSettings | None = None,
    state: Path | RunFolder | None = None,
    cache: Path | None = None,
    watch: Watch | None = None,
) -> PreTrainedModel:
    """Tunes a packed model in place and returns it.

    Args:
        model: with packed layers, as `quantkit.load` or `quantkit.quantize` gives it.
        teacher: the full-precision model.
        tokenizer: of both.
        calibration: the text; sequences for tuning and held-out ones are drawn from it. Give another seed than
            quantization had (0 by default; here 1): what it was calibrated on it predicts too well to be held out.
        settings: of the run.
        state: a folder to keep the run's state in; the run goes on from what is there and ends in the same model.
        cache: a folder to keep the teacher's predictions in; they are made once, and read in every step.
        watch: what is told on the way.

    Returns:
        The same model with the best state found; `model.quantkit_tuning` holds the held-out KL at each measurement, and
        the first also the full one where the teacher was cached. Where all steps were taken, a last one is of the mean
        of so many steps as its "averaged" says.

    Raises:
        QuantkitError: no packed layers, a packed teacher, a format that cannot be tuned, another vocabulary, or too
            little text.
    """
    settings, watch = settings or TuningSettings(), watch or Watch()
    calibration = Calibration(calibration, 512, seed=1) if isinstance(calibration, str) else calibration
    sequences = checked_text(model, teacher, tokenizer, calibration, settings, cached=cache is not None)
    was_training, teacher_was_training = model.training, teacher.training
    mixed = is_mixed(settings, model.device)
    wanted: Teacher | CachedTeacher = Teacher(teacher.eval(), mixed)
    processes = PartialState(cpu=model.device.type == "cpu")
    folder = RunFolder(state, "a tuning run's state") if isinstance(state, Path) else state
    processes.wait_for_everyone()  # all have looked at what is there
    holds = folder is not None and folder is not state and processes.is_main_process
    run = _Run(model.eval(), wanted, sequences, settings, mixed)
    with folder.begin({"run": "tune"}) if holds and folder is not None else nullcontext():
        try:
            run.begin()
            if cache is not None:
                with processes.main_process_first():
                    kept = RunFolder(cache, "a teacher's predictions")
                    run.teacher = CachedTeacher.fill(kept, teacher, sequences, settings.top, watch.caching, mixed)
                run.begin()
            if folder is not None:
                run.restore(folder)
            processes.wait_for_everyone()
            while run.step < settings.steps and not run.ended:
                run.advance()
                if folder is not None and (run.measured or run.step == settings.steps):
                    run.save(folder)
                watch.progress(run.progress)
        finally:
            run.finish()
            model.train(was_training)
            teacher.train(teacher_was_training)
    model.quantkit_tuning = run.history  # type: ignore[assignment]
    return model


def averaged_steps(steps: int) -> int:
    """How many steps, the last of a run, the mean is of; one alone has none."""
    return max(1, int(AVERAGED * steps))


def is_mixed(settings: TuningSettings, device: torch.device) -> bool:
    """Whether a run multiplies in bf16 and adds up in fp32."""
    return multiplies_bf16(device) if settings.mixed is None else settings.mixed


def checked_text(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    calibration: Calibration,
    settings: TuningSettings,
    cached: bool,
) -> Tensor:
    """The sequences of a run, int64 [sequences, length], the held-out ones first.

    Args:
        model, teacher, tokenizer, calibration, settings: see `tune`; models may be on the meta device.
        cached: whether the teacher's predictions come from a cache.

    Raises:
        QuantkitError: a packed teacher, models that do not belong together, another vocabulary, or too little text.
    """
    if any(isinstance(module, Packed) for module in teacher.modules()):
        raise QuantkitError(f"the teacher is {PACKED_TEACHER}")
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours = (getattr(one.config.get_text_config(), name, None) for one in (teacher, model))
        if theirs != ours:
            raise QuantkitError(
                f"the teacher's {name} is {theirs} and the model's {ours}; give the model that was quantized"
            )
    if cached and settings.hidden:
        raise QuantkitError("a cached teacher has no hidden states; leave out the cache, or the loss on them")
    sequences = calibration.sequences(tokenizer, model)
    check_vocabulary(sequences, teacher)
    if len(sequences) <= settings.held_out:
        raise QuantkitError(
            f"{len(sequences)} sequences of text, {settings.held_out} of them held out: give more text or `num_samples`"
        )
    return sequences


class _Run:
    """A run between two steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher | CachedTeacher,
        sequences: Tensor,
        settings: TuningSettings,
        mixed: bool = False,
    ) -> None:
        self.model, self.teacher, self.sequences, self.settings = model, teacher, sequences, settings
        self._mixed, self._processes = mixed, PartialState()
        self.layers = tuned_layers(model, settings, mixed)  # raises before anything changed
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._dense = [tensor for kind in tuned_dense(model, settings).values() for tensor in kind]
        for tensor in self._dense:
            tensor.parameter.requires_grad_(True)
        put_in_places(model, self.layers)
        self.optimizer = PVOptimizer([*self.layers.values(), *self._dense], settings.pv)
        self.step, self.ended, self.measured = 0, False, False
        self.history: list[dict[str, Any]] = []
        self.best = [tensor.detach().clone() for tensor in self._tensors()]
        self.averaged, self.mean = 0, [torch.zeros_like(parameter) for parameter in self.optimizer.continuous]

    def begin(self) -> None:
        """Measures the model as it is; once more where the teacher is replaced by a cache of it.

        Raises:
            QuantkitError: it predicts NaN, or other logits than the teacher's.
        """
        exact = self.history
        self.history = []
        self._measure(None)
        if exact:
            self.history[0]["full_kl"] = exact[0]["kl"]
        self.progress = Progress(0, self.settings.steps, math.nan, 0, self._kl, self._kl)

    @property
    def _kl(self) -> float:
        return self.history[-1]["kl"]

    def advance(self) -> None:
        """Takes a step; measures where it is time."""
        settings = self.settings
        indices = self._order(self.step)
        self.optimizer.open()
        total = torch.zeros((), dtype=torch.float64)
        for mine in self._own(indices).split(settings.micro_batch):
            with self._recomputing():
                part = self._loss(mine).sum() / (len(indices) * self.sequences.shape[1])
                part.backward()
            total += part.detach().double().cpu()
        loss = float(self._summed(total))
        if not math.isfinite(loss):
            logger.warning("step %d: the loss is %s; the best state so far is kept", self.step + 1, loss)
            self.ended = True
            return
        if self._processes.num_processes > 1:
            for gradient in self._gradients():
                gradient.copy_(self._summed(gradient))
        changed = self.optimizer.step(rate(self.step, settings.steps, settings.warmup))
        self.step += 1
        self.measured = self.step % settings.evaluate_every == 0 or self.step == settings.steps
        self._average()
        if self.measured:
            self._measure(loss)
        if self.step == settings.steps and self.averaged > 1:
            self._take_mean()
        best = min(entry["kl"] for entry in self.history)
        self.progress = Progress(self.step, settings.steps, loss, changed, self._kl, best)

    @torch.no_grad()
    def _average(self) -> None:
        """Counts a step of the run's end into the mean (Izmailov et al., arXiv 1803.05407)."""
        if self.step > self.settings.steps - averaged_steps(self.settings.steps):
            self.averaged += 1
            for mean, parameter in zip(self.mean, self.optimizer.continuous, strict=True):
                mean.lerp_(parameter, 1 / self.averaged)

    @torch.no_grad()
    def _take_mean(self) -> None:
        """Puts the mean in the place of the last step, and measures it: the best state may be that."""
        for mean, parameter in zip(self.mean, self.optimizer.continuous, strict=True):
            parameter.copy_(mean)
        self._measure(None)
        self.history[-1]["averaged"] = self.averaged

    def _order(self, step: int) -> Tensor:
        """The sequences of a step by number: every epoch in an order of its own."""
        count = len(self.sequences) - self.settings.held_out
        chosen = []
        for place in range(step * self.settings.batch, (step + 1) * self.settings.batch):
            epoch, index = divmod(place, count)
            generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            chosen.append(torch.randperm(count, generator=generator)[index])
        return torch.stack(chosen) + self.settings.held_out

    def _own(self, indices: Tensor) -> Tensor:
        """This process's part of some sequences."""
        return indices[self._processes.process_index :: self._processes.num_processes]

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self._processes.num_processes == 1:
            return tensor
        return reduce(tensor.to(self._processes.device), "sum").to(tensor.device)

    def _gradients(self) -> Iterator[Tensor]:
        for part in self.optimizer.layers:
            yield from part.gradients()

    def _recomputing(self) -> AbstractContextManager:
        """A forward and backward pass that keeps only the blocks' inputs, where that is asked for."""
        wanted = self.settings.corrections if self.settings.recompute is None else self.settings.recompute
        if not wanted:
            return nullcontext()
        lists = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        _, blocks = max(lists, key=lambda found: sum(name.startswith(f"{found[0]}.") for name in self.layers))
        return patched_forwards(blocks, [partial(checkpoint, block.forward, use_reentrant=False) for block in blocks])

    def _loss(self, indices: Tensor) -> Tensor:
        """Each token's loss, [sequences, length]; the last of a sequence predicts nothing, and has no cross-entropy."""
        settings = self.settings
        tokens = self.sequences[indices]
        found = predict(self.model, tokens, self._mixed)
        kl, distance = self.teacher.divergence(tokens, indices, found)
        loss = settings.kl * kl
        if settings.hidden:
            if distance is None:
                raise QuantkitError("the teacher's hidden states are of another size; tune without a loss on them")
            loss = loss + settings.hidden * distance.to(kl.device)
        if settings.ce:
            following = tokens[:, 1:].to(found.logits.device)
            ce = torch.nn.functional.cross_entropy(
                found.logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="none"
            )
            loss = loss + settings.ce * torch.nn.functional.pad(ce.view(following.shape), (0, 1)).to(loss.device)
        return loss

    @torch.no_grad()
    def _measure(self, loss: float | None) -> None:
        for part in self.optimizer.layers:
            part.open()
        total = torch.zeros((), dtype=torch.float64)
        for mine in self._own(torch.arange(self.settings.held_out)).split(self.settings.micro_batch):
            tokens = self.sequences[mine]
            each, _ = self.teacher.divergence(tokens, mine, predict(self.model, tokens, self._mixed))
            total += each.double().sum().cpu()
        kl = float(self._summed(total)) / (self.settings.held_out * self.sequences.shape[1])
        if math.isfinite(kl) and kl < min((entry["kl"] for entry in self.history), default=math.inf):
            self.best = [tensor.detach().clone() for tensor in self._tensors()]
        if not math.isfinite(kl) and not self.history:
            raise QuantkitError("the model predicts NaN before it is tuned; its weights are damaged")
        self.history.append({"step": self.step, "loss": loss, "kl": kl})
        since = len(self.history) - 1 - min(range(len(self.history)), key=lambda i: self.history[i]["kl"])
        self.ended |= not math.isfinite(kl) or (self.settings.patience is not None and since >= self.settings.patience)

    def _tensors(self) -> Iterator[Tensor]:
        """Everything that tuning changes, in an order that does not change."""
        for part in self.optimizer.layers:
            yield from part.state()

    def finish(self) -> None:
        """Puts the best state, packed, into the model."""
        with torch.no_grad():
            for tensor, best in zip(self._tensors(), self.best, strict=True):
                tensor.copy_(best)
        put_in_places(
            self.model, {name: QuantizedLinear(layer.packed, layer.bias) for name, layer in self.layers.items()}
        )
        for dense in self._dense:
            dense.open()
            dense.parameter.requires_grad_(False)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def save(self, folder: RunFolder) -> None:
        """Everything that the rest of the run depends on, by the first process."""
        if not self._processes.is_main_process:
            return
        tensors, targets = [
            [tensor.detach() for tensor in group] for group in (self._tensors(), self.optimizer.targets)
        ]
        content = {
            "step": self.step,
            "ended": self.ended,
            "history": self.history,
            "best": self.best,
            "tensors": tensors,
            "targets": targets,
            "adam": self.optimizer.adam.state_dict(),
            "averaged": self.averaged,
            "mean": self.mean if self.averaged else [],
        }
        content["checksum"] = _checksum(content)
        needed = 3 * sum(tensor.nbytes for tensor in [*self.best, *tensors, *targets])  # Adam keeps two more of each
        folder.write(_STATE, lambda target: torch.save(content, target), needed)

    def restore(self, folder: RunFolder) -> None:
        """The inverse of `save`, where something was saved.

        Raises:
            CheckpointError: the file is damaged.
            QuantkitError: it is of a run with other settings.
        """
        if self._processes.is_main_process:
            folder.identify(self._identity())
        if not folder.has(_STATE):
            return
        path = folder.path(_STATE)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise CheckpointError(f"{path} is not a tuning run's state ({type(error).__name__}); remove it") from error
        if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
            raise CheckpointError(f"{path} is not as it was written; remove it, and the run begins anew")
        self.step, self.ended, self.history, self.best = (content[key] for key in ("step", "ended", "history", "best"))
        self.averaged = content["averaged"]
        with torch.no_grad():
            pairs = [*zip(self._tensors(), content["tensors"], strict=True)]
            pairs += zip(self.optimizer.targets, content["targets"], strict=True)
            if self.averaged:
                pairs += zip(self.mean, content["mean"], strict=True)
            for tensor, saved in pairs:
                tensor.copy_(saved)
        self.optimizer.adam.load_state_dict(content["adam"])

    def _identity(self) -> dict[str, Any]:
        """What the run's outcome depends on; two models differ in their first loss, if in nothing else."""
        layers = json.dumps({name: str(layer) for name, layer in self.layers.items()})
        return {
            "settings": asdict(self.settings),
            "layers": hashlib.sha256(layers.encode()).hexdigest(),
            "text": hashlib.sha256(self.sequences.numpy().tobytes()).hexdigest(),
            "kl": f"{self.history[0]['kl']:.5g}",
            "averaged": AVERAGED,
        }


def _checksum(content: dict[str, Any]) -> str:
    """Of all that a state holds."""
    tensors: dict[str, Tensor] = {}
    rest: list[str] = []
    open_parts: list[tuple[str, Any]] = [("", content)]
    while open_parts:
        place, value = open_parts.pop()
        if isinstance(value, dict | list | tuple):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            open_parts += [(f"{place}/{key}", part) for key, part in inner]
        elif isinstance(value, Tensor):
            tensors[place] = value
        else:
            rest.append(f"{place} {value!r}")
    return hashlib.sha256("\n".join([checksum_of(tensors), *sorted(rest)]).encode()).hexdigest()


def tuned_dense(model: PreTrainedModel, settings: TuningSettings) -> dict[str, list[TunedTensor]]:
    """The dense parameters that are tuned, by kind. Rows of an embedding move less than scales, which weights share."""
    norms = [
        TunedTensor(parameter, 1.0)
        for module in model.modules()
        if settings.norms and not settings.corrections and "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    ]
    wanted = settings.embeddings and not settings.corrections
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if wanted else []
    tables = {id(p): p for module in ends if not isinstance(module, QuantizedLinear) for p in module.parameters()}
    return {"norms": norms, "embeddings": [TunedTensor(table, EMBEDDING_RATE) for table in tables.values()]}


def tuned_layers(model: PreTrainedModel, settings: TuningSettings, mixed: bool) -> dict[str, Any]:
    """The packed layers as they will be tuned."""
    packed, kind = packed_linears(model), torch.bfloat16 if mixed else model.dtype
    if not settings.corrections:
        stay = settings.pv.mode in ("auto", "continuous")
        return {
            name: ColumnScaledLinear(linear.packed, linear.bias, kind)
            if stay and by_columns(linear.packed)
            else TunedLinear(tunable(linear.packed), linear.bias)
            for name, linear in packed.items()
        }
    found = {name: correction_outside(linear.packed) for name, linear in packed.items()}
    adapted = {
        name: AdaptedLinear(weight, packed[name].bias)
        for name, weight in found.items()
        if isinstance(weight, LowRankWeight)
    }
    if not adapted:
        raise QuantkitError("the model's layers have no low-rank corrections; quantize it with `low_rank` RANK first")
    return adapted
