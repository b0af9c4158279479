"""The reverse pass: how much a model's predictions feel what happens at the outputs of its layers.

With d the gradient at a layer's output of the log-likelihood of what the model itself predicts, a small change e of
that output changes a token's prediction by KL = 1/2 E[(d^T e)^2]. For a layer whose weight is off by E,

    KL ~ 1/2 tr(H_O E H_I E^T),    H_O = mean over tokens of d d^T,    H_I = sum of s x x^T / sum of s,    s = |d|^2

(a Kronecker factor for each side, as K-FAC has them: Martens and Grosse, arXiv 1503.05671; for quantization YAQA, arXiv
2505.22988, and by s alone GuidedQuant, arXiv 2505.07004). Quantizers read both sides: the inputs' moments count tokens
by s, and error feedback among rows works in the metric of H_O (`quantizers.row_feedback`).

d is drawn without labels: at the logits, g = sqrt(p) * n - p (sqrt(p)^T n) with n ~ N(0, I) has E[g g^T] =
diag(p) - p p^T, the curvature of KL there, and is taken back through the blocks, last to first, each run anew from its
kept input. Memory is one block and the blocks' inputs for some of the sequences.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.core.device import free_memory
from quantkit.core.errors import CalibrationError, QuantkitError
from quantkit.core.linalg import mirrored, moments
from quantkit.io.files import write_durably
from quantkit.models.experts import place
from quantkit.models.forward import Batch, WeightSource, Wrap, capture, divided, head_logits, run_block
from quantkit.models.structure import find_blocks, linear_weight
from quantkit.run.experts import STRENGTH
from quantkit.run.processes import ALONE, Together

LARGEST_WEIGHT = 8.0
"""Of a token, in units of the mean: a few tokens would otherwise be all that a layer is made for."""
KEPT_FRACTION = 1 / 4
"""Of the free memory, for the inputs of all blocks."""
BATCH_TOKENS = 2048
"""Tokens that run back through a block together."""
LOGITS = 2**25
"""That are sampled at once."""
_DONE = "done"


@dataclass(frozen=True)
class Fisher:
    """What the reverse pass found, in a folder with a file a block.

    Attributes:
        folder: where.
        prefix: of the blocks' names.
    """

    folder: Path
    prefix: str
    _means: dict[tuple[str, str], Tensor | None] = field(default_factory=dict, repr=False)

    def token_weights(self, layers: Sequence[str]) -> Tensor | None:
        """s of layers that share their inputs, fp32 [sequences, tokens] with a mean of 1, and cut at `LARGEST_WEIGHT`.

        A token's weight is the sum of squares of the gradients at the outputs of all these layers. None where one was
        not measured, and for routed experts: the quantized stream may send them other tokens.
        """
        found = [self._read(layer, "squares") for layer in layers]
        known = [squares for squares in found if squares is not None]
        if len(known) < len(layers):
            return None
        squares = torch.stack(known).sum(0)
        mean = squares.mean()
        if not float(mean) > 0:  # nothing behind this layer depends on it
            return torch.ones_like(squares)
        return (squares / mean).clamp(max=LARGEST_WEIGHT)

    def outputs(self, layer: str) -> Tensor | None:
        """H_O of a layer, fp32 [out_features, out_features]; None where it was not measured, or nothing is felt.

        An expert's is drawn towards the mean of its layer's, as its inputs' moments are (`run.experts`).
        """
        found, at = self._mean(layer), place(layer)
        if at is None:
            return found
        known = (at[0], at[2])
        if known not in self._means:
            self._means.clear()  # those of other blocks
            self._means[known] = self._mean_of_experts(layer)
        mean = self._means[known]
        if mean is None:
            return None
        count = self._count(layer)
        own = torch.zeros_like(mean) if found is None else found / max(count, 1)
        share = STRENGTH * len(mean) / (count + STRENGTH * len(mean))
        return torch.lerp(own, mean, share) * max(count, 1)

    def _mean(self, layer: str) -> Tensor | None:
        """H_O as it was measured."""
        found, scale = self._read(layer, "outputs"), self._read(layer, "scale")
        return None if found is None or scale is None or not bool(found.any()) else found.float() * scale

    def _count(self, layer: str) -> int:
        count = self._read(layer, "count")
        return 0 if count is None else int(count)

    def _mean_of_experts(self, layer: str) -> Tensor | None:
        """H_O of a token that has chosen one of the experts, over all tokens of all; None where nothing is felt."""
        own, total, count = place(layer), None, 0
        with safe_open(self._file(layer), "pt") as file:
            others = [name.removesuffix(".outputs") for name in file.keys() if name.endswith(".outputs")]
        for other in others:
            at = place(other)
            if own is not None and at is not None and at[::2] == own[::2] and (found := self._mean(other)) is not None:
                total, count = found if total is None else total + found, count + self._count(other)
        return None if total is None or not count else total / count

    def _read(self, layer: str, what: str) -> Tensor | None:
        with safe_open(self._file(layer), "pt") as file:
            name = f"{layer}.{what}"
            found: Tensor | None = file.get_tensor(name) if name in set(file.keys()) else None
            return found

    def _file(self, layer: str) -> Path:
        return _path(self.folder, int(layer.removeprefix(f"{self.prefix}.").split(".")[0]))


def _path(folder: Path, index: int) -> Path:
    return folder / f"block-{index}.safetensors"


@dataclass
class _Sums:
    """Of a layer: the sum of d d^T, fp32 [out, out], over `count` tokens; |d|^2 of each where all pass through it."""

    outputs: Tensor
    squares: list[Tensor] | None
    count: int = 0

    def take(self, felt: Sequence[tuple[int, Tensor | None]]) -> None:
        """Takes note of batches: tokens of each, and their |d|^2, or None where not all pass through the layer."""
        for count, squares in felt:
            self.count += count
            if squares is None:
                self.squares = None
            elif self.squares is not None:
                self.squares.append(squares)


def measure(
    model: nn.Module,
    layers: Collection[str],
    tokens: Tensor,
    source: WeightSource,
    device: torch.device,
    folder: Path,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    together: Together = ALONE,
) -> Fisher:
    """Runs the reverse pass over a full-precision model.

    Args:
        model: a causal language model; its weights may be on the meta device until `source` loads them.
        layers: names of linear layers in its blocks.
        tokens: int64 [sequences, seqlen].
        source: loads and releases modules; the head too.
        device: where blocks run.
        folder: for the results, a file a block; what an earlier call has finished there is taken as it is.
        seed: of the samples at the logits.
        progress: called with (blocks done, blocks in all, name), a block forth and back counting as two.
        together: processes that share the pass, each of them some batches; the first one writes the files.

    Raises:
        CalibrationError: a gradient is NaN or Inf, or does not come back to the first block.
        QuantkitError: not all processes see the folder.
    """
    prefix, blocks = find_blocks(model)
    names = {i: [layer for layer in layers if layer.startswith(f"{prefix}.{i}.")] for i in range(len(blocks))}
    together.lead(lambda: folder.mkdir(parents=True, exist_ok=True))
    together.alike(lambda: _check_seen(folder))
    if together.first(lambda: _is_whole(folder)):
        return Fisher(folder, prefix)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise CalibrationError(
            "the model's weights were made in torch.inference_mode, and nothing passes back through them; load it "
            "outside of it, or leave out `fisher`"
        )
    this = _Reverse(model, tokens, source, device, folder, names, seed, progress, together)
    parts = tokens.split(together.first(lambda: _at_once(model, tokens)))
    with torch.inference_mode(False):
        for number, part in enumerate(parts):
            this.run(part, number, len(parts))

    def end() -> None:
        """Says that all files are there, and what is in them."""
        record = json.dumps({_path(folder, index).name: _digest(_path(folder, index)) for index in names}).encode()
        write_durably(folder / _DONE, lambda path: path.write_bytes(record), len(record))

    together.lead(end)
    return Fisher(folder, prefix)


def _check_seen(folder: Path) -> None:
    """Raises QuantkitError where what the first process has written is not to be seen."""
    if not folder.is_dir():
        raise QuantkitError(
            f"{folder}, where the first process leaves what predictions feel, is not there on {socket.gethostname()}; "
            "give an `output` on a file system that all machines see, or leave out `fisher`"
        )


def _is_whole(folder: Path) -> bool:
    """Whether an earlier call has finished, and its files are as it left them."""
    try:
        digests = json.loads((folder / _DONE).read_text())
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _at_once(model: nn.Module, tokens: Tensor) -> int:
    """Sequences whose blocks' inputs fit in memory together; whole batches, so that sums do not depend on it."""
    _, blocks = find_blocks(model)
    hidden = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    itemsize = torch.empty(0, dtype=next(model.parameters()).dtype).element_size()
    sequence = tokens.shape[1] * hidden * itemsize * (len(blocks) + 1)
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    return max(1, int(KEPT_FRACTION * free_memory(torch.device("cpu")) / sequence / batch)) * batch


