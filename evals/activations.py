"""Quantized activations: what a model loses when its linear layers read their inputs at a few bits.

    python -m quantkit.evals.activations MODEL --data stdlib --bits 2 3 4 6 8

The inputs of every linear layer inside the decoder blocks, dense or packed, are replaced by what a code of so many bits
an activation keeps of them ("bits per activation" of arXiv 2410.16926; nothing runs faster). Each token's vector is
coded by itself:

    pyramid    groups of D features as a point of P(D, K) and a gain (`quantkit.quantizers.pyramid`), a scale a token
    int        codes about zero, a scale a token from its largest value, or fitted by least squares
    rotated    either one between a random-sign Hadamard rotation of the features and its inverse

The pyramid's gains are made for vectors that are alike in all directions: without a rotation they do not reach groups
that hold outliers, and more bits stop helping.

Bits per activation count indices, gains and the fp16 scale of each token, once for layers that read the same tensor;
signs of a rotation follow from a seed.
"""

import argparse
import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.core.device import compute_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.evals.perplexity import evaluate
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.models.linear import QuantizedLinear
from quantkit.models.structure import ROUTERS, context_length, is_linear
from quantkit.quantizers.grid import fit_grid
from quantkit.quantizers.pyramid import Pyramid, fit_gains, gain_levels, shape
from quantkit.run.documents import documents
from quantkit.run.recipe import sequence_length
from quantkit.run.text import evaluation_text

SCALE_BITS = 16
_AT_ONCE = 1 << 20  # activations whose temporaries stay small
logger = logging.getLogger(__name__)


class ActivationCode(Protocol):
    """What the layers' inputs are coded by."""

    def bits_per_activation(self, features: int) -> float:
        """All that is stored of a token with so many features, over their number."""

    def apply(self, x: Tensor) -> Tensor:
        """What the code keeps of fp32 x [tokens, features], of that shape."""


@dataclass(frozen=True)
class PyramidActivations:
    """Pyramid code, groups along the features.

    Attributes:
        bits: an activation for points and gains, at most; any fraction.
        dimension: D, features a group.
    """

    bits: float
    dimension: int = 32

    def __post_init__(self) -> None:
        Pyramid(self.bits, self.dimension)  # raises ValueError where there is no such code

    def bits_per_activation(self, features: int) -> float:
        """Bits of whole groups' fields, and of a scale."""
        groups = -(-features // self.dimension)
        return (groups * Pyramid(self.bits, self.dimension).code.field_bits + SCALE_BITS) / features

    def apply(self, x: Tensor) -> Tensor:
        """fp32 [tokens, features] both ways: searches the points, fits each token's scale and gains."""
        code, features = Pyramid(self.bits, self.dimension).code, x.shape[1]
        padded = nn.functional.pad(x, (0, -features % self.dimension))
        levels = gain_levels(code, padded.shape[1]).to(x)
        _, amplitudes, directions = shape(padded.unflatten(1, (-1, self.dimension)), code.pulses)
        scales, gains = fit_gains(amplitudes, levels)
        return ((scales * levels[gains]).unsqueeze(-1) * directions).flatten(1)[:, :features]


@dataclass(frozen=True)
class IntActivations:
    """Integers, one scale a token.

    Attributes:
        bits: 2 to 8.
        fitted: the grid of `quantkit.quantizers.grid`, scaled for the least squared error. Otherwise the usual one: 0
            and as many codes on each side, the last at the token's largest value.
    """

    bits: int
    fitted: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits}: integers take 2 to 8 whole bits")

    def bits_per_activation(self, features: int) -> float:
        """Bits of codes and a scale."""
        return self.bits + SCALE_BITS / features

    def apply(self, x: Tensor) -> Tensor:
        """fp32 [tokens, features] both ways: rounds to the nearest code."""
        if self.fitted:
            grid = fit_grid(x, self.bits, symmetric=True, search=True)
            return grid.decode(grid.encode(x))
        largest = 2 ** (self.bits - 1) - 1
        scale = x.abs().amax(1, keepdim=True) / largest
        scale = scale.clamp(2.0**-24, torch.finfo(torch.float16).max).half().float()
        return (x / scale).round_().clamp_(-largest, largest) * scale


@dataclass(frozen=True)
class RotatedActivations:
    """Another code in a rotated basis, where no feature stands out.

    Attributes:
        inner: the code.
        seed: of the signs.
    """

    inner: ActivationCode
    seed: int = 0

    def bits_per_activation(self, features: int) -> float:
        """Bits of the inner code."""
        return self.inner.bits_per_activation(features)

    def apply(self, x: Tensor) -> Tensor:
        """fp32 [tokens, features] both ways: rotates, codes, rotates back."""
        signs = random_signs(x.shape[1], self.seed).to(x.device)
        return rotate(self.inner.apply(rotate(x, signs)), signs, True)


def activation_code(method: str, bits: float, dimension: int = 32, hadamard: bool = False) -> ActivationCode:
    """A code by the name of its method: "pyramid", "int" or "int-fitted".

    Raises:
        QuantkitError: no such method, or bits or a dimension that it does not take.
    """
    try:
        code: ActivationCode
        if method == "pyramid":
            code = PyramidActivations(bits, dimension)
        elif method in ("int", "int-fitted"):
            if bits != int(bits):
                raise ValueError(f"bits={bits:g}: integers take 2 to 8 whole bits")
            code = IntActivations(int(bits), method == "int-fitted")
        else:
            raise ValueError(f"unknown activation method {method!r}; use pyramid, int or int-fitted")
    except ValueError as error:
        raise QuantkitError(f"activations: {error}") from error
    return RotatedActivations(code) if hadamard else code


