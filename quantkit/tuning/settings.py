"""Settings of a run of tuning and of its steps, apart from what carries them out, which imports torch."""

from dataclasses import dataclass, field

from quantkit.core.errors import QuantkitError

MODES = ("auto", "buffer", "linearized", "straight-through", "continuous")


@dataclass(frozen=True)
class PVSettings:
    """Settings of a step of PV-Tuning.

    Attributes:
        mode: see `quantkit.tuning.pv`.
        lr: of continuous parts, in units of their size.
        code_lr: of targets, in units of what a code can tell apart: a layer's root mean square weight / 2^bits; half
            of it for trellis codes (`Coded.pace`), in modes in which they move.
        fraction: of a layer's units that may be coded again in a step.
        trust: largest relative change of a layer's weights by codes in a step.
        decay: pull of targets towards the weights, 0 to 1.
        betas: Adam's.
    """

    mode: str = "auto"
    lr: float = 1e-2
    code_lr: float = 0.12
    fraction: float = 0.1
    trust: float = 0.1
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise QuantkitError(f"mode={self.mode!r}: choose one of {', '.join(MODES)}")
        for name in ("lr", "code_lr"):
            if not 0 <= getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: from 0 to below 1")
        for name in ("fraction", "trust", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: a fraction, from 0 to 1")


@dataclass(frozen=True)
class TuningSettings:
    """Settings of end-to-end tuning.

    Attributes:
        steps: of the optimizer.
        batch: sequences a step, over all processes.
        micro_batch: sequences that run through the models together; gradients are summed up to a batch.
        warmup: fraction of the steps in which learning rates rise to full size; then they fall linearly to a tenth.
        evaluate_every: steps between measurements of the held-out sequences.
        held_out: sequences that are measured, and not tuned on.
        patience: measurements without a new best after which the run ends; None to go on.
        norms: tune the model's norms too.
        embeddings: tune the embedding and the head too, where they are dense; they stay of the model's dtype, and take
            four times their size in fp32 meanwhile.
        corrections: tune low-rank corrections alone (LREC): the packed weight stays as it is, and gradients and
            optimizer are as small as the corrections.
        kl, ce, hidden: weights of the loss's terms; see `quantkit.tuning.end_to_end`.
        recompute: keep only the blocks' inputs for the backward pass and run each block once more; None for what suits:
            with corrections alone, where activations are most of the memory.
        mixed: multiply in bf16 and add up in fp32; None: on a CPU with instructions for it, where that takes two thirds
            of the time. On a GPU models compute in the type that they were loaded in.
        top: how many top-k tokens of each prediction a cache of the teacher keeps.
        seed: of the order of sequences.
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
    embeddings: bool = False
    corrections: bool = False
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    recompute: bool | None = None
    mixed: bool | None = None
    top: int = 64
    seed: int = 0
    pv: PVSettings = field(default_factory=PVSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "evaluate_every", "held_out", "top"):
            if getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: give at least 1")
        if self.patience is not None and self.patience < 1:
            raise QuantkitError(f"patience={self.patience}: give at least 1, or none")
        weights = (self.kl, self.ce, self.hidden)
        if min(weights) < 0 or max(weights) <= 0:
            raise QuantkitError(f"the loss weighs kl {self.kl:g}, ce {self.ce:g}, hidden {self.hidden:g}: none may be "
                                "negative, and one must be positive")  # fmt: skip
