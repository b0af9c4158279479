"""What `quantkit.evals.fuzz` damages, and the doors through which a user would meet the damage.

Bases are folders that are made once: an untrained model of two small blocks with a tokenizer of 256 bytes, packed in
all formats at once, packed with a tied head, saved by transformers; interrupted runs of quantize, search and tune,
a database of candidates, a cache of a teacher's predictions; texts, a plan, timings, a prompt cache. A door takes a
damaged copy of one, and says whether what came of it is the same as of the base.
"""

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from quantkit.api import search, tune
from quantkit.core import spec
from quantkit.evals.evaluate import evaluate
from quantkit.evopress.budget import read_timings
from quantkit.evopress.run import Watch
from quantkit.evopress.settings import Evolution
from quantkit.evopress.wanted import Wanted
from quantkit.io.checkpoint import contents
from quantkit.io.hf import load
from quantkit.io.shards import Shards
from quantkit.io.source import load_tokenizer, open_folder
from quantkit.kvcache.cache import GearCache, cache_argument
from quantkit.kvcache.config import KVCacheConfig
from quantkit.run.pipeline import quantize_checkpoint
from quantkit.run.recipe import Calibration, Recipe, read_plan
from quantkit.tuning.settings import TuningSettings

SAME, OTHER, TAKEN = "equal", "different", "taken"
"""What a door says of what it let in: the base's result, another, or that there is none to compare with."""
VOCABULARY = 258
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EACH = {
    "*.q_proj": "hadamard(vptq(2, 2, outliers=0.1, residual_bits=2, scale_inputs=True))",
    "*.k_proj": "pyramid(2, 8)",
    "*.v_proj": "trellis(2, 10)",
    "*.o_proj": "low_rank(rtn(3, 16), 2, adapter_bits=8)",
    "*.gate_proj": "sparse(0.5)",
    "*.up_proj": "hadamard(low_rank(pyramid(2.5, 16, axis='in'), 2))",
    "*.down_proj": "rtn(3, 16, symmetric=False)",
}
"""A method of its own for every layer of a block, so that one checkpoint holds all formats."""
_TEXT = "It was not the first time that a file had come back from the disk otherwise than it went.\n"
_PLAIN = Recipe(spec.read("rtn(3, 16)"))


class Stopped(Exception):
    """What interrupts a run on the way."""


@dataclass(frozen=True)
class Door:
    """A way in.

    Attributes:
        base: what is damaged.
        files: patterns of the base's files that may be.
        enter: takes the damaged copy, and the folder with all bases; gives SAME, OTHER or TAKEN.
        weight: how often it is tried, beside the others.
        sealed: whether another result is a fault where no payload changed; else the base has no record of itself.
        verified: whether it is one in any case.
    """

    base: str
    files: tuple[str, ...]
    enter: Callable[[Path, Path], str]
    weight: int
    sealed: bool = True
    verified: bool = False


def make_bases(root: Path) -> None:
    """Makes all bases below a folder."""
    torch.manual_seed(0)
    dense = _write_model(root / "dense", tie_word_embeddings=False)
    tied = _write_model(root / "dense-tied", tie_word_embeddings=True)
    _write_texts(root / "texts")
    text = Calibration(str(root / "texts" / "plain.txt"), 8, 32)
    mixed = Recipe(None, {pattern: spec.read(text) for pattern, text in _EACH.items()}, calibration=text)
    quantize_checkpoint(dense, mixed, root / "mixed")
    quantize_checkpoint(tied, Recipe(spec.read("rtn(3, 16)"), head_bits=4), root / "tied")
    packed = load(root / "mixed")
    packed.save_pretrained(root / "saved")
    quantize_checkpoint(dense, _PLAIN, root / "whole")
    _interrupted(root)
    _searches(root)
    _tunings(root)
    (root / "prefix").mkdir()
    kept = GearCache(packed, KVCacheConfig.gear(2))
    with torch.no_grad():
        packed(_tokens(), **{cache_argument(packed): kept})
    kept.save(root / "prefix" / "prompt.safetensors")
    for name in ("mixed", "tied", "saved", "whole"):
        torch.save(_logits(load(root / name)), root / f"{name}.logits")


def _write_model(folder: Path, **more: Any) -> Path:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES, **more), dtype=torch.bfloat16)
    with torch.no_grad():  # one layer below fp16's range, for the format that has a factor
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(2**-20)
    model.save_pretrained(folder, max_shard_size="100KB")
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


def _interrupted(root: Path) -> None:
    """A run of quantize that ended after its first block; what it would have made is `whole`."""

    def stop(done: int, _total: int, _name: str) -> None:
        if done == 1:
            raise Stopped

    with suppress(Stopped):
        quantize_checkpoint(root / "dense", _PLAIN, root / "begun" / "out", progress=stop)


