"""Rotation of a whole model: its residual stream is turned once, by matrices that its layers take in.

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
arXiv 2401.15024, section 3). Unlike there, nothing is turned at inference: inputs of down_proj keep their outliers, for
which `quantizers.hadamard` is there. A head that was tied to its embedding is so no more, since it alone takes in the
last norm's gain.

Which tensors a model has is read from names (Llama's), and that they do what the names say is tried out: norms, the
embedding, and a random block of each kind are run, turned and not. What does not pass is refused.

Turned tensors are computed in fp64 and rounded once, to the dtype in which they were stored. In bf16 that alone costs
the reference model 1.8e-5 nats of KL divergence, where RTN with 8 bits costs 2.1e-4 and GPTQ with 3 bits 6e-2.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.core.errors import QuantkitError, first_line
from quantkit.kernels.hadamard import random_signs, rotate
from quantkit.models.forward import patched_forwards, run_block, settings
from quantkit.models.structure import find_blocks, is_linear
from quantkit.models.ties import tied_names, untie

Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Gives tensors of a model by their names."""

_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
}
"""Norms of a block, and the linear layers that may read their outputs."""
_OUT, _DOWN, _VALUES, _FUSED = "self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.qkv_proj"
_TOKENS = 8
_TOLERANCE = 2e-3
"""Relative error of a block's output that is rounding; what is turned wrongly differs by its own size."""
_CHUNK = 2**20
"""Numbers that are turned at a time: 8 MiB in fp64."""


@dataclass(frozen=True)
class Rotation:
    """What is asked for.

    Attributes:
        seed: of the signs.
        heads: turn the values of each attention head too.
    """

    seed: int = 0
    heads: bool = True


@dataclass(frozen=True)
class Turn:
    """What becomes of a tensor [out_features, in_features], or of a bias [out_features].

    Attributes:
        norm: weight of the norm whose gain the columns take in; "" for none.
        columns: columns are rotated in runs of so many; 0 for not at all.
        rows: the same of rows.
        first: the first row that is rotated.
        constant: what every entry becomes instead.
    """

    norm: str = ""
    columns: int = 0
    rows: int = 0
    first: int = 0
    constant: float | None = None


@dataclass(frozen=True)
class Structure:
    """Where a model's residual stream begins, is read, written, and ends.

    Attributes:
        head: name of the layer behind the blocks.
        turns: by tensor name; others stay as they are.
        offsets: weights of norms -> what the norm adds to them to get its gain (Gemma: 1).
        seed: of the signs.
    """

    head: str
    turns: dict[str, Turn] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def gains(self, read: Read) -> dict[str, Tensor]:
        """fp64 gains of all norms, by the names of their weights."""
        return {name: weight.detach().double() + self.offsets[name] for name, weight in read(self.offsets)}

    def turned(self, name: str, tensor: Tensor, gains: dict[str, Tensor]) -> Tensor:
        """A tensor of the turned model, in its own dtype."""
        turn = self.turns.get(name)
        if turn is None:
            return tensor
        if turn.constant is not None:
            return torch.full_like(tensor, turn.constant)
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        if turn.columns:
            dtype = torch.float64 if turn.rows else tensor.dtype
            matrix = _turn_columns(matrix, turn.columns, self.seed, gains.get(turn.norm), dtype)
        if turn.rows:
            rows = _turn_columns(matrix[turn.first :].T, turn.rows, self.seed, None, tensor.dtype).T
            matrix = torch.cat([matrix[: turn.first].to(tensor.dtype), rows])
        return matrix.reshape(tensor.shape).contiguous()


def _turn_columns(matrix: Tensor, size: int, seed: int, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """matrix diag(gain) (1 kron R)^T with R of `size` features; a part at a time, since an embedding is large."""
    signs = random_signs(size, seed).to(matrix.device)
    turned = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].double()
        if gain is not None:
            part = part * gain.to(part.device)
        turned[start : start + step] = rotate(part.unflatten(-1, (-1, size)), signs).flatten(-2)
    return turned


