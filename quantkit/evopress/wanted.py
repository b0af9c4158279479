"""What a user asks of a search, and the budget that follows."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.core import spec
from quantkit.core.constants import HEAD_BITS
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.core.units import parse_size, size
from quantkit.evopress.budget import Budget, read_timings
from quantkit.evopress.memory import beside_weights
from quantkit.evopress.settings import CANDIDATES
from quantkit.io.classes import config_of
from quantkit.io.source import open_folder
from quantkit.kvcache.config import KVCacheConfig
from quantkit.models.structure import block_linears, ends
from quantkit.run.recipe import fraction_of, with_bits

SPARSITY_STEPS = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)
"""Steps from a wanted sparsity to those of the candidates."""


@dataclass(frozen=True)
class Wanted:
    """A budget in a user's terms: one of these.

    Attributes:
        avg_bits: per weight of the searched layers, every stored byte counted.
        size: of all weight files, such as "4GB".
        fit: peak memory of generation at `context` tokens and `batch` sequences, with a cache of `kv_bits`.
        latency_ms: of all packed layers' kernels for one token, by `timings`, a JSON file of measured kernels.
        sparsity: pruning instead: fraction of the searched layers' weights that become zero.
        drop_blocks: pruning instead: so many decoder blocks are left out.
    """

    avg_bits: float | None = None
    size: str | None = None
    fit: str | None = None
    latency_ms: float | None = None
    sparsity: float | None = None
    drop_blocks: int | None = None
    context: int | None = None
    batch: int = 1
    kv_bits: int | None = None
    timings: Path | None = None

    def __post_init__(self) -> None:
        kinds = ("avg_bits", "size", "fit", "latency_ms", "sparsity", "drop_blocks")
        given = [name for name in kinds if getattr(self, name) is not None]
        for name, reader in (("context", "fit"), ("kv_bits", "fit"), ("timings", "latency_ms")):
            if getattr(self, name) is not None and reader not in given:
                raise QuantkitError(f"`{name}` is given without `{reader}`, which reads it")
        if len(given) != 1:
            what = "none is given" if not given else f"{' and '.join(f'`{name}`' for name in given)} are given"
            raise QuantkitError(f"give one budget, such as `avg_bits` 3, `size` 4GB or `fit` 12GB; {what}")
        if self.avg_bits is not None and not 0 < self.avg_bits <= 16:
            raise QuantkitError(f"`avg_bits` {self.avg_bits:g}: give bits per weight, such as 3")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise QuantkitError(f"`sparsity` {self.sparsity:g}: give a fraction between 0 and 1, such as 0.5")
        if self.drop_blocks is not None and self.drop_blocks < 1:
            raise QuantkitError(f"`drop_blocks` {self.drop_blocks}: give at least 1")
        if self.latency_ms is not None and (self.timings is None or not 0 < self.latency_ms < 1e6):
            raise QuantkitError("`latency_ms` needs a positive time, and `timings`, a table of measured kernels")
        if self.fit is not None and (self.context is None or self.context < 1 or self.batch < 1):
            raise QuantkitError(
                "`fit` needs `context`, the tokens that the KV cache is to hold, and `batch` of at least 1"
            )

    @property
    def of_all(self) -> bool:
        """Whether the budget is for the whole model, the head and the embedding included."""
        return self.size is not None or self.fit is not None

    def budget(self, folder: Path, device: torch.device, packs_head: bool) -> tuple[Budget, str]:
        """(the budget, what it leaves the model, in words, where that is not what was said).

        Args:
            folder: the full-precision model.
            device: that the model is to fit.
            packs_head: whether the head is packed.

        Raises:
            QuantkitError: the budget leaves nothing.
        """
        if self.avg_bits is not None:
            return Budget(self.avg_bits, "bits"), ""
        if self.size is not None:
            return Budget(parse_size(self.size), "bytes"), ""
        if self.sparsity is not None:
            return Budget(1 - self.sparsity, "weights"), ""
        if self.drop_blocks is not None:
            blocks = config_of(folder).get_text_config().num_hidden_layers
            if self.drop_blocks >= blocks:
                raise QuantkitError(
                    f"`drop_blocks` {self.drop_blocks}: the model has {blocks} blocks, and one must stay"
                )
            return Budget(blocks - self.drop_blocks, "blocks"), ""
        if self.latency_ms is not None:
            assert self.timings is not None
            return Budget(self.latency_ms, "latency", read_timings(self.timings)), ""
        return self._fitting(folder, device, packs_head)

    def _fitting(self, folder: Path, device: torch.device, packs_head: bool) -> tuple[Budget, str]:
        """Bytes of weights that leave room for what generation needs beside them."""
        assert self.fit is not None and self.context is not None
        source = open_folder(folder, structure_only=True)
        kv = None if self.kv_bits is None else KVCacheConfig.gear(self.kv_bits)
        head = ends(source.model)[1] if packs_head else None
        layers = [*block_linears(source.model)]
        need = beside_weights(source.model, layers, self.context, self.batch, kv, device, head)
        left = parse_size(self.fit) - need.total
        if left <= 0:
            raise QuantkitError(
                f"`fit` {self.fit}: {need.total:,} bytes are needed beside the weights at this context and batch"
            )
        text = (
            f"{self.fit} at {self.context:,} tokens x {self.batch}: {size(need.cache)} of KV cache, "
            f"{size(need.activations)} of activations, {size(need.reserve)} for allocators and libraries; "
            f"{size(left)} for the model"
        )
        return Budget(left, "bytes"), text


def head_bits_of(wanted: Wanted, head_bits: int | None) -> int | None:
    """Bits of head and embedding, which are not searched; None leaves them dense.

    Args:
        wanted: the budget; where it is for all of the model they are packed unless told otherwise.
        head_bits: 1 to 8; 0 or 16 for dense; None for the default.

    Raises:
        QuantkitError: other bits, or any beside blocks that are left out.
    """
    if head_bits is None:
        return HEAD_BITS if wanted.of_all else None
    if head_bits not in (0, 16, *range(1, 9)):
        raise QuantkitError(f"`head_bits` {head_bits}: give 1 to 8, or 0 (or 16) to leave head and embedding dense")
    if wanted.drop_blocks is not None:
        raise QuantkitError("`head_bits` is given with `drop_blocks`, which makes a dense model; leave it out")
    return head_bits % 16 or None


def candidates_of(wanted: Wanted, candidates: str | None, base: str | None) -> tuple[tuple[Quantizer, ...], Quantizer]:
    """(ways to pack a layer, the one that packs the layers in front while a layer is calibrated).

    Args:
        wanted: the budget; a sparsity has candidates of its own.
        candidates: texts of quantizers with commas between; None for the default.
        base: one of them, or another; None for gptq(3), or the first.

    Raises:
        QuantkitError: they are none, or one cannot be given to a single layer.
    """
    if wanted.sparsity is not None and candidates is None:
        levels = sorted({round(max(0.0, min(0.95, wanted.sparsity + step)), 3) for step in SPARSITY_STEPS})
        candidates, base = ", ".join(f"sparse({level:g})" for level in levels), base or f"sparse({wanted.sparsity:g})"
    offers = spec.read_several(CANDIDATES if candidates is None else candidates)
    default = spec.read("gptq(3)")
    first = spec.read(base) if base else default if default in offers else offers[0]
    every = tuple(dict.fromkeys((*offers, first)))
    for quantizer in every:
        if (bits := fraction_of(quantizer)) is not None:
            lower, upper = (spec.write(with_bits(quantizer, int(bits) + more)) for more in (0, 1))
            raise QuantkitError(
                f"the candidate {spec.write(quantizer)}: a layer gets a whole number of bits; offer {lower} and "
                f"{upper}, and the search mixes them"
            )
    return every, first