@dataclass
class Observed:
    """What the inputs lost, gathered while a model runs.

    Attributes:
        layers: linear layers whose inputs are coded.
        reached: names of those that were called.
        errors, energies: sums of |x - code(x)|^2 and |x|^2 of each tensor, by the first layer that read it.
    """

    layers: int = 0
    reached: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    stored_bits: float = 0.0
    activations: int = 0

    @property
    def bits_per_activation(self) -> float:
        """Measured, over all tensors."""
        return self.stored_bits / max(self.activations, 1)

    @property
    def relative_error(self) -> float:
        """Squared error over squared norm, the mean over the tensors that layers read."""
        shares = [self.errors[name] / max(self.energies[name], 1e-30) for name in self.errors]
        return sum(shares) / max(len(shares), 1)

    def add(self, name: str, x: Tensor, coded: Tensor, bits_per_activation: float) -> None:
        """Counts one tensor [tokens, features]."""
        self.errors[name] = self.errors.get(name, 0.0) + float((x - coded).square().sum(dtype=torch.float64))
        self.energies[name] = self.energies.get(name, 0.0) + float(x.square().sum(dtype=torch.float64))
        self.stored_bits += bits_per_activation * x.numel()
        self.activations += x.numel()


def decoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers, dense or packed, inside the decoder blocks but routers, by full name.

    `quantkit.models.structure.block_linears` finds dense ones. Here the blocks are the module list whose linear layers
    hold most weights, packed or not.

    Raises:
        QuantkitError: the model has no such list.
    """
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights[name] = sum(_weights(child) for child in module.modules() if _reads_input(child))
    prefix = max(weights, key=lambda name: weights[name], default="")
    if not weights.get(prefix):
        raise QuantkitError(f"{type(model).__name__} has no list of decoder blocks with linear layers")
    blocks = model.get_submodule(prefix)
    if any(parameter.dim() == 3 for parameter in blocks.parameters()):
        logger.warning("experts that share a tensor are no linear layers: their inputs stay as they are")
    return {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if _reads_input(module) and name.rsplit(".", 1)[-1] not in ROUTERS
    }


def _reads_input(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or is_linear(module)


def _weights(layer: nn.Module) -> int:
    if isinstance(layer, QuantizedLinear):
        return layer.in_features * layer.out_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


@contextmanager
def quantized_activations(model: nn.Module, code: ActivationCode) -> Iterator[Observed]:
    """Inside, the model's linear layers read coded inputs; afterwards the model is what it was.

    Layers that read the same tensor one after the other (q, k, v; gate, up) share its coded form, so that fused ones
    stay fused. NaN and infinities are passed on as they are, for the evaluation to find.
    """
    layers = decoder_linears(model)
    observed = Observed(layers=len(layers))
    last: list[tuple[Tensor, int, Tensor]] = []

    def hook(name: str) -> Any:
        """A hook that puts a layer's coded input in place; layers that share an input share its code."""

        def replace(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0]
            observed.reached.add(name)
            version = 0 if x.is_inference() else x._version
            if not (last and last[0][0] is x and last[0][1] == version):
                last[:] = [(x, version, _coded(name, x, code, observed))]
            return (last[0][2], *arguments[1:])

        return replace

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield observed
    finally:
        last.clear()
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _coded(name: str, x: Tensor, code: ActivationCode, observed: Observed) -> Tensor:
    """What the code keeps of x [..., features], in x's dtype."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if not len(rows) or not bool(torch.isfinite(rows).all()):
        return x
    at_once = max(1, _AT_ONCE // rows.shape[1])
    coded = torch.cat([code.apply(part) for part in rows.split(at_once)])
    observed.add(name, rows, coded, code.bits_per_activation(rows.shape[1]))
    return coded.to(x.dtype).view(x.shape)


METHODS = (("int", False), ("int", True), ("int-fitted", True), ("pyramid", False), ("pyramid", True))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluates every method at every width; prints a markdown line for each as it is done."""
    device = pick_device(arguments.device)
    folder = resolve_folder(arguments.model)
    baseline = load(folder, dtype=compute_dtype(device) or "auto", device=device).eval()
    model = copy.deepcopy(baseline)
    text = evaluation_text(documents(arguments.data, "evaluation"), load_tokenizer(folder))
    length = sequence_length(arguments.seqlen, context_length(baseline))
    print("| method | bits/activation | relative squared error | perplexity | KL x 1000 |")
    print("|---|---|---|---|---|")
    results = []
    for bits in arguments.bits:
        for method, hadamard in METHODS:
            code = activation_code(method, bits, arguments.dimension, hadamard)
            with quantized_activations(model, code) as observed:
                quality = evaluate(model, text, length, baseline=baseline, num_samples=arguments.max_windows)
            figures = {
                "bits_per_activation": observed.bits_per_activation,
                "relative_error": observed.relative_error,
                "layers": len(observed.reached),
            }
            settings = {"method": method, "hadamard": hadamard, "bits": bits}
            if method == "pyramid":
                settings |= asdict(Pyramid(bits, arguments.dimension).code)
            results.append(settings | figures | asdict(quality))
            cells = [f"{method}{' + Hadamard' if hadamard else ''}", f"{observed.bits_per_activation:.3f}"]
            cells += [f"{observed.relative_error:.5f}", f"{quality.perplexity:.3f}"]
            cells.append(f"{1000 * (quality.kl or 0):.2f} ± {1000 * (quality.kl_se or 0):.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nwithout: perplexity {results[0]['baseline_perplexity']:.3f}")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--dimension", type=int, default=32, help="features a group of the pyramid code")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there")
    chosen = parser.parse_args(arguments)
    results = measure(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
