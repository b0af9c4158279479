"""End-to-end tuning: a packed model learns to predict what its teacher predicts.

    loss = mean over tokens of KL(teacher || student), on all logits

The teacher runs beside the student; nothing is cached. Held-out windows of the same text are measured from time to
time, and the best state is the one that is kept. Tuned are the packed layers (`quantkit.tuning.pv`) and the model's
norms.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.checkpoint import write_durably
from quantkit.errors import QuantkitError
from quantkit.linear import QuantizedLinear
from quantkit.metrics import token_kl
from quantkit.model import check_vocabulary
from quantkit.recipe import Calibration
from quantkit.tuning.pv import PVOptimizer, PVSettings, TunedLinear
from quantkit.tuning.tunable import tunable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningSettings:
    """A run of tuning.

    Attributes:
        steps: of the optimizer.
        batch: windows a step.
        micro_batch: windows that run through the models together; gradients are summed up to a batch.
        warmup: share of the steps in which learning rates rise to their full size; then they fall linearly to a tenth.
        evaluate_every: steps between measurements of the held-out windows.
        held_out: windows that are measured, and not tuned on.
        patience: measurements without a new best after which the run ends; None to go on.
        norms: tune the model's norms too.
        seed: of the order of windows.
        pv: of a step.
    """

    steps: int = 200
    batch: int = 8
    micro_batch: int = 4
    warmup: float = 0.05
    evaluate_every: int = 20
    held_out: int = 16
    patience: int | None = None
    norms: bool = True
    seed: int = 0
    pv: PVSettings = field(default_factory=PVSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "evaluate_every", "held_out"):
            if getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: give at least 1")
        if self.patience is not None and self.patience < 1:
            raise QuantkitError(f"patience={self.patience}: give at least 1, or none")

    def rate(self, step: int) -> float:
        """The share of the learning rates in step 0, 1, ..."""
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        return min(1.0, rising, max(0.1, 1 - step / self.steps))


@dataclass
class Progress:
    """What is known after a step.

    Attributes:
        step, steps: taken, and in all.
        loss: KL on the step's windows, nats a token.
        changed: units that got another code in it.
        kl: held-out KL at the last measurement; best: the least of all.
    """

    step: int
    steps: int
    loss: float
    changed: int
    kl: float
    best: float


def tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    *,
    calibration: Calibration | str = "wikitext2",
    settings: TuningSettings | None = None,
    state: Path | None = None,
    progress: Callable[[Progress], None] = lambda _progress: None,
) -> PreTrainedModel:
    """Tunes a packed model in place and returns it.

    Args:
        model: with packed layers, as `quantkit.load` or `quantkit.quantize` gives it.
        teacher: the full-precision model.
        tokenizer: of both.
        calibration: the text; windows for tuning and held-out ones are drawn from it. Give another seed than
            quantization had (0 by default; here 1): what it was calibrated on it predicts too well to be held out.
        settings: of the run.
        state: a file to keep the run's state in; where it exists, the run goes on from it and ends in the same model.
        progress: called after each step.

    Returns:
        The same model with the best state found; `model.quantkit_tuning` holds the held-out KL at each measurement.

    Raises:
        QuantkitError: no packed layers, a format that cannot be tuned, another vocabulary, or too little text.
    """
    settings = settings or TuningSettings()
    calibration = Calibration(calibration, 512, seed=1) if isinstance(calibration, str) else calibration
    if model.config.vocab_size != teacher.config.vocab_size:
        raise QuantkitError(
            f"the teacher predicts {teacher.config.vocab_size} tokens and the model {model.config.vocab_size}; "
            "give the model that was quantized"
        )
    windows = calibration.windows(tokenizer, model)
    check_vocabulary(windows, teacher)
    if len(windows) <= settings.held_out:
        raise QuantkitError(
            f"{len(windows)} windows of text, {settings.held_out} of them held out: give more text or --num-samples"
        )
    was_training, teacher_was_training = model.training, teacher.training
    run = _Run(model.eval(), teacher.eval(), windows, settings)
    try:
        run.begin()
        if state is not None and state.exists():
            run.restore(state)
        while run.step < settings.steps and not run.ended:
            run.advance()
            if state is not None and (run.measured or run.step == settings.steps):
                run.save(state)
            progress(run.progress)
    finally:
        run.finish()
        model.train(was_training)
        teacher.train(teacher_was_training)
    model.quantkit_tuning = run.history  # type: ignore[assignment]
    return model


class _Run:
    """A run between two steps."""

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: TuningSettings
    ) -> None:
        self.model, self.teacher, self.settings = model, teacher, settings
        self.windows, self.held_out = windows[settings.held_out :], windows[: settings.held_out]
        packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        if not packed:
            raise QuantkitError("the model has no packed layers; quantize it first")
        for module in packed.values():
            module.unshare()
        parts = {name: tunable(module.packed) for name, module in packed.items()}  # raises before anything changed
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._norms = [
            parameter
            for name, module in model.named_modules()
            if settings.norms and "norm" in type(module).__name__.lower()
            for parameter in module.parameters(recurse=False)
        ]
        for parameter in self._norms:
            parameter.requires_grad_(True)
        self.layers = {name: TunedLinear(parts[name], packed[name].bias) for name in packed}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        self.optimizer = PVOptimizer(list(self.layers.values()), self._norms, settings.pv)
        self.step, self.ended, self.measured = 0, False, False
        self.history: list[dict[str, Any]] = []
        self.best = [tensor.detach().clone() for tensor in self._tensors()]

    def begin(self) -> None:
        """Measures the model as it is.

        Raises:
            QuantkitError: it predicts NaN, or other logits than the teacher's.
        """
        self._measure(None)
        self.progress = Progress(0, self.settings.steps, math.nan, 0, self._kl, self._kl)

    @property
    def _kl(self) -> float:
        return self.history[-1]["kl"]

    def advance(self) -> None:
        """Takes a step; measures where it is time."""
        settings = self.settings
        batch = self.windows[self._order(self.step)]
        self.optimizer.open()
        loss = 0.0
        for tokens in batch.split(settings.micro_batch):
            share = len(tokens) / len(batch)
            kl = self._divergence(tokens).mean()
            (share * kl).backward()
            loss += share * float(kl.detach())
        if not math.isfinite(loss):
            logger.warning("step %d: the loss is %s; the best state so far is kept", self.step + 1, loss)
            self.ended = True
            return
        changed = self.optimizer.step(settings.rate(self.step))
        self.step += 1
        self.measured = self.step % settings.evaluate_every == 0 or self.step == settings.steps
        if self.measured:
            self._measure(loss)
        best = min(entry["kl"] for entry in self.history)
        self.progress = Progress(self.step, settings.steps, loss, changed, self._kl, best)

    def _order(self, step: int) -> Tensor:
        """The windows of a step: every epoch in an order of its own."""
        count = len(self.windows)
        chosen = []
        for place in range(step * self.settings.batch, (step + 1) * self.settings.batch):
            epoch, index = divmod(place, count)
            generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            chosen.append(torch.randperm(count, generator=generator)[index])
        return torch.stack(chosen)

    def _divergence(self, tokens: Tensor) -> Tensor:
        """KL of each token, [windows, length]."""
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens.to(self.teacher.device), use_cache=False).logits
        found = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits
        if found.shape != wanted.shape:
            raise QuantkitError(f"the teacher's logits are {tuple(wanted.shape)}, the model's {tuple(found.shape)}")
        return token_kl(wanted.to(found.device), found)

    @torch.no_grad()
    def _measure(self, loss: float | None) -> None:
        for layer in self.layers.values():
            layer.open()
        sums = [
            float(self._divergence(tokens).double().sum()) for tokens in self.held_out.split(self.settings.micro_batch)
        ]
        kl = sum(sums) / self.held_out.numel()
        if math.isfinite(kl) and kl < min((entry["kl"] for entry in self.history), default=math.inf):
            self.best = [tensor.detach().clone() for tensor in self._tensors()]
        if not math.isfinite(kl) and not self.history:
            raise QuantkitError("the model predicts NaN before it is tuned; its weights are damaged")
        self.history.append({"step": self.step, "loss": loss, "kl": kl})
        since = len(self.history) - 1 - min(range(len(self.history)), key=lambda i: self.history[i]["kl"])
        self.ended |= not math.isfinite(kl) or (self.settings.patience is not None and since >= self.settings.patience)

    def _tensors(self) -> Iterator[Tensor]:
        """Everything that tuning changes, in an order that does not change."""
        for layer in self.layers.values():
            yield from layer.parts.state_dict().values()
        yield from self._norms

    def finish(self) -> None:
        """Puts the best state, packed, into the model."""
        with torch.no_grad():
            for tensor, best in zip(self._tensors(), self.best, strict=True):
                tensor.copy_(best)
        for name, layer in self.layers.items():
            self.model.set_submodule(name, QuantizedLinear(layer.parts.packed(), layer.bias))
        for parameter in self._norms:
            parameter.requires_grad_(False)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on, durably."""
        tensors, targets = [
            [tensor.detach() for tensor in group] for group in (self._tensors(), self.optimizer.targets)
        ]
        content = {
            "identity": self._identity(),
            "step": self.step,
            "ended": self.ended,
            "history": self.history,
            "best": self.best,
            "tensors": tensors,
            "targets": targets,
            "adam": self.optimizer.adam.state_dict(),
        }
        needed = 3 * sum(tensor.nbytes for tensor in [*self.best, *tensors, *targets])  # Adam keeps two more of each
        write_durably(path, lambda target: torch.save(content, target), needed)

    def restore(self, path: Path) -> None:
        """The inverse of `save`.

        Raises:
            QuantkitError: the file is damaged, or of a run with other settings.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise QuantkitError(f"{path} is not a tuning run's state ({type(error).__name__}); remove it") from error
        if content["identity"] != self._identity():
            raise QuantkitError(
                f"{path} is the state of a run with other settings, text or model; remove it to start anew"
            )
        self.step, self.ended, self.history, self.best = (content[key] for key in ("step", "ended", "history", "best"))
        with torch.no_grad():
            pairs = [*zip(self._tensors(), content["tensors"], strict=True)]
            pairs += zip(self.optimizer.targets, content["targets"], strict=True)
            for tensor, saved in pairs:
                tensor.copy_(saved)
        self.optimizer.adam.load_state_dict(content["adam"])

    def _identity(self) -> str:
        layers = {name: str(layer.parts) for name, layer in self.layers.items()}
        text = json.dumps([asdict(self.settings), layers, self.history[0]["kl"]])
        return hashlib.sha256(text.encode() + self.windows.numpy().tobytes()).hexdigest()