def _write_texts(folder: Path) -> None:
    """Calibration files of all kinds, a plan, timings."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"text": _TEXT * 3},
        {"text": 'a "quoted", word\n' * 20},
        {"text": "\u00e9\u4e2d" * 50},
    ]
    lines = "\n".join(map(json.dumps, [*rows, {"input_ids": [1, 2, 3] * 50}]))
    table = "id,text\n" + "".join(f'{i},"{_TEXT.strip()} {i}"\n' for i in range(9))
    (folder / "plain.txt").write_text(_TEXT * 9)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "array.json").write_text(json.dumps(rows))
    (folder / "table.csv").write_text(table)
    parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), folder / "table.parquet")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    plan = {f"model.layers.{i}.mlp.{name}_proj": "rtn(3, 16)" for i in range(2) for name in ("up", "gate", "down")}
    plan["model.layers.0.self_attn.q_proj"] = "hadamard(vptq(2, outliers=0.01))"
    (folder.parent / "plans").mkdir()
    (folder.parent / "plans" / "quantkit_plan.json").write_text(json.dumps({"layers": plan}))
    (folder.parent / "timings").mkdir()
    timings = [{"format": "int_group 4", "rows": rows, "columns": 64, "us": 11.5} for rows in (32, 64, 96)]
    (folder.parent / "timings" / "timings.json").write_text(json.dumps(timings))


def _searches(root: Path) -> None:
    """A finished search with its database, and one that stopped after a generation."""
    place = root / "search"
    _search(root, place, place / "done", 1)

    def stop(_done: int, _fitness: float, _fraction: float) -> None:
        raise Stopped

    with suppress(Stopped):
        _search(root, place, place / "begun", 2, Watch(generation=stop))
    _search(root, place, root / "search-found", 2)


def _search(root: Path, place: Path, output: Path, generations: int, watch: Any = None, resume: bool = False) -> None:
    text = Calibration(str(root / "texts" / "plain.txt"), 4, 32)
    search(
        root / "dense", output, avg_bits=3.8, candidates="rtn(2, 16), rtn(4, 16)", base="rtn(2, 16)",
        calibration=text, search_samples=4, held_out=1, database=place / "candidates", device="cpu", resume=resume,
        evolution=Evolution(generations, 2, ((1, 32),)), watch=watch,
    )  # fmt: skip


def _tunings(root: Path) -> None:
    """A run of tune that ended after a step, its teacher's cache, and what it would have made."""
    _tune(root, root / "tune", root / "tune-found")

    def stop(progress: Any) -> None:
        if progress.step == 1:
            raise Stopped

    with suppress(Stopped):
        _tune(root, root / "tune", root / "tune" / "out", progress=stop)


def _tune(root: Path, place: Path, output: Path, **more: Any) -> None:
    settings = TuningSettings(steps=2, batch=1, micro_batch=1, held_out=1, evaluate_every=1, top=16)
    text = Calibration(str(root / "texts" / "plain.txt"), 3, 32, 1)
    tune(
        root / "whole", root / "dense", output=output, calibration=text, settings=settings, device="cpu",
        cache=place / "teacher", **more,
    )  # fmt: skip


def _tokens() -> torch.Tensor:
    return torch.arange(24).view(2, 12) * 37 % VOCABULARY


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(_tokens(), use_cache=False).logits
    return logits


@cache
def _wanted(root: Path, name: str) -> torch.Tensor:
    wanted: torch.Tensor = torch.load(root / f"{name}.logits")
    return wanted


def _compared(model: Any, root: Path, name: str) -> str:
    found, wanted = _logits(model), _wanted(root, name)
    return SAME if found.dtype == wanted.dtype and torch.equal(found, wanted) else OTHER


def _loads(name: str, verify: bool = False) -> Callable[[Path, Path], str]:
    def enter(folder: Path, root: Path) -> str:
        return _compared(load(folder, verify=verify), root, name)

    return enter


def _inspected(folder: Path, root: Path) -> str:
    """What `quantkit inspect --verify` says."""
    found, wanted = contents(folder, True), contents(root / "mixed", True)
    ours, theirs = ((one.nbytes, one.bits_per_weight, one.verified, list(one.layers)) for one in (found, wanted))
    return SAME if ours == theirs else OTHER


def _packs(folder: Path, root: Path) -> str:
    """`quantize` of a full-precision model, which has no record of itself."""
    quantize_checkpoint(folder, _PLAIN, folder.parent / "out")
    return TAKEN


@cache
def _dense(root: Path) -> tuple[Any, Any]:
    return load_tokenizer(root / "dense"), open_folder(root / "dense").model


def _calibrates(name: str) -> Callable[[Path, Path], str]:
    def enter(folder: Path, root: Path) -> str:
        Calibration(str(folder / name), 2, 32).sequences(*_dense(root))
        return TAKEN

    return enter