@torch.no_grad()
def rotate_model(model: PreTrainedModel, seed: int = 0, heads: bool = True) -> PreTrainedModel:
    """Turns the residual stream of a loaded model in place; it computes the same function.

    Args:
        model: of Llama's shape, in full precision.
        seed: of the random signs.
        heads: turn the values of each attention head too.

    Returns:
        The same model. Its norms are ones, and its head is no longer tied to its embedding.

    Raises:
        QuantkitError: the model has another shape; it is left as it was.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        _refuse(model, "some of its weights are not in memory")
    structure = find_structure(model, Rotation(seed, heads))
    try_blocks(model, structure)
    untie(model, {structure.head})
    parameters = dict(model.named_parameters())
    gains = structure.gains(lambda names: ((name, parameters[name]) for name in names))
    for name, parameter in parameters.items():
        parameter.data = structure.turned(name, parameter.data, gains)
    return model


def find_structure(model: PreTrainedModel, rotation: Rotation) -> Structure:
    """Finds out what to turn, from names and shapes; weights may be on the meta device.

    Raises:
        QuantkitError: the model has another shape.
    """
    prefix, blocks = find_blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or not is_linear(head):
        _refuse(model, "it has no embedding and no linear head at its two ends")
    width = embedding.weight.shape[1]
    outer = (name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(f"{prefix}."))
    norms = [name for name in dict.fromkeys(outer) if name not in (names[embedding], names[head])]
    if len(norms) != 1:
        found = ", ".join(norms) or "nothing"
        _refuse(model, f"outside its blocks, embedding and head it has {found}, where one norm is expected")
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    if shared - tied_names(model).keys():
        _refuse(model, f"{min(shared - tied_names(model).keys())} is another of its parameters by a second name")
    structure = Structure(names[head], seed=rotation.seed)
    turns = structure.turns
    turns[f"{names[embedding]}.weight"] = Turn(columns=width)
    turns[f"{names[head]}.weight"] = Turn(norm=f"{norms[0]}.weight", columns=width)
    _add_norm(model, norms[0], width, structure)
    for index in range(len(blocks)):
        _add_block(model, f"{prefix}.{index}", width, rotation.heads, structure)
    _try_embedding(model, embedding)
    return structure


def _add_block(model: PreTrainedModel, name: str, width: int, heads: bool, structure: Structure) -> None:
    """Enters the tensors of one block."""
    block, turns = model.get_submodule(name), structure.turns
    modules = dict(block.named_modules())
    known = set()
    for norm, readers in _NORMS.items():
        if norm not in modules:
            _refuse(model, f"{name} has no {norm}")
        _add_norm(model, f"{name}.{norm}", width, structure)
        present = [reader for reader in readers if reader in modules]
        if not present:
            _refuse(model, f"{name} has none of {', '.join(readers)}")
        for reader in present:
            turns[f"{name}.{reader}.weight"] = Turn(norm=f"{name}.{norm}.weight", columns=width)
        known |= {norm, *present}
    for writer in (_OUT, _DOWN):
        if writer not in modules:
            _refuse(model, f"{name} has no {writer}")
        turns[f"{name}.{writer}.weight"] = turns[f"{name}.{writer}.bias"] = Turn(rows=width)
    known |= {_OUT, _DOWN}
    for linear in sorted(known - _NORMS.keys()):
        if not is_linear(modules[linear]) or isinstance(modules[linear], Conv1D):
            _refuse(
                model, f"{name}.{linear} is a {type(modules[linear]).__name__}, not a linear layer in full precision"
            )
    for parameter, tensor in block.named_parameters():
        inside = parameter.startswith("self_attn.") and tensor.dim() == 1  # norms of queries and keys; sinks
        if parameter.rpartition(".")[0] not in known and not inside:
            _refuse(model, f"{name}.{parameter} is of no known use")
    if heads:
        _add_heads(model, name, modules, structure)


def _add_heads(model: PreTrainedModel, name: str, modules: dict[str, nn.Module], structure: Structure) -> None:
    """Enters the turn of each head's values."""
    size = getattr(modules["self_attn"], "head_dim", None)
    values = _FUSED if _FUSED in modules else _VALUES
    rows, columns = _shape(modules[values])[0], _shape(modules[_OUT])[1]
    first = (rows + columns) // 2 if values == _FUSED else 0  # queries, keys, values; as many keys as values
    if not isinstance(size, int) or (rows - first) % size or columns % size:
        _refuse(model, f"{name}.self_attn does not say how its values are divided into heads", heads=True)
    turns = structure.turns
    for kind in ("weight", "bias"):
        known = turns.get(f"{name}.{values}.{kind}", Turn())
        turns[f"{name}.{values}.{kind}"] = Turn(known.norm, known.columns, size, first)
    turns[f"{name}.{_OUT}.weight"] = Turn(columns=size, rows=turns[f"{name}.{_OUT}.weight"].rows)


