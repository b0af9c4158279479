"""A folder in another program's form, written a block at a time; a run that was stopped goes on where it was."""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quantkit.core.weight import QuantizedWeight
from quantkit.exchange.target import Target, Told, Written, difference
from quantkit.io.beside import files_beside
from quantkit.io.run_folder import Output
from quantkit.io.shards import INDEX, checksum, open_shard


def write(target: Target, output: Output, identity: dict[str, Any], progress: Told) -> Written:
    """Writes the folder, and publishes it.

    Args:
        target: the form, with the checkpoint.
        output: the folder to make.
        identity: what tells this run from others, for one that goes on.
        progress: called with (units done, units in all, what comes next).
    """
    packed = target.packed
    count = len(packed.units)
    with output.begin(identity):
        for nth, unit in enumerate(packed.units):
            progress(nth, count, "the rest" if unit < 0 else f"block {unit}")
            stem = f"model-{nth + 1:05d}-of-{count:05d}"
            shard = output.made(f"{stem}.safetensors")
            if not output.has(shard):
                tensors, record = _unit(target, unit)
                output.write_record(f"{stem}.json", record)
                needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                output.write(shard, partial(_save, tensors), needed)
        progress(count, count, "the folder")
        return _finish(target, output, count)


def _unit(target: Target, unit: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a unit, and what is to be remembered of them."""
    packed = target.packed
    found: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    opened: list[str] = []
    for name, value in packed.read(unit):
        if not isinstance(value, QuantizedWeight):
            dense[name] = value
        elif target.holds(name):
            stored, read = target.tensors(name, value)
            found |= stored
            errors[name] = difference(read, value)
        else:
            dense[f"{name}.weight"] = packed.as_dense(name, value, target.dtype)
            opened.append(name)
    found |= target.dense(dense)
    sums = {name: checksum(tensor) for name, tensor in found.items()}
    return found, {"errors": errors, "dense": opened, "checksums": sums}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _finish(target: Target, output: Output, count: int) -> Written:
    stems = [f"model-{nth + 1:05d}-of-{count:05d}" for nth in range(count)]
    records = [
        output.read_record(f"{stem}.json", "what was written of a block; remove it and its shard") for stem in stems
    ]
    weight_map: dict[str, str] = {}
    for stem in stems:
        with open_shard(output.path(output.made(f"{stem}.safetensors"))) as shard:
            weight_map |= dict.fromkeys(shard.keys(), f"{stem}.safetensors")
    nbytes = sum(output.path(output.made(f"{stem}.safetensors")).stat().st_size for stem in stems)
    for name, content in files_beside(target.packed.folder).items():
        output.write_bytes(output.made(name), content)
    output.write_json(output.made("config.json"), target.config())
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    output.write_json(output.made(INDEX), index)
    output.publish({name: value for record in records for name, value in record["checksums"].items()})
    errors = [error for record in records for error in record["errors"].values()]
    opened = [name for record in records for name in record["dense"]]
    return Written(len(errors), tuple(opened), max(errors, default=0.0), nbytes)
