"""GearCache: transformers' cache interface over compressed keys and values.

    cache = GearCache(model, KVCacheConfig.gear(2))
    model.generate(**inputs, past_key_values=cache)

Layers with full attention compress; others (sliding windows, linear attention) keep transformers' own. What a layer
hands to attention is a `LazyKV`, which looks like a tensor and is decoded by the first operation that reads its
numbers; the attention function of `kvcache.attention` knows it for what it is.
"""

import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.files import write_durably
from quantkit.kvcache.config import KVCacheConfig
from quantkit.kvcache.storage import Growing, Side
from quantkit.models.structure import key_heads


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which the model's `generate` and `forward` take a cache; transformers had another before 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class LazyKV(Tensor):
    """All keys or values of a layer, [batch, kv_heads, tokens, channels], decoded when an operation reads them.

    Attributes:
        layer: the layer that holds them.
        side: its keys or its values.
    """

    layer: "GearLayer"
    side: Side

    @staticmethod
    def __new__(cls, layer: "GearLayer", side: Side) -> "LazyKV":
        """A tensor without storage of its own."""
        batch, heads, channels = layer.shapes[side.name]
        shape = (batch, heads, side.length, channels)
        made: LazyKV = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)  # type: ignore[attr-defined]
        made.layer, made.side = layer, side
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs the operation on decoded tensors."""
        plain = lambda value: value.dense() if isinstance(value, LazyKV) else value  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def dense(self) -> Tensor:
        """The decoded tensor, [batch, kv_heads, tokens, channels] in the layer's dtype."""
        return self.side.dense(self.layer.dtype)


def check_head(size: int, config: KVCacheConfig) -> None:
    """Raises QuantkitError where heads of a size cannot be compressed."""
    if size % 16 and min(config.k_bits, config.v_bits) < 16:
        raise QuantkitError(f"heads of {size} channels cannot be compressed: no multiple of 16")


class GearLayer(CacheLayerMixin):
    """Keys and values of one layer, compressed in whole buffers.

    Args:
        config: of the cache.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: KVCacheConfig) -> None:
        super().__init__()
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Empties the layer."""
        self.k, self.v = Side(self.config, "k"), Side(self.config, "v")
        self.weights: Tensor | None = None
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys and values, [batch, kv_heads, tokens, channels].

        Raises:
            QuantkitError: heads of their size cannot be compressed.
        """
        for states in (key_states, value_states):
            check_head(states.shape[-1], self.config)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens and returns all of them.

        Args:
            key_states, value_states: [batch, kv_heads, new tokens, channels].

        Returns:
            Keys and values of all tokens, `LazyKV` [batch, kv_heads, tokens, channels].

        Raises:
            QuantkitError: the cache holds another dtype, or heads that cannot be compressed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.dtype != self.dtype:
            raise QuantkitError(f"the cache holds {self.dtype}, the new keys are {key_states.dtype}")
        self.compress(0)  # before new tokens come: `crop` takes back no more than these
        self.k.append(key_states.detach())
        self.v.append(value_states.detach())
        self.shapes = {
            name: (states.shape[0], states.shape[1], states.shape[3])
            for name, states in (("k", key_states), ("v", value_states))
        }
        return LazyKV(self, self.k), LazyKV(self, self.v)

    def compress(self, keep: int) -> None:
        """Compresses what has gathered, but for the newest `keep` tokens."""
        self.k.compress(keep, None if self.weights is None else self.weights.float())
        self.v.compress(keep)

    def observe(self, queries: Tensor) -> None:
        """Takes the root mean square of the prompt's queries, by rotary pair, as the weights of its keys' errors.

        Rotary embeddings mix channels i and i + D/2, so the pair has one weight; so rescaling keys against queries
        changes nothing.

        Args:
            queries: [batch, heads, tokens, channels].
        """
        if self.weights is None and self.config.weighted and self.config.rank:
            heads = self.shapes["k"][1]
            squares = queries.float().square().mean(2).unflatten(1, (heads, -1)).mean(2)  # [batch, kv_heads, channels]
            pairs = squares.unflatten(-1, (2, -1)).mean(-2) if squares.shape[-1] % 2 == 0 else squares
            weights = pairs.repeat(1, 1, squares.shape[-1] // pairs.shape[-1]).sqrt()
            weights = weights / weights.mean(-1, keepdim=True).clamp_min(1e-30) + 1e-3
            self.weights = weights.half()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the layer."""
        return self.k.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens, at most those of the buffer.

        Args:
            tokens_to_remove: their number, negative as in transformers.

        Raises:
            QuantkitError: some of them are compressed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        count = -tokens_to_remove
        if not self.is_initialized or not count:
            return
        if count == self.get_seq_length():
            self.reset()
            return
        held = min(self.k.croppable, self.v.croppable)
        if count > held:
            raise QuantkitError(
                f"crop({tokens_to_remove}): only the newest {held} tokens can go, older ones are packed"
            )
        self.k.crop(count)
        self.v.crop(count)

    def _map(self, change: Any) -> None:
        self.k.map(change)
        self.v.map(change)
        if self.weights is not None:
            self.weights = change(self.weights)
        for side in (self.k, self.v):
            part = next((one.data for one in (side.buffer, side.sink, *side.grown.values()) if one.length), None)
            if part is not None:
                self.shapes[side.name] = (part.shape[0], *self.shapes[side.name][1:])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes rows int64 [batch] of the batch, as they are stored."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows int64 [kept] of the batch."""
        if self.is_initialized:
            self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Moves everything to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))


