"""Packed checkpoints: written block by block, durable at every step, published by one rename.

A run works in `<output>.partial`. There `run.json` says what is being done, so that another run cannot be
continued by mistake; `checkpoint/` is the folder that will be published; and every finished block leaves a
sidecar with its layers' metadata and then its shard in `checkpoint/`, each synced under a temporary name and
renamed. A shard's presence under its final name is the record that its block is done. When all blocks are,
the index and the config are added and `checkpoint/` is renamed to `<output>`. The bytes do not depend on how
often a run was interrupted.

Tensors are named `<layer>.<local name>`; config.json carries

    quantization_config = {quant_method: "quantkit", version, layers: {layer: metadata}}
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantkit.core.constants import METHOD, VERSION
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.result import LayerResult
from quantkit.core.schema import in_words
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.shards import DTYPES, INDEX, Shards, open_shard

logger = logging.getLogger(__name__)

SEARCH_RECORD = "quantkit_search.json"
"""What lies beside every model that a search has made, a pruned, dense one too."""
_RUN = "run.json"
_FILES = "checkpoint"
_WRITTEN_ANEW = {"config.json", INDEX, "pytorch_model.bin.index.json"}
_COPIED = {".json", ".jinja", ".model", ".py", ".txt"}


def quantization_config(layers: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about the packed layers."""
    return {"quant_method": METHOD, "version": VERSION, "layers": dict(layers)}


