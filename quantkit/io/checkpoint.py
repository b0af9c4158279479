"""Packed checkpoints: written block by block, durable at every step, published by one rename.

Every finished block leaves a sidecar with its layers' metadata and then its shard in the folder to come; a shard's
presence under its final name is the record that its block is done. When all blocks are, the index and the config are
added and the folder gets its name (`io.run_folder.Output`). The bytes do not depend on how often a run was interrupted.

Tensors are named `<layer>.<local name>`; config.json carries

    quantization_config = {quant_method: "quantkit", version, layers: {layer: metadata}, checksums}

where the checksums are those of config.json itself and of the files' headers, which every load looks at; those of
tensors and of all other files are in the folder's list of files, for `verify`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from quantkit.core.constants import METHOD, VERSION
from quantkit.core.device import parse_dtype
from quantkit.core.errors import CheckpointError
from quantkit.core.result import LayerResult
from quantkit.core.schema import in_words
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.files import parse_json
from quantkit.io.run_folder import MANIFEST, Output, check_listed
from quantkit.io.shards import DTYPES, INDEX, Shards, checksum, header_checksum, open_shard

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
"""What a folder of peft's adapters holds."""
MERGE = "merge it first: PeftModel.from_pretrained(model, adapter).merge_and_unload(), and give what comes of it"
"""How a model with an adapter becomes one that can be quantized."""
WRITTEN_ANEW = {"config.json", "README.md", MANIFEST, INDEX, "pytorch_model.bin.index.json"}
"""Files of a model's folder that a checkpoint has its own of."""


def quantization_config(layers: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about the packed layers."""
    return {"quant_method": METHOD, "version": VERSION, "layers": dict(layers)}


def sealed(config: Mapping[str, Any], shards: Iterable[Path]) -> dict[str, Any]:
    """A packed checkpoint's config.json with the checksums of itself and of the headers of its files."""
    found: dict[str, Any] = json.loads(json.dumps(config))  # as a reader finds it
    packed = found["quantization_config"]
    packed["checksums"] = {"headers": {shard.name: header_checksum(shard) for shard in shards}}
    packed["checksums"]["config"] = _config_checksum(found)
    return found


def _config_checksum(config: Mapping[str, Any]) -> str:
    """xxh3 of a config.json's values, the checksum itself left out."""
    packed = config["quantization_config"]
    others = {key: value for key, value in packed["checksums"].items() if key != "config"}
    whole = {**config, "quantization_config": {**packed, "checksums": others}}
    return str(xxh3_64_hexdigest(json.dumps(whole, sort_keys=True).encode()))


def check_seal(folder: Path, config: Mapping[str, Any], shards: Iterable[str]) -> None:
    """Holds a packed checkpoint's config.json, and the headers of its files, against its checksums, where it has them.

    Raises:
        CheckpointError: one differs, or they are no checksums.
    """
    sums = config["quantization_config"].get("checksums")
    if sums is None:  # transformers wrote it
        return
    if not isinstance(sums, dict) or not isinstance(sums.get("headers"), dict):
        raise CheckpointError(f"{folder / 'config.json'} has {in_words(sums)} for checksums; fetch it anew")
    if sums.get("config") != (found := _config_checksum(config)):
        raise CheckpointError(
            f"{folder / 'config.json'} is not as it was written: its checksum is {found}, and it says "
            f"{in_words(sums.get('config'))}; fetch it anew or, if the change was wanted, take `checksums` out of it"
        )
    wrong = [name for name in sorted({*shards}) if sums["headers"].get(name) != header_checksum(folder / name)]
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]} is not as it was written: its header has another checksum; fetch it anew"
        )