@dataclass
class _Reverse:
    """The pass; see `measure`."""

    model: nn.Module
    tokens: Tensor
    source: WeightSource
    device: torch.device
    folder: Path
    names: dict[int, list[str]]
    seed: int
    progress: Callable[[int, int, str], None]
    together: Together

    def run(self, tokens: Tensor, part: int, parts: int) -> None:
        """Takes some sequences through the model and back, and adds what is seen to the files."""
        prefix, blocks = find_blocks(self.model)
        total = 2 * len(blocks) * parts
        done = 2 * len(blocks) * part
        first = len(self.tokens) - len(tokens) if part == parts - 1 else part * len(tokens)
        with torch.no_grad():
            batches, wrap = self.together.alike(
                partial(
                    capture, self.model, blocks, tokens, self.source, self.device, BATCH_TOKENS, only=self.together.own
                )
            )
        sizes = [len(each) for each in divided(tokens, BATCH_TOKENS)]
        starts = list(accumulate(sizes[:-1], initial=first))  # the first sequence of each batch
        kept: list[list[Tensor]] = []
        for index, block in enumerate(blocks):
            self.progress(done + index, total, f"{prefix}.{index}")
            with self._loaded(f"{prefix}.{index}", block), torch.no_grad():
                kept.append([batch.quantized.cpu() for batch in batches])
                for batch in batches:
                    batch.quantized = run_block(block, batch.quantized, batch.call(index))
        gradients = self._at_the_head(batches, wrap, starts[self.together.own])
        for index in reversed(range(len(blocks))):
            self.progress(done + 2 * len(blocks) - 1 - index, total, f"{prefix}.{index}, in reverse")
            with self._loaded(f"{prefix}.{index}", blocks[index]):
                turns = self.together.turns(len(starts))
                gradients, sums = self._back(index, blocks[index], batches, kept.pop(), gradients, turns, part == 0)
                self.together.lead(partial(self._write, index, sums, part == parts - 1))

    @contextmanager
    def _loaded(self, name: str, module: nn.Module) -> Iterator[None]:
        """A module on the device, whose weights want no gradients."""
        self.source.load(name, module, self.device)
        wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in wanting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanting:
                parameter.requires_grad_(True)
            self.source.release(name, module)

    def _at_the_head(self, batches: list[Batch], wrap: Wrap, starts: list[int]) -> list[Tensor]:
        """Gradients at the last block's outputs, [sequences, tokens, hidden_size] a batch.

        Args:
            batches: behind the last block.
            wrap: the form in which blocks return hidden states.
            starts: number of the first sequence of each batch, by which samples are drawn.
        """
        _, blocks = find_blocks(self.model)
        size = max(1, LOGITS // self.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        found = []
        with self._loaded("", self.model):
            for batch, start in zip(batches, starts, strict=True):
                rows = []
                for number, (row, tokens) in enumerate(
                    zip(batch.quantized.split(1), batch.tokens.split(1), strict=True), start
                ):
                    generator = torch.Generator(row.device).manual_seed(self.seed + number)
                    pieces = []
                    for hidden, own in zip(row.split(size, 1), tokens.split(size, 1), strict=True):
                        hidden = hidden.detach().requires_grad_()
                        with torch.enable_grad():
                            logits = head_logits(self.model, blocks, own.to(self.device), hidden, wrap)
                        sample = _sample(logits.detach(), generator)
                        pieces.append(torch.autograd.grad(logits, hidden, sample.to(logits.dtype))[0])
                    rows.append(torch.cat(pieces, 1))
                found.append(torch.cat(rows))
                batch.quantized = batch.full = rows[0].new_empty(0)  # gone from here on
        return found

    def _back(
        self,
        index: int,
        block: nn.Module,
        batches: list[Batch],
        kept: list[Tensor],
        after: list[Tensor],
        turns: Collection[int],
        first: bool,
    ) -> tuple[list[Tensor], dict[str, _Sums]]:
        """Takes gradients from a block's outputs to its inputs, and notes what passes its layers' outputs.

        Returns:
            (the gradients; the sums over the batches of all processes, which those of earlier sequences are part of in
            the first process).
        """
        prefix, _ = find_blocks(self.model)
        sums = {} if first or not self.together.is_first else self._so_far(index)
        before = []
        for turn, _ in enumerate(turns):
            seen: dict[str, Tensor] = {}
            if turn < len(batches):
                batch, hidden = batches[turn], kept[turn].to(self.device).requires_grad_()
                with torch.enable_grad(), _watched(block, f"{prefix}.{index}", self.names[index], seen):
                    output = run_block(block, hidden, batch.call(index))
                before.append(torch.autograd.grad(output, hidden, after[turn])[0])
            facts = {name: _felt(d, batch.tokens, place(name) is not None) for name, d in seen.items()}
            found: list[dict[str, tuple[int, Tensor | None]]] = self.together.each(partial(dict, facts))
            reached = {name: felt for name in self.names[index] if (felt := [f[name] for f in found if name in f])}
            given = {}
            for name, felt in reached.items():
                out_features = linear_weight(self.model.get_submodule(name)).shape[0]
                rows = seen.get(name, torch.empty(0, device=self.device)).reshape(-1, out_features).float()
                sums.setdefault(name, _Sums(rows.new_zeros(out_features, out_features), [])).take(felt)
                given[name] = rows
            self.together.add(pair for name, rows in given.items() for pair in moments(sums[name].outputs, rows, rows))
        return before, sums

    def _so_far(self, index: int) -> dict[str, _Sums]:
        """What earlier sequences have left in a block's file."""
        state, found = load_file(_path(self.folder, index)), {}
        for name in self.names[index]:
            squares = state.get(f"{name}.squares")
            outputs, count = state[f"{name}.outputs"].to(self.device), int(state[f"{name}.count"])
            found[name] = _Sums(outputs, None if squares is None else [squares], count)
        return found

    def _write(self, index: int, sums: dict[str, _Sums], last: bool) -> None:
        """Writes a block's file: sums in fp32, and with the last sequences means in fp16."""
        state: dict[str, Tensor] = {}
        for name in self.names[index]:
            if name not in sums:  # no token came this way
                out_features = linear_weight(self.model.get_submodule(name)).shape[0]
                sums[name] = _Sums(torch.zeros(out_features, out_features), None)
            outputs, squares = mirrored(sums[name].outputs).cpu(), sums[name].squares
            state[f"{name}.count"] = torch.tensor(sums[name].count)
            if not bool(torch.isfinite(outputs).all()):
                raise CalibrationError(f"{name}: the gradients at its outputs hold NaN or Inf; leave out `fisher`")
            if squares is not None and sum(map(len, squares)) > 0:
                state[f"{name}.squares"] = torch.cat(squares)
            if last:
                outputs = outputs / self.tokens.numel()
                scale = outputs.diagonal().amax().clamp_min(1e-30)
                outputs, state[f"{name}.scale"] = (outputs / scale).half(), scale.view(1)
                if squares is not None and sum(map(len, squares)) != len(self.tokens):
                    state.pop(f"{name}.squares", None)
            state[f"{name}.outputs"] = outputs
        needed = sum(tensor.nbytes for tensor in state.values())
        write_durably(_path(self.folder, index), lambda path: save_file(state, path), needed)


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """g with E[g g^T] = diag(p) - p p^T, fp32 [1, tokens, vocabulary] as the logits."""
    p = logits.float().softmax(-1)
    drawn = p.sqrt().mul_(torch.randn(p.shape, generator=generator, device=p.device))
    return drawn - p * drawn.sum(-1, keepdim=True)


def _felt(d: Tensor, tokens: Tensor, is_routed: bool) -> tuple[int, Tensor | None]:
    """(how many tokens there are gradients of, |d|^2 of each, fp32 like `tokens`, where that is all of them)."""
    rows = d.reshape(-1, d.shape[-1]).float()
    if is_routed or len(rows) != tokens.numel():
        return len(rows), None
    return len(rows), rows.square().sum(1).view(tokens.shape).cpu()


@contextmanager
def _watched(block: nn.Module, prefix: str, layers: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, gradients that come back to layers' outputs are put into `seen`; of several, the first call's."""

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda d: seen.__setitem__(name, d.detach()))

        return hook

    modules = {name: block.get_submodule(name.removeprefix(f"{prefix}.")) for name in layers}
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