class GearCache(DynamicCache):
    """A compressed cache for one model; see the module.

    Args:
        model: the model, or its config.
        config: what is stored; None for `KVCacheConfig.gear()`.

    Raises:
        QuantkitError: the model has an encoder, or no layer with full attention.
    """

    def __init__(self, model: PreTrainedModel | Any, config: KVCacheConfig | None = None) -> None:
        config = config or KVCacheConfig.gear()
        found: Any = model.config if isinstance(model, torch.nn.Module) else model
        if getattr(found, "is_encoder_decoder", False):
            raise QuantkitError(
                "models with an encoder read their cache in ways that a compressed one does not support"
            )
        if not isinstance(config, KVCacheConfig):
            raise QuantkitError(f"config={config!r}: give a KVCacheConfig")
        super().__init__(config=found)
        self.config, self.model_type, self.model_shape = config, found.model_type, _shape(found)
        if not self.layers:  # transformers makes them one by one where a config says nothing of layers
            self.layers = [DynamicLayer() for _ in range(found.get_text_config(decoder=True).num_hidden_layers)]
        self.layers = [GearLayer(config) if type(layer) is DynamicLayer else layer for layer in self.layers]
        if not any(isinstance(layer, GearLayer) for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise QuantkitError(f"no layer of this model has full attention ({', '.join(kinds)}): nothing to compress")
        try:
            size = key_heads(found)[1]
        except (AttributeError, RuntimeError):  # a config that tells sizes by layer; the first keys will
            return
        if not hasattr(found.get_text_config(decoder=True), "kv_lora_rank"):  # latents have sizes of their own
            check_head(size, config)

    def packed_layers(self) -> Iterator[tuple[int, GearLayer]]:
        """(index, layer) of those that compress."""
        yield from ((index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, GearLayer))

    def compress(self) -> None:
        """Compresses what has gathered in whole buffers, at once instead of with the next tokens."""
        for _, layer in self.packed_layers():
            layer.compress(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all that compressing layers hold, spare capacity included."""
        layers = [layer for _, layer in self.packed_layers()]
        weights = sum(layer.weights.nbytes for layer in layers if layer.weights is not None)
        return weights + sum(layer.k.nbytes + layer.v.nbytes for layer in layers)

    @property
    def bits_per_element(self) -> float:
        """Bits that a cached number takes, every allocated byte counted."""
        elements = 0
        for _, layer in self.packed_layers():
            for side in (layer.k, layer.v):
                batch, heads, channels = layer.shapes.get(side.name, (0, 0, 0))
                elements += batch * heads * channels * side.length
        return 8 * self.nbytes / max(elements, 1)

    def save(self, path: Path | str) -> None:
        """Writes the cache as a prompt cache, safetensors.

        Raises:
            QuantkitError: other layers hold tokens too, which are not saved; or the disk is full.
        """
        if any(not isinstance(layer, GearLayer) for layer in self.layers):
            raise QuantkitError("only caches whose layers all compress can be saved")
        if not all(layer.is_initialized for _, layer in self.packed_layers()):
            raise QuantkitError("the cache is empty: nothing to save")
        tensors: dict[str, Tensor] = {}
        sides = []
        for index, layer in self.packed_layers():
            for side in (layer.k, layer.v):
                parts = {"buffer": side.buffer, "sink": side.sink} | {f"grown.{n}": g for n, g in side.grown.items()}
                held = {name: one.data.contiguous() for name, one in parts.items() if one.length}
                held |= {f"fixed.{name}": tensor for name, tensor in side.fixed.items()}
                tensors |= {f"{index}.{side.name}.{name}": tensor.cpu().clone() for name, tensor in held.items()}
                sides.append(
                    {"layer": index, "side": side.name, "chunks": side.chunks, "shape": layer.shapes[side.name]}
                )
            if layer.weights is not None:
                tensors[f"{index}.weights"] = layer.weights.cpu()
        about = {"model": self.model_shape, "layers": len(self.layers), "sides": sides}
        metadata = {"format": "pt", "config": self.config.to_json(), "cache": json.dumps(about)}
        write_durably(
            Path(path), lambda target: save_file(tensors, target, metadata), sum(t.nbytes for t in tensors.values())
        )

    @staticmethod
    def load(path: Path | str, model: PreTrainedModel) -> "GearCache":
        """Reads a prompt cache.

        Raises:
            CheckpointError: the file is damaged.
            QuantkitError: it belongs to another model.
        """
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads(metadata["cache"])
            cache = GearCache(model, KVCacheConfig.from_json(metadata["config"]))
            if about["model"] != cache.model_shape or about["layers"] != len(cache.layers):
                raise QuantkitError(
                    f"{path} is a cache of another model: {about['model']}, {about['layers']} layers; "
                    f"this one is {cache.model_shape}, {len(cache.layers)} layers"
                )
            cache._restore(about["sides"], tensors, model)
        except QuantkitError:
            raise
        except Exception as error:  # safetensors' own derives from Exception alone; and whatever damage leads to
            raise CheckpointError(f"{path} is no prompt cache ({error})") from error
        return cache

    def _restore(self, sides: list[dict[str, Any]], tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
        """Fills an empty cache with what `save` wrote.

        Raises:
            CheckpointError: something is missing.
        """
        for entry in sides:
            layer: Any = self.layers[entry["layer"]]
            side: Side = getattr(layer, entry["side"])
            side.chunks = entry["chunks"]
            start = f"{entry['layer']}.{side.name}."
            for name, tensor in tensors.items():
                kind, _, rest = name.removeprefix(start).partition(".") if name.startswith(start) else ("", "", "")
                if kind == "fixed":
                    side.fixed[rest] = tensor
                elif kind == "grown":
                    side.grown.setdefault(rest, Growing()).append(tensor)
                elif kind:
                    getattr(side, kind).append(tensor.to(model.dtype))
            layer.shapes[side.name] = tuple(entry["shape"])
            layer.dtype, layer.device, layer.is_initialized = model.dtype, model.device, True
            layer.weights = tensors.get(f"{entry['layer']}.weights")
        lengths = set()
        for index, layer in self.packed_layers():
            for side in (layer.k, layer.v):
                batch, heads, channels = layer.shapes[side.name]
                if side.dense(model.dtype).shape != (batch, heads, side.length, channels):
                    raise CheckpointError(f"layer {index} of the prompt cache is damaged")
                lengths.add((batch, side.length))
        if len(lengths) != 1:
            raise CheckpointError("layers of the prompt cache differ in their tokens")


def _shape(config: Any) -> dict[str, Any]:
    """What tells a model's keys from another's."""
    text = config.get_text_config(decoder=True)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "multi_query")
    found = {name: text.to_dict().get(name) for name in names}
    return {"model_type": config.model_type} | {name: value for name, value in found.items() if value is not None}