class CheckpointWriter:
    """The walker's sink on disk.

    Args:
        output: the folder to make; begun before anything is written.
        num_blocks: decoder blocks of the model; each gets a shard, and one more holds the rest.
        dense: for a block's index (-1 for all else) the stored tensors that no plan packs, by model name.
    """

    def __init__(self, output: Output, num_blocks: int, dense: Callable[[int, set[str]], dict[str, Tensor]]) -> None:
        self._output, self._num_blocks, self._dense = output, num_blocks, dense

    def begin(self, identity: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[Any]:
        """The time in which the checkpoint is written; see `RunFolder.begin`."""
        return self._output.begin(identity())

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder for what the run finds on its way, which an interrupted run finds again."""
        yield self._output.own(name)

    def _names(self, index: int) -> tuple[str, str]:
        """(shard, sidecar) of a block; index -1 is the last shard."""
        count = self._num_blocks + 1
        stem = f"model-{count if index < 0 else index + 1:05d}-of-{count:05d}"
        return self._output.made(f"{stem}.safetensors"), f"{stem}.json"

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The packed layers of a block that an earlier run finished, or None."""
        shard_name, _ = self._names(index)
        if not self._output.has(shard_name):
            return None
        record = self._record(index)
        try:
            with open_shard(self._output.path(shard_name)) as shard:
                tensors = {name: shard.get_tensor(name).clone() for name in shard.keys()}
        except (CheckpointError, SafetensorError):
            tensors = {}
        if {name: checksum(tensor) for name, tensor in tensors.items()} != record["checksums"]:
            logger.warning("%s is not as it was written; the block is made anew", self._output.path(shard_name))
            self._output.discard(shard_name)
            return None
        weights = {}
        for layer, entry in record["layers"].items():
            state = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
            weights[layer] = QuantizedWeight.from_state(entry["metadata"], state)
        return weights

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Makes a block durable: its packed layers and the dense tensors beside them."""
        shard_name, sidecar = self._names(index)
        if self._output.has(shard_name):
            return
        tensors = self._dense(index, set(layers))
        entries = {}
        for layer, result in layers.items():
            tensors |= {f"{layer}.{key}": tensor.cpu().contiguous() for key, tensor in result.weight.state().items()}
            entries[layer] = {
                "metadata": result.weight.metadata(),
                "bits_per_weight": result.weight.bits_per_weight,
                "relative_error": result.relative_error,
                "damping": result.damping,
                "tuned": result.tuned,
                "predicted_kl": result.predicted_kl,
                **({} if result.tokens is None else {"tokens": result.tokens}),
            }
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        self._output.write_record(sidecar, {"layers": entries, "checksums": checksums})
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # Only one metadata key: safetensors writes several in random order, and bytes must repeat.
        self._output.write(shard_name, lambda path: save_file(tensors, path, metadata={"format": "pt"}), needed)

    def _record(self, index: int) -> dict[str, Any]:
        way = "a block's record; remove it and the shard of its name to have the block made anew"
        return self._output.read_record(self._names(index)[1], way)

    def results(self) -> dict[str, LayerResult]:
        """All packed layers without their tensors, in the order of the blocks."""
        results = {}
        for index in (*range(self._num_blocks), -1):
            for layer, entry in self._record(index)["layers"].items():
                weight, tuned = QuantizedWeight.empty(entry["metadata"]), entry.get("tuned")
                results[layer] = LayerResult(
                    weight, entry["relative_error"], entry["damping"], tuple(tuned) if tuned else None,
                    entry.get("predicted_kl"),
                    entry.get("tokens"),
                )  # fmt: skip
        return results

    def finish(self, config: Mapping[str, Any], files: Callable[[], Mapping[str, bytes]]) -> None:
        """Publishes the checkpoint.

        Args:
            config: the original config.json; gets the quantization_config.
            files: gives further files by name.
        """
        weight_map: dict[str, str] = {}
        total = 0
        paths = [self._output.path(self._names(index)[0]) for index in (*range(self._num_blocks), -1)]
        for shard_path in paths:
            with open_shard(shard_path) as shard:
                weight_map |= dict.fromkeys(shard.keys(), shard_path.name)
            total += shard_path.stat().st_size
        layers = {layer: result.weight.metadata() for layer, result in self.results().items()}
        for name, content in files().items():
            self._output.write_bytes(self._output.made(name), content)
        described = {**config, "quantization_config": quantization_config(layers)}
        self._output.write_json(self._output.made("config.json"), sealed(described, paths))
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._output.write_json(self._output.made(INDEX), index_json)
        blocks = (self._record(index)["checksums"] for index in (*range(self._num_blocks), -1))
        self._output.publish({name: value for block in blocks for name, value in block.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder} is an adapter and no model; {MERGE}")
        raise CheckpointError(f"{folder} holds no config.json; it is not a transformers model")
    try:
        found = parse_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it anew") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {in_words(found)}, and a model's config is an object; fetch it anew")
    return found


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that a model folder's config.json gives its weights; None where it gives none.

    Raises:
        QuantkitError: there is no config.json that can be read, or it names another type than fp32, bf16 or fp16.
    """
    return parse_dtype(read_config(folder).get("dtype"))


def packed_layers(folder: Path) -> dict[str, Any]:
    """Metadata of a checkpoint's packed layers, held against the tensors in its shards.

    Raises:
        CheckpointError: not a quantkit checkpoint, a newer version, or tensors that differ from the metadata.
    """
    config = read_config(folder)
    if not is_packed(config):
        raise CheckpointError(f"{folder} is not a quantkit checkpoint; `quantkit quantize` makes one")
    layers = check_version(config["quantization_config"])
    shards = Shards(folder)
    check_seal(folder, config, shards.files.values())
    check_tensors(layers, shards.specs)
    return layers


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a packed checkpoint."""
    packed = config.get("quantization_config")
    return isinstance(packed, dict) and packed.get("quant_method") == METHOD


def verify(folder: Path) -> int:
    """Holds every tensor of a folder, and every other file of its run, against its checksum; the number of tensors.

    Raises:
        CheckpointError: some differ, are missing, or the folder lists none.
    """
    listed = check_listed(folder).get("tensors")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST} lists no checksums; {folder.name} cannot be verified")
    found = Shards(folder).checksums()
    wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
    if wrong:
        few = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CheckpointError(f"{folder}: {few} of {len(listed)} tensors are not as they were written; fetch it anew")
    return len(found)


@dataclass(frozen=True)
class Contents:
    """What a packed checkpoint holds.

    Attributes:
        layers: its packed layers, on the meta device.
        nbytes: of all tensors.
        verified: tensors that are as they were written; None where nobody looked.
    """

    layers: dict[str, QuantizedWeight]
    nbytes: int
    verified: int | None = None

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed layers."""
        return sum(weight.nbytes for weight in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the packed layers, every stored byte counted; what is tied to another counts there."""
        shapes = [weight.shape for weight in self.layers.values() if weight.state()]
        return 8 * self.packed_nbytes / sum(rows * columns for rows, columns in shapes)


def contents(folder: Path, check: bool = False) -> Contents:
    """What a packed checkpoint holds, by its metadata and the headers of its files.

    Args:
        folder: of the checkpoint.
        check: hold all tensors against their checksums too.

    Raises:
        CheckpointError: see `packed_layers` and `verify`.
    """
    verified = verify(folder) if check else None
    layers = {name: QuantizedWeight.empty(metadata) for name, metadata in packed_layers(folder).items()}
    return Contents(layers, Shards(folder).nbytes(), verified)


def check_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of a quantization_config of a version that this quantkit reads.

    Raises:
        CheckpointError: of another version, or without layers.
    """
    version = config.get("version")
    if version == 1:
        raise CheckpointError("the checkpoint has format version 1, of a pre-release; quantize the model again")
    if version != VERSION:
        raise CheckpointError(f"the checkpoint has format version {version}; this quantkit reads {VERSION}: upgrade it")
    layers = config.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError("the checkpoint's quantization_config lists no layers; it is damaged")
    return layers


def check_tensors(layers: Mapping[str, Any], specs: Mapping[str, tuple[str, list[int]]]) -> None:
    """Holds the declared tensors of packed layers against those that the files have.

    Args:
        layers: metadata by layer.
        specs: (safetensors dtype, shape) by tensor name.

    Raises:
        CheckpointError: a tensor is missing or differs, or the files hold one of a layer that does not declare it.
    """
    weights = {}
    for layer, metadata in layers.items():
        try:
            weights[layer] = QuantizedWeight.empty(metadata)
            weights[layer].validate()
        except (ValueError, CheckpointError) as error:
            raise CheckpointError(f"{layer}: {error}; config.json is damaged") from error
    for layer, weight in weights.items():
        if isinstance(weight, TiedWeight):
            _check_tied(layer, weight, weights)
        for key, tensor in weight.state().items():
            found = specs.get(f"{layer}.{key}")
            if found is None:
                raise CheckpointError(f"{layer}.{key} is missing from the checkpoint's files; fetch or make it anew")
            if found[1] != list(tensor.shape) or DTYPES.get(found[0]) != tensor.dtype:
                raise CheckpointError(
                    f"{layer}.{key} is {found[0]} {found[1]} in its file; config.json declares {in_words(tensor)}"
                )
    for name in specs:
        owner = next((above for above in _prefixes(name) if above in weights), None)
        key = name.removeprefix(f"{owner}.")
        if owner is not None and key != "bias" and key not in weights[owner].state():
            raise CheckpointError(
                f"{name} is in the files, and config.json does not say what {owner} has it for; config.json is damaged"
            )


def _prefixes(name: str) -> Iterator[str]:
    """The modules that a tensor may belong to, outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _check_tied(layer: str, weight: TiedWeight, weights: Mapping[str, QuantizedWeight]) -> None:
    """Raises CheckpointError unless another packed layer of the same shape is there to be looked up."""
    other = weights.get(weight.layer)
    if other is None or isinstance(other, TiedWeight) or other.shape != weight.shape:
        found = "is not there" if other is None else f"is {other.label} {list(other.shape)}"
        raise CheckpointError(
            f"{layer}: it is tied to {weight.layer}, {list(weight.shape)}, which {found}; config.json is damaged"
        )