def _evaluates(folder: Path, root: Path) -> str:
    """`eval --data FILE`."""
    model: Any = _student(root)
    evaluate(model, str(folder / "table.csv"), tokenizer=_dense(root)[0], seqlen=32, num_samples=1)
    return TAKEN


@cache
def _student(root: Path) -> Any:
    return load(root / "whole")


def _plans(folder: Path, root: Path) -> str:
    Recipe(None, {**read_plan(folder / "quantkit_plan.json")}).plan(_dense(root)[1])
    return TAKEN


def _times(folder: Path, _root: Path) -> str:
    wanted = Wanted(latency_ms=5, timings=folder / "timings.json")
    budget, _ = wanted.budget(folder, torch.device("cpu"), False)
    for rows in (32, 64, 96):
        weight = spec.read("rtn(4, 16)").layout(rows, 64)
        budget.cost(weight, spec.read("rtn(4, 16)"))
    assert read_timings(folder / "timings.json")
    return TAKEN


def _digest(folder: Path) -> dict[str, str]:
    return Shards(folder).checksums()


@cache
def _made(root: Path, name: str) -> dict[str, str]:
    return _digest(root / name)


def _resumes(folder: Path, root: Path) -> str:
    quantize_checkpoint(root / "dense", _PLAIN, folder / "out", resume=True)
    return SAME if _digest(folder / "out") == _made(root, "whole") else OTHER


def _replaces(folder: Path, root: Path) -> str:
    """`--overwrite` of an output whose list of files is damaged."""
    quantize_checkpoint(root / "dense", _PLAIN, folder, overwrite=True)
    return SAME if _digest(folder) == _made(root, "whole") else OTHER


def _search_resumes(folder: Path, root: Path) -> str:
    _search(root, folder, folder / "begun", 2, resume=True)
    return SAME if _digest(folder / "begun") == _made(root, "search-found") else OTHER


def _tune_resumes(folder: Path, root: Path) -> str:
    _tune(root, folder, folder / "out", resume=True)
    return SAME if _digest(folder / "out") == _made(root, "tune-found") else OTHER


def _prompted(folder: Path, root: Path) -> str:
    GearCache.load(folder / "prompt.safetensors", _packed(root))
    return TAKEN


@cache
def _packed(root: Path) -> Any:
    return load(root / "mixed")


_CHECKPOINT = ("config.json", "*.safetensors", "*.index.json", "quantkit_*.json", "generation_config.json")
_TEXTS = ("plain.txt", "rows.jsonl", "array.json", "table.csv", "table.parquet", "rows.jsonl.gz")
_SEARCH = ("begun.partial/*", "candidates/*", "candidates/*/*")
DOORS = {
    "load": Door("mixed", _CHECKPOINT, _loads("mixed"), 24),
    "load, config alone": Door("mixed", ("config.json",), _loads("mixed"), 8),
    "load, tied head": Door("tied", _CHECKPOINT, _loads("tied"), 10),
    "load verify=True": Door("mixed", _CHECKPOINT, _loads("mixed", True), 12, verified=True),
    "load, saved by transformers": Door("saved", ("*.json", "*.safetensors"), _loads("saved"), 12, sealed=False),
    "inspect --verify": Door("mixed", (*_CHECKPOINT, "tokenizer*"), _inspected, 4, verified=True),
    "quantize MODEL": Door("dense", ("*",), _packs, 6),
    "quantize --resume": Door("begun", ("*", "*/*", "*/*/*"), _resumes, 6),
    "quantize --overwrite": Door("whole", ("quantkit_files.json", "config.json"), _replaces, 2),
    "quantize --plan": Door("plans", ("*",), _plans, 4),
    "search --timings": Door("timings", ("*",), _times, 2),
    "search --resume, --database": Door("search", _SEARCH, _search_resumes, 4),
    "tune --resume, --cache": Door("tune", ("out.partial/*", "teacher/*"), _tune_resumes, 4),
    "eval --data": Door("texts", ("table.csv",), _evaluates, 1),
    "generate, prompt cache": Door("prefix", ("*",), _prompted, 2),
    **{f"calibration {name.partition('.')[2]}": Door("texts", (name,), _calibrates(name), 2) for name in _TEXTS},
}


def quiet() -> None:
    """Leaves out what runs say on the way, and what they would ask the hub for."""
    logging.disable(logging.CRITICAL)
    import huggingface_hub
    import transformers

    huggingface_hub.constants.HF_HUB_OFFLINE = True

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def copied(root: Path, door: Door, place: Path) -> tuple[Path, list[str]]:
    """(a copy of a door's base in a folder, the names of its files that may be damaged)."""
    folder = place / door.base
    shutil.copytree(root / door.base, folder, symlinks=True)
    found = {path for pattern in door.files for path in folder.glob(pattern) if path.is_file()}
    return folder, sorted(path.relative_to(folder).as_posix() for path in found)
