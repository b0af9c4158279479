"""Budgets that users have, as bytes that the searched layers may take.

Every stored byte counts: the dense rest of the model (embeddings, norms, head) and the files' headers come first, and
what is left is the layers'. A model that is to fit a device beside its cache and activations leaves room for those:

    weights + KV cache (context x batch) + activations (the longest prompt in one pass) <= device
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import QuantkitError
from quantkit.folder import ModelFolder
from quantkit.model import linear_weight
from quantkit.protocols import Quantizer
from quantkit.search.store import Candidate
from quantkit.weight import QuantizedWeight

HEADER_BYTES = 160
"""Of a tensor's entry in a safetensors header, at most, and its share of the index."""
TENSORS = 8
"""Of a packed layer, at most."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "4GB" (decimal), "3.5GiB" (binary) or a plain number.

    Raises:
        QuantkitError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise QuantkitError(f"{text!r} is no size; give one such as 4GB, 3.5GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def kv_cache_bytes(config: Any, context: int, batch: int, bits: float = 16) -> int:
    """Of keys and values at a full context; layers with a sliding window keep no more than it.

    Args:
        config: the model's.
        context: tokens of each sequence.
        batch: sequences.
        bits: of a cached number, with all that a compressed cache stores beside it.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = getattr(config, "sliding_window", None) or context
    lengths = [min(context, window) if kind == "sliding_attention" else context for kind in kinds]
    return int(2 * sum(lengths) * batch * heads * size * bits / 8)


def activation_bytes(config: Any, context: int, batch: int, itemsize: int = 2) -> int:
    """Of a pass over the whole context, at most: a block's widest moment, and the last token's logits in fp32.

    Residual, its normed copy, queries, keys, values and attention's output, or the MLP's two halves and their product.
    """
    config = config.get_text_config()
    hidden, wide = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden + 6 * heads * size
    tokens = context * batch
    return tokens * itemsize * max(attention, 2 * hidden + 3 * wide) + 3 * 4 * batch * config.vocab_size


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        amount: "bits": per weight of the searched layers; "bytes": of all weight files; "weights": share of the
            searched layers' weights that are not zero; "latency": milliseconds in the layers' kernels, for one token;
            "blocks": how many stay.
        kind: which of these.
        timings: microseconds by format and shape, for a latency; see `read_timings`.
    """

    amount: float
    kind: Literal["bits", "bytes", "weights", "latency", "blocks"]
    timings: Mapping[tuple[str, int, int], float] | None = None

    def units(self, source: ModelFolder | None, layers: Sequence[str]) -> int:
        """What the searched layers may cost, in units of `cost`.

        Args:
            source: the full-precision model; not read for a number of blocks.
            layers: their names.
        """
        if self.kind == "blocks" or source is None:
            return int(self.amount)
        if self.kind == "latency":
            return int(1e6 * self.amount)
        if self.kind == "bytes":
            dense = source.nbytes() - source.packed_nbytes(layers)
            headers = HEADER_BYTES * (len(source.model.state_dict()) + TENSORS * len(layers))
            return int(self.amount) - dense - headers
        weights = sum(linear_weight(source.model.get_submodule(name)).numel() for name in layers)
        return int(self.amount * weights / (8 if self.kind == "bits" else 1))

    def cost(self, candidate: Candidate, quantizer: Quantizer) -> int:
        """Of a layer's candidate: bytes, weights that are not zero, or nanoseconds.

        Raises:
            QuantkitError: the timings lack its format and shape.
        """
        weight = QuantizedWeight.empty(candidate.metadata)
        rows, columns = weight.shape
        if self.kind == "latency":
            assert self.timings is not None
            name = f"{weight.label} {candidate.metadata['bits']}" if "bits" in candidate.metadata else weight.label
            if (name, rows, columns) not in self.timings:
                raise QuantkitError(f"the timings lack {name!r} at {rows} x {columns}; measure it")
            return int(1e3 * self.timings[name, rows, columns])
        if self.kind == "weights":
            return rows * columns - round(getattr(quantizer, "sparsity", 0.0) * rows * columns)
        return candidate.nbytes


def read_timings(path: Path) -> dict[tuple[str, int, int], float]:
    """A table of kernel timings: JSON [{"format": "int_group 4", "rows": 4096, "columns": 4096, "us": 11.5}, ...].

    Formats are called as in reports, with their bits behind where they are integers; rows are output features.

    Raises:
        QuantkitError: the file is no such table.
    """
    try:
        return {(e["format"], int(e["rows"]), int(e["columns"])): float(e["us"]) for e in json.loads(path.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantkitError(
            f'{path} is no table of timings ({error}); it holds [{{"format": "int_group 4", "rows": 4096, '
            '"columns": 4096, "us": 11.5}, ...]'
        ) from error
