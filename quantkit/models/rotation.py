"""Rotation of a whole model: one matrix for its residual stream, folded into its weights.

With x' = R x for every hidden state between the blocks, R a random-sign Hadamard matrix (`quantkit.kernels.hadamard`):

    embedding        rows e                 R e
    norm             diag(g) x / rms(x)     g = 1; rms(R x) = rms(x)
    reads x          W diag(g)              W diag(g) R^T      q, k, v, gate, up; the head behind the last norm
    writes x         W, b                   R W, R b           o, down

and with H of the size of one head, which attention's weighted sums pass unchanged:

    v                W, b of a KV head      H W, H b
    o                columns of a head      W H^T

The model computes the same function and costs the same to run, but no channel of the stream stands out any more
(QuaRot, arXiv 2404.00456, section 4.1; R1 and R2 of SpinQuant, arXiv 2405.16406; gains are folded first as in SliceGPT,
arXiv 2401.15024, section 3). Unlike there, nothing is rotated at inference: inputs of down_proj keep their outliers,
for which `quantizers.hadamard` is there. A head that was tied to its embedding is so no more, since it alone takes in
the last norm's gain.

Models of Llama's shape alone are rotated: those of the types below, which differ in biases, norms of queries and keys,
and scalar multipliers, all of which the rotation leaves alone.

Rotated tensors are computed in fp64 and rounded once, to the dtype in which they were stored. In bf16 that alone costs
the reference model 1.8e-5 nats of KL divergence, where RTN with 8 bits costs 2.1e-4 and GPTQ with 3 bits 6e-2.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.core.errors import QuantkitError
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.models.structure import ends, find_blocks, key_heads
from quantkit.models.ties import untie

Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Gives tensors of a model by their names."""

GAIN_OFFSETS = {
    "llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "smollm3": 0.0, "granite": 0.0, "hunyuan_v1_dense": 0.0,
    "gemma": 1.0,
}  # fmt: skip
"""Types of models that have Llama's shape -> what their norms add to their weights to get their gains."""
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a block, and the linear layers that read their outputs."""
_CHUNK = 2**20
"""Numbers that are rotated at a time: 8 MiB in fp64."""


@dataclass(frozen=True)
class Rotation:
    """Settings of the rotation of a model's residual stream.

    Attributes:
        seed: of the random signs.
    """

    seed: int = 0


@dataclass(frozen=True)
class Change:
    """What the rotation does to a matrix [out_features, in_features], or to a bias [out_features].

    Attributes:
        norm: weight of the norm whose gain the columns take in; "" for none.
        columns: columns are rotated in runs of so many; 0 for not at all.
        rows: the same of rows.
    """

    norm: str = ""
    columns: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Structure:
    """Which tensors of a model the rotation changes, and how.

    Attributes:
        head: name of the layer behind the blocks.
        offset: what the norms add to their weights.
        seed: of the signs.
        changes: by tensor name; tensors that are no norms of the stream and not here stay as they are.
        norms: names of the weights of the stream's norms.
    """

    head: str
    offset: float
    seed: int
    changes: dict[str, Change] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)

    def gains(self, read: Read) -> dict[str, Tensor]:
        """Gains of all norms, fp64 [hidden_size], by the names of their weights."""
        return {name: weight.detach().double() + self.offset for name, weight in read(self.norms)}

    def rotated(self, name: str, tensor: Tensor, gains: dict[str, Tensor]) -> Tensor:
        """A tensor of the rotated model, of the shape and dtype of the given one."""
        if name in gains:
            return torch.full_like(tensor, 1 - self.offset)
        change = self.changes.get(name)
        if change is None:
            return tensor
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        if change.columns:
            dtype = torch.float64 if change.rows else tensor.dtype
            matrix = _rotate_columns(matrix, change.columns, self.seed, gains.get(change.norm), dtype)
        if change.rows:
            matrix = _rotate_columns(matrix.T, change.rows, self.seed, None, tensor.dtype).T
        return matrix.reshape(tensor.shape).contiguous()


def _rotate_columns(matrix: Tensor, size: int, seed: int, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """matrix diag(gain) (1 kron R)^T with R of `size` features; a part at a time, since an embedding is large."""
    signs = random_signs(size, seed).to(matrix.device)
    rotated = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].double()
        if gain is not None:
            part = part * gain.to(part.device)
        rotated[start : start + step] = rotate(part.unflatten(-1, (-1, size)), signs).flatten(-2)
    return rotated


@torch.no_grad()
def rotate_model(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Rotates the residual stream of a loaded model in place; it computes the same function.

    Args:
        model: of Llama's shape, in full precision.
        seed: of the random signs.

    Returns:
        The same model. Its norms have gains of one, and its head is no longer tied to its embedding.

    Raises:
        QuantkitError: the model has another shape; it is left as it was.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        _refuse(model, "some of its weights are not in memory")
    structure = find_structure(model, Rotation(seed))
    untie(model, {structure.head})
    parameters = dict(model.named_parameters())
    gains = structure.gains(lambda names: ((name, parameters[name]) for name in names))
    for name, parameter in parameters.items():
        parameter.data = structure.rotated(name, parameter.data, gains)
    return model


def find_structure(model: PreTrainedModel, rotation: Rotation) -> Structure:
    """Finds out what to rotate, from the model's type and names; weights may be on the meta device.

    Raises:
        QuantkitError: the model has another shape.
    """
    kind = model.config.model_type
    if kind not in GAIN_OFFSETS:
        _refuse(model, f"its type is {kind!r}, and models of Llama's shape alone can be: {', '.join(GAIN_OFFSETS)}")
    prefix, blocks = find_blocks(model)
    embedding, head = ends(model)
    width, size = model.config.hidden_size, key_heads(model.config)[1]
    last = f"{prefix.rpartition('.')[0]}.norm.weight"
    structure = Structure(str(head), GAIN_OFFSETS[kind], rotation.seed, norms=[last])
    changes = structure.changes
    changes[f"{embedding}.weight"] = Change(columns=width)
    changes[f"{head}.weight"] = Change(norm=last, columns=width)
    for block in (f"{prefix}.{index}" for index in range(len(blocks))):
        for name, readers in _READERS.items():
            norm = f"{block}.{name}.weight"
            structure.norms.append(norm)
            changes |= {f"{block}.{reader}.weight": Change(norm=norm, columns=width) for reader in readers}
        values, out, down = (f"{block}.{name}" for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"))
        changes[f"{values}.weight"] = Change(f"{block}.input_layernorm.weight", columns=width, rows=size)
        changes[f"{values}.bias"] = Change(rows=size)
        changes[f"{out}.weight"] = Change(columns=size, rows=width)
        changes[f"{down}.weight"] = changes[f"{out}.bias"] = changes[f"{down}.bias"] = Change(rows=width)
    expected = {name for name in changes if name.endswith(".weight")} | set(structure.norms)
    found = dict(model.named_parameters(remove_duplicate=False))
    if expected - found.keys():
        _refuse(model, f"{min(expected - found.keys())} is missing, or packed already")
    more = {name for name, tensor in found.items() if tensor.dim() > 1} - expected
    if more:
        _refuse(model, f"{min(more)} is of no known use")
    return structure


def _refuse(model: nn.Module, why: str) -> NoReturn:
    """Raises QuantkitError.

    Args:
        model: what was to be rotated.
        why: it cannot be.
    """
    raise QuantkitError(
        f"{type(model).__name__} cannot be rotated as a whole: {why}; use `hadamard`, "
        "which rotates each layer by itself and takes every model"
    )
