"""Keys or values of one layer: compressed tokens, and the newest ones as they are.

    sink | compressed chunks ... | buffer          tokens, oldest first

The codes of a chunk never change once they are made. Tensors grow by a part of their size at a time, so that a
step copies next to nothing, and what is reserved beyond their contents is counted like all other bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.kvcache import codec
from quantkit.kvcache.config import KVCacheConfig, index_bits

GROWTH = 32
"""Tensors grow by a fraction of 1 / GROWTH beyond what is appended."""
DECODED = 1024
"""Tokens that are decoded at once."""


class Growing:
    """A tensor [batch, heads, tokens, ...] that tokens are appended to.

    Args:
        least: tokens that it grows by at least.

    Attributes:
        length: tokens in it.
    """

    def __init__(self, least: int = 0) -> None:
        self.least, self.length = least, 0
        self._room: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """A view of the contents [batch, heads, length, ...]."""
        assert self._room is not None
        return self._room[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Allocated bytes, spare capacity included."""
        return 0 if self._room is None else self._room.untyped_storage().nbytes()

    def append(self, more: Tensor) -> None:
        """Adds tokens [batch, heads, new, ...] at the end."""
        needed = self.length + more.shape[2]
        if self._room is None:
            own = more.untyped_storage().nbytes() == more.nbytes
            self._room = more.contiguous() if own else more.clone(memory_format=torch.contiguous_format)
        else:
            if needed > self._room.shape[2]:
                shape = list(self._room.shape)
                shape[2] = needed + max(needed // GROWTH, self.least)
                room = self._room.new_empty(shape)
                room[:, :, : self.length] = self.data
                self._room = room
            if self._room.is_inference() and not torch.is_inference_mode_enabled():
                self._room = self._room.clone()  # which may be written to
            self._room[:, :, self.length : needed] = more
        self.length = needed

    def drop(self, count: int) -> None:
        """Removes the first `count` tokens."""
        self.map(lambda data: data[:, :, count:].clone())

    def crop(self, count: int) -> None:
        """Removes the last `count` tokens."""
        self.length -= count

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces the contents, without what is reserved beyond them.

        Args:
            change: [batch, heads, length, ...] -> another tensor of that kind, whose batch and length may differ.
        """
        if self._room is not None:
            self._room = change(self.data)
            self.length = self._room.shape[2]


@dataclass
class Side:
    """Keys or values of a layer.

    Args:
        config: of the cache.
        name: "k" or "v".
    """

    config: KVCacheConfig
    name: str
    buffer: Growing = field(default_factory=lambda: Growing(least=8))
    sink: Growing = field(default_factory=Growing)
    grown: dict[str, Growing] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)

    @property
    def bits(self) -> int:
        """Bits of a code; 16 where nothing is compressed."""
        return self.config.k_bits if self.name == "k" else self.config.v_bits

    @property
    def apart(self) -> bool:
        """Whether each chunk has scales, a basis or outliers of its own."""
        config = self.config
        return config.backbone == "kcvt" or config.decode_rank is not None or config.channel_outliers

    @property
    def packed(self) -> int:
        """Tokens that are compressed."""
        return sum(self.chunks)

    @property
    def length(self) -> int:
        """All tokens, compressed and not."""
        return self.sink.length + self.packed + self.buffer.length

    def append(self, x: Tensor) -> None:
        """Takes new tokens, [batch, heads, tokens, channels], as they are."""
        missing = 0 if self.bits == 16 else self.config.sink - self.sink.length
        if missing > 0:
            self.sink.append(x[:, :, :missing].clone())
            x = x[:, :, missing:]
        if x.shape[2]:
            self.buffer.append(x)

    @property
    def croppable(self) -> int:
        """Newest tokens that are not packed."""
        return self.buffer.length + (0 if self.chunks else self.sink.length)

    def crop(self, count: int) -> None:
        """Removes the newest `count`, at most `croppable`."""
        self.sink.crop(max(count - self.buffer.length, 0))
        self.buffer.crop(min(count, self.buffer.length))

    def compress(self, keep: int, weights: Tensor | None = None) -> None:
        """Compresses the buffer's oldest tokens in whole buffers' lengths, and keeps at least `keep` of the newest.

        Args:
            keep: tokens.
            weights: fp32 [batch, heads, channels] by which errors of keys count, or None.
        """
        size = self.config.buffer
        count = max(self.buffer.length - keep, 0) // size * size
        if self.bits == 16 or not count:
            return
        x = self.buffer.data[:, :, :count].float()
        self.buffer.drop(count)
        for chunk in x.split(size, 2) if self.chunks and self.apart else (x,):
            self._chunk(chunk, weights)

    def _chunk(self, x: Tensor, weights: Tensor | None) -> None:
        config, first = self.config, not self.chunks
        dim = 2 if self.name == "k" and config.channel_outliers else 3
        count = config.outlier_count(x.shape[dim]) if self.name in config.targets else 0
        index = codec.extremes(x, count, dim) if count else None
        plain = x if index is None else codec.without(x, index, dim)
        grid = self._grid(plain)
        self._grow("codes", grid.codes)
        self._grow("scale", grid.scale)
        self._grow("low", grid.low)
        self.chunks.append(x.shape[2])
        found = codec.values(grid, self.bits, by_token=self.name == "v")
        if config.rank and self.name in config.targets:
            error = plain - found if index is None else (x - found).scatter(dim, index, 0.0)
            found = found + self._correct(error, weights if self.name == "k" else None, first)
        if index is not None:
            kind = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[index_bits(x.shape[dim])]
            kept = (x - found).gather(dim, index).half()
            if dim == 3:
                self._grow("index", index.to(kind))
                self._grow("kept", kept)
            else:
                chunk = len(self.chunks) - 1
                self.fixed[f"index{chunk}"], self.fixed[f"kept{chunk}"] = index.to(kind), kept

    def _grid(self, x: Tensor) -> codec.Grid:
        coarse = self.config.backbone == "kcvt"
        if self.name == "k":
            return codec.groups_of_tokens(x, self.bits, x.shape[2] if coarse else self.config.group_size)
        return codec.groups_of_channels(x, self.bits, None if coarse else self.config.channels(x.shape[-1]))

    def _correct(self, error: Tensor, weights: Tensor | None, first: bool) -> Tensor:
        """Stores the error's low-rank approximation, and returns it."""
        shared = self.config.decode_rank is None
        if first or not shared:
            rank = self.config.rank if first else self.config.decode_rank or 0
            if not rank:
                return torch.zeros_like(error)
            down = codec.basis(error, rank, weights, self.config.iterations).half().contiguous()
            if first:
                self.fixed["down"] = down
            else:
                self._grow("downs", down[:, :, None])  # [batch, heads, chunks, channels, rank]
        down = self.fixed["down"] if first or shared else down
        up = codec.coordinates(error, down.float(), weights)
        name = "up" if first or shared else "ups"
        if self.config.factor_bits == 8:
            grid = codec.groups_of_tokens(up, 8, self.config.buffer, packed=False)
            for part in ("codes", "scale", "low"):
                self._grow(f"{name} {part}", getattr(grid, part))
            up = codec.values(grid, None, by_token=False)
        else:
            up = up.half()
            self._grow(name, up)
        return up.float() @ down.float().mT

    def _grow(self, name: str, more: Tensor) -> None:
        self.grown.setdefault(name, Growing()).append(more)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All tokens decoded, [batch, heads, tokens, channels] of a dtype."""
        parts = [self.sink.data.to(dtype)] if self.sink.length else []
        parts += [part.to(dtype) for part in self._decoded()]
        if self.buffer.length:
            parts.append(self.buffer.data.to(dtype))
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 2)  # as `LazyKV` says

    def _decoded(self) -> Iterator[Tensor]:
        """The compressed tokens, fp32: some at a time where all that is stored goes by tokens, so that little is
        there in fp32 at once."""
        data = {name: one.data for name, one in self.grown.items()}
        if self.apart:
            if self.chunks:
                yield self._decode(data)
            return
        step = -(-DECODED // self.config.buffer) * self.config.buffer
        for first in range(0, self.packed, step):
            last = min(first + step, self.packed)
            yield self._decode(
                {
                    name: one[:, :, first * one.shape[2] // self.packed : last * one.shape[2] // self.packed]
                    for name, one in data.items()
                }
            )

    def _decode(self, data: dict[str, Tensor]) -> Tensor:
        grid = codec.Grid(data["codes"], data["scale"], data["low"])
        if self.config.backbone == "kcvt" and self.name == "k":
            lengths = torch.tensor(self.chunks, device=grid.scale.device)
            scale, low = (step.float().repeat_interleave(lengths, 2) for step in (grid.scale, grid.low))
            found = codec.unpack(grid.codes, self.bits) * scale + low
        else:
            found = codec.values(grid, self.bits, by_token=self.name == "v")
        if (up := _factor(data, "up")) is not None:
            first = up.shape[2]
            found[:, :, :first] += up @ self.fixed["down"].float().mT
            if (ups := _factor(data, "ups")) is not None:
                later = ups.unflatten(2, (-1, self.config.buffer)) @ data["downs"].float().mT
                found[:, :, first:] += later.flatten(2, 3)
        if "index" in data:
            found = found.scatter_add(3, data["index"].long(), data["kept"].float())
        start = 0
        for chunk, size in enumerate(self.chunks):
            if f"index{chunk}" in self.fixed:
                part, index = found[:, :, start : start + size], self.fixed[f"index{chunk}"].long()
                part.scatter_add_(2, index, self.fixed[f"kept{chunk}"].float())
            start += size
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes all tensors [batch, heads, ...] alike: another device, other rows of the batch."""
        for one in (self.sink, self.buffer, *self.grown.values()):
            one.map(change)
        self.fixed = {name: change(tensor) for name, tensor in self.fixed.items()}

    @property
    def nbytes(self) -> int:
        """Allocated bytes, spare capacity included."""
        growing = sum(one.nbytes for one in (self.sink, self.buffer, *self.grown.values()))
        return growing + sum(tensor.untyped_storage().nbytes() for tensor in self.fixed.values())


def _factor(data: dict[str, Tensor], name: str) -> Tensor | None:
    """A of the corrections, fp32 [batch, heads, tokens, rank]."""
    if name in data:
        return data[name].float()
    if f"{name} codes" not in data:
        return None
    parts = (data[f"{name} {part}"] for part in ("codes", "scale", "low"))
    return codec.values(codec.Grid(*parts), None, by_token=False)