class CheckpointWriter:
    """The walker's sink on disk.

    Args:
        output: the folder to make.
        num_blocks: decoder blocks of the model; each gets a shard, and one more holds the rest.
        dense: for a block's index (-1 for all else) the stored tensors that no plan packs, by model name.
        run: JSON that identifies the run; a partial folder is continued only by an equal one.
        resume: continue a partial folder if there is one.
        overwrite: discard a partial folder, and replace `output` when done.

    Raises:
        QuantkitError: the output or a partial folder is in the way, or belongs to another run.
    """

    def __init__(
        self,
        output: Path,
        num_blocks: int,
        dense: Callable[[int, set[str]], dict[str, Tensor]],
        run: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.output, self.partial = output, _partial(output)
        self._files = self.partial / _FILES
        self._num_blocks, self._dense, self._overwrite = num_blocks, dense, overwrite
        check_output(output, resume=resume, overwrite=overwrite)
        if self.partial.exists() and overwrite and not resume:
            _remove(self.partial)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._check_partial(run)
            self._files.mkdir(exist_ok=True)
            remove_strays(self._files)
        except OSError as error:
            raise QuantkitError(f"{self.partial} cannot be made ({error})") from error

    def _check_partial(self, run: dict[str, Any]) -> None:
        """Writes down what the run is, or holds it against what a former one wrote."""
        try:
            found = json.loads((self.partial / _RUN).read_text())
        except (OSError, ValueError) as error:
            if any(self._files.glob("*.safetensors")):
                raise CheckpointError(
                    f"{self.partial / _RUN} is unreadable ({error}); `overwrite` starts anew"
                ) from error
            write_json(self.partial / _RUN, run)  # nothing is done yet
            return
        run = json.loads(json.dumps(run))
        differing = sorted(key for key in run.keys() | found.keys() if run.get(key) != found.get(key))
        if differing:
            key = differing[0]
            raise QuantkitError(
                f"{self.partial} was begun with other settings ({', '.join(differing)} differ; {key}: "
                f"{_short(found.get(key))} then, {_short(run.get(key))} now); repeat them, or `overwrite` starts anew"
            )

    def _paths(self, index: int) -> tuple[Path, Path]:
        """(shard, sidecar) of a block; index -1 is the last shard."""
        number = self._num_blocks + 1 if index < 0 else index + 1
        stem = f"model-{number:05d}-of-{self._num_blocks + 1:05d}"
        return self._files / f"{stem}.safetensors", self.partial / f"{stem}.json"

    def finished(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The packed layers of a block that an earlier run finished, or None."""
        shard_path, sidecar = self._paths(index)
        if not shard_path.is_file():
            return None
        layers = json.loads(sidecar.read_text())
        weights = {}
        with open_shard(shard_path) as shard:
            for layer, entry in layers.items():
                names = [name for name in shard.keys() if name.startswith(f"{layer}.")]
                state = {name.removeprefix(f"{layer}."): shard.get_tensor(name).clone() for name in names}
                weights[layer] = QuantizedWeight.from_state(entry["metadata"], state)
        return weights

    def write(self, index: int, name: str, layers: dict[str, LayerResult]) -> None:
        """Makes a block durable: its packed layers and the dense tensors beside them."""
        shard_path, sidecar = self._paths(index)
        if shard_path.is_file():
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
            }
        write_json(sidecar, entries)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # Only one metadata key: safetensors writes several in random order, and bytes must repeat.
        write_durably(shard_path, lambda path: save_file(tensors, path, metadata={"format": "pt"}), needed)

    def entries(self) -> dict[str, Any]:
        """The sidecars' entries of all packed layers, in the order of the blocks."""
        entries: dict[str, Any] = {}
        for index in self._indices():
            entries |= json.loads(self._paths(index)[1].read_text())
        return entries

    def finish(self, source: Path, config: dict[str, Any], files: Mapping[str, str]) -> None:
        """Publishes the checkpoint.

        Args:
            source: the original model's folder; its tokenizer and other small files are copied.
            config: the original config.json; gets the quantization_config.
            files: further text files by name.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for index in self._indices():
            shard_path, _ = self._paths(index)
            with open_shard(shard_path) as shard:
                weight_map |= dict.fromkeys(shard.keys(), shard_path.name)
            total += shard_path.stat().st_size
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix in _COPIED and path.name not in _WRITTEN_ANEW:
                _write_bytes(self._files / path.name, path.read_bytes())
        layers = {layer: entry["metadata"] for layer, entry in self.entries().items()}
        write_json(self._files / "config.json", config | {"quantization_config": quantization_config(layers)})
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._files / INDEX, index_json)
        for name, text in files.items():
            _write_bytes(self._files / name, text.encode())
        self._publish()

    def _indices(self) -> list[int]:
        return [*range(self._num_blocks), -1]

    def _publish(self) -> None:
        replaced = self.output.with_name(self.output.name + ".replaced")
        if replaced.exists():
            _remove(replaced)
        if self.output.exists():
            self.output.rename(replaced)
        self._files.rename(self.output)
        _sync_folder(self.output.parent)
        shutil.rmtree(self.partial)  # only now: a run killed before the rename can still be resumed
        if replaced.exists():
            _remove(replaced)


def check_output(output: Path, source: Path | None = None, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses an output that something is in the way of, before any work is done.

    Args:
        output: the folder to make.
        source: the model's folder, which must not be touched.
        resume, overwrite: see `CheckpointWriter`.

    Raises:
        QuantkitError: `output` cannot be a new folder, exists, or is not a checkpoint that may be replaced.
    """
    if not output.name or output.name == "..":
        raise QuantkitError(f"`output` {output} names no new folder; give one such as out/model-3bit")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise QuantkitError(f"`output` {output}: {above} is no folder that can be written to")
    if source is not None:
        ours, theirs = output.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents:
            raise QuantkitError(f"`output` {output} would replace the model in {source} itself; give another folder")
    partial = _partial(output)
    if output.exists() and partial.exists() and not (partial / _FILES).exists():
        _remove(partial)  # the run was killed after its last step that matters
    if output.exists() and not overwrite:
        done = "already exists, and there is no unfinished run towards it" if resume else "already exists"
        raise QuantkitError(f"{output} {done}; give another `output`, or `overwrite` to replace it")
    if output.exists() and not _is_ours(output):
        raise QuantkitError(
            f"{output} is not a quantkit checkpoint, and `overwrite` replaces nothing else; remove it first"
        )
    if partial.exists() and not (resume or overwrite):
        raise QuantkitError(f"{partial} holds an unfinished run; `resume` continues it, `overwrite` starts anew")


def _is_ours(folder: Path) -> bool:
    """Whether a folder may be deleted: it is empty, a packed checkpoint, what a search made, or an unfinished run."""
    if not folder.is_dir():
        return False
    if (folder / _RUN).is_file() or (folder / SEARCH_RECORD).is_file() or not any(folder.iterdir()):
        return True
    try:
        return (read_config(folder).get("quantization_config") or {}).get("quant_method") == METHOD
    except QuantkitError:
        return False


def _remove(folder: Path) -> None:
    """Deletes a folder of ours.

    Raises:
        QuantkitError: it holds something else.
    """
    if not _is_ours(folder):
        raise QuantkitError(f"{folder} is in the way and not quantkit's; move it away")
    shutil.rmtree(folder)


def replace_folder(made: Path, output: Path) -> None:
    """Gives a finished folder its name, in the place of what `check_output` allowed to replace."""
    if output.exists():
        shutil.rmtree(output)
    made.rename(output)


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no config.json; it is not a transformers model") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON ({error})") from error


def packed_layers(folder: Path) -> dict[str, Any]:
    """Metadata of a checkpoint's packed layers, held against the tensors in its shards.

    Raises:
        CheckpointError: not a quantkit checkpoint, a newer version, or tensors that differ from the metadata.
    """
    config = read_config(folder).get("quantization_config") or {}
    if config.get("quant_method") != METHOD:
        raise CheckpointError(f"{folder} is not a quantkit checkpoint; `quantkit quantize` makes one")
    layers = check_version(config)
    check_tensors(layers, Shards(folder).specs)
    return layers


def check_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of a quantization_config of a version that this quantkit reads."""
    version = config.get("version")
    if version == 1:
        raise CheckpointError("the checkpoint has format version 1, of a pre-release; quantize the model again")
    if version != VERSION:
        raise CheckpointError(f"the checkpoint has format version {version}; this quantkit reads {VERSION}: upgrade it")
    layers = config.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError("the checkpoint's quantization_config lists no layers; it is damaged")
    return layers


def check_tensors(layers: Mapping[str, Any], specs: Mapping[str, tuple[str, list[int]]]) -> None:
    """Holds the declared tensors of packed layers against those that the files have.

    Args:
        layers: metadata by layer.
        specs: (safetensors dtype, shape) by tensor name.

    Raises:
        CheckpointError: a tensor is missing or differs.
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


def _check_tied(layer: str, weight: TiedWeight, weights: Mapping[str, QuantizedWeight]) -> None:
    """Raises CheckpointError unless another packed layer of the same shape is there to be looked up."""
    other = weights.get(weight.layer)
    if other is None or isinstance(other, TiedWeight) or other.shape != weight.shape:
        found = "is not there" if other is None else f"is {other.label} {list(other.shape)}"
        raise CheckpointError(
            f"{layer}: it is tied to {weight.layer}, {list(weight.shape)}, which {found}; config.json is damaged"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON durably: synced under a temporary name, then renamed."""
    _write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    write_durably(path, lambda target: target.write_bytes(content), len(content))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process fills the folder, then keeps others waiting; what a killed one held is free."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("another run fills %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def remove_strays(folder: Path) -> None:
    """Removes the temporary files of a write that was killed, ours and those that safetensors makes beside them."""
    for path in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):
        path.unlink()


def write_durably(path: Path, write: Callable[[Path], Any], needed: int) -> None:
    """Writes a file so that it is either whole or not there: synced under a temporary name, then renamed.

    Args:
        path: the file.
        write: writes it to the path that it is given.
        needed: bytes, at least.

    Raises:
        QuantkitError: the disk is full, or does not take it.
    """
    temporary = path.with_name(path.name + ".tmp")
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise QuantkitError(_disk_full(path, needed, free))
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: what torch.save makes of a full disk
        temporary.unlink(missing_ok=True)
        if "No space" in str(error) or "os error 28" in str(error):
            raise QuantkitError(_disk_full(path, needed, shutil.disk_usage(path.parent).free)) from error
        raise QuantkitError(f"{path} cannot be written ({error})") from error


def _disk_full(path: Path, needed: int, free: int) -> str:
    return (
        f"the disk is full: {path.name} takes {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; "
        "what was finished before is kept, so free some space and repeat with `resume`"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