def _shape(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def _add_norm(model: PreTrainedModel, name: str, width: int, structure: Structure) -> None:
    """Tries out that a norm is (weight + offset) x / rms(x), and enters it.

    The two properties that are needed: its output is affine in its weight, and without a gain it turns as x does.
    """
    norm = model.get_submodule(name)
    what = f"{name} ({type(norm).__name__})"
    if [(key, list(tensor.shape)) for key, tensor in norm.named_parameters()] != [("weight", [width])]:
        found = " and ".join(key for key, _ in norm.named_parameters()) or "no weight"
        _refuse(model, f"{what} has {found}, where one weight of {width} is expected")
    x, gain, signs = _noise(4, width), 1 + _noise(width, seed=1), random_signs(width, structure.seed)

    def run(weight: Tensor, hidden: Tensor) -> Tensor:
        return _with_weight(norm, weight)(hidden)

    none = run(torch.zeros(width), x)
    plain = run(torch.ones(width), x) - none  # that of a gain of 1
    offset = round(float((none * plain).sum() / plain.square().sum()), 3)
    ones = torch.full((width,), 1 - offset)
    if not _close(run(gain, x), (gain + offset) * plain):
        _refuse(model, f"{what} does not multiply its input by a weight alone")
    if not _close(run(ones, rotate(x, signs)), rotate(run(ones, x), signs)):
        _refuse(
            model, f"{what} is no RMSNorm: where its input is turned, its output is not (a LayerNorm takes the mean)"
        )
    structure.offsets[f"{name}.weight"] = offset
    structure.turns[f"{name}.weight"] = Turn(constant=1 - offset)


def _try_embedding(model: PreTrainedModel, embedding: nn.Embedding) -> None:
    """Tries out that an embedding gives its rows, up to a factor."""
    rows = _noise(_TOKENS, embedding.weight.shape[1])
    if not _proportional(_with_weight(embedding, rows)(torch.arange(_TOKENS)), rows):
        _refuse(model, f"its embedding ({type(embedding).__name__}) gives more than its rows")


@torch.no_grad()
def try_blocks(model: PreTrainedModel, structure: Structure) -> None:
    """Runs a block of each kind, with random weights, on an unturned and then a turned stream, and compares.

    Raises:
        QuantkitError: the outputs differ by more than the turn, or the model does more between its blocks.
    """
    prefix, blocks = find_blocks(model)
    calls = _follow(model, blocks, structure)
    seen: list[list] = []
    for index, block in enumerate(blocks):
        kind: list = [(name, list(tensor.shape)) for name, tensor in block.named_parameters()]
        kind += [(type(part), bool(part._forward_hooks or part._forward_pre_hooks)) for part in block.modules()]
        kind += settings(block)
        if kind not in seen:
            seen.append(kind)
            _try_block(model, block, f"{prefix}.{index}", calls[index], structure)


def _try_block(model: PreTrainedModel, block: nn.Module, name: str, call: Any, structure: Structure) -> None:
    """One block's part of `try_blocks`."""
    trial = copy.deepcopy(block, memo={id(tensor): tensor for tensor in block.parameters()}).eval()
    device = _device(block)
    shapes = enumerate((key, tensor.shape) for key, tensor in block.named_parameters())
    state = {key: _random(*shape, seed=seed, device=device) for seed, (key, shape) in shapes}
    trial.load_state_dict(state, strict=False, assign=True)
    parameters = {f"{name}.{key}": tensor for key, tensor in trial.named_parameters()}
    gains = structure.gains(lambda norms: ((key, parameters[key]) for key in norms if key in parameters))
    hidden = _noise(1, _TOKENS, _width(model), seed=1, device=device)
    signs = random_signs(hidden.shape[-1], structure.seed).to(device)
    before = run_block(trial, hidden, call) - hidden
    for key, tensor in parameters.items():
        tensor.data = structure.turned(key, tensor.data, gains)
    hidden = rotate(hidden, signs)
    after = run_block(trial, hidden, call) - hidden
    if not _close(rotate(after, signs, True), before):
        heads = any(structure.turns.get(f"{name}.{values}.weight", Turn()).rows for values in (_VALUES, _FUSED))
        _refuse(model, f"{name} computes something else when its weights are turned", heads)


class _Followed(Exception):
    """Ends a forward pass that has been followed far enough."""


def _follow(model: PreTrainedModel, blocks: nn.ModuleList, structure: Structure) -> list[tuple[tuple, dict[str, Any]]]:
    """Each block's arguments behind the hidden states, from a forward pass in which nothing that has weights runs.

    Also makes sure that the stream goes through blocks, last norm and head as it is, up to factors.
    """
    norm = model.get_submodule(structure.turns[f"{structure.head}.weight"].norm.removesuffix(".weight"))
    start, after = (_noise(1, _TOKENS, _width(model), seed=seed, device=_device(blocks)) for seed in (0, 1))
    calls: list[tuple[tuple, dict[str, Any]]] = []
    reached: list[tuple[Tensor, Tensor]] = []  # what came, and what should have

    def block(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((args[1:], kwargs))
        reached.append((hidden, start))
        return hidden

    def last(hidden: Tensor) -> Tensor:
        reached.append((hidden, start))
        return after

    def head(hidden: Tensor) -> NoReturn:
        reached.append((hidden, after))
        raise _Followed

    stubs = nn.ModuleList([*blocks, norm, model.get_submodule(structure.head)])
    training = model.training
    model.eval()
    try:
        with patched_forwards(stubs, [*[block] * len(blocks), last, head]):
            model(inputs_embeds=start, use_cache=False)
    except _Followed:
        pass
    except Exception as error:  # models raise many kinds where they do not take hidden states
        _refuse(model, f"it does not run on hidden states ({first_line(error)})")
    finally:
        model.train(training)
    if len(reached) != len(blocks) + 2 or not all(_proportional(came, wanted) for came, wanted in reached):
        _refuse(model, "it changes the hidden states between its blocks, or behind them")
    return calls


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a module that has one weight, with another one."""
    return copy.deepcopy(module, memo={id(module.weight): nn.Parameter(weight, requires_grad=False)}).cpu().eval()


def _random(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Numbers of the size that weights (matrices), gains and biases have."""
    noise = _noise(*shape, seed=seed, device=device)
    return noise * shape[1] ** -0.5 if len(shape) == 2 else 1 + 0.3 * noise


def _noise(*shape: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device or "cpu")


def _device(module: nn.Module) -> torch.device:
    """Where a module is run; on the CPU where its weights are nowhere."""
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _width(model: PreTrainedModel) -> int:
    """Features of the residual stream."""
    return model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr, return-value, index]


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equality but for rounding; false where something is not finite."""
    return bool((found - wanted).norm() <= _TOLERANCE * wanted.norm())


def _proportional(found: Tensor, wanted: Tensor) -> bool:
    """Whether one is the other times a number."""
    if found.shape != wanted.shape:
        return False
    factor = (found * wanted).sum() / wanted.square().sum()
    return bool(factor != 0) and _close(found, factor * wanted)


def _refuse(model: nn.Module, why: str, heads: bool = False) -> NoReturn:
    """Raises QuantkitError.

    Args:
        model: what was to be turned.
        why: it cannot be.
        heads: whether leaving out the heads' part may help.
    """
    hint = "try it without the heads' part, Rotation(heads=False), or use" if heads else "use"
    raise QuantkitError(
        f"{type(model).__name__} cannot be rotated as a whole: {why}; {hint} `hadamard`, "
        "which rotates each layer by itself and takes every model"
    )
