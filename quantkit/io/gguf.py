"""GGUF files as models: transformers' reader makes an ordinary folder of one, in a cache.

The folder has safetensors, config.json and a tokenizer, all made from the file alone. Everything that takes a folder
takes it: runs read it a block at a time, and its fingerprint is that of any other model. It is named by the file's
checksum, so that a file is converted once, wherever it lies:

    $HF_HOME/quantkit/gguf/NAME-CHECKSUM/       remove it, and it is made anew

Weights that the file packs in blocks become numbers again. They are stored in the smallest type that keeps them:

    bf16    every number is one of bf16, as in files of BF16, and of F32 made from it
    fp16    no tensor loses more than 2^-11 of its norm, which is fp16's own step: Q4_1, say, is an fp16 scale times a
            whole number plus an fp16 offset; SmolLM2's worst tensor loses 0.0002 so, and 0.0014 in bf16
    fp32    all else: numbers beyond fp16's range, matrices stored in fp32, and Gemma's models, whose activations
            leave fp16's range where weights in fp16 would have them computed in it
"""

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from xxhash import xxh3_128

from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.io.files import sync, umask
from quantkit.io.gguf_header import Header, check_extents, read_header

logger = logging.getLogger(__name__)

ORIGIN = "quantkit_gguf.json"
"""In a folder that was made here: of which file, and what the conversion cost."""
_MADE = 2
"""Part of the checksum; counted up where the same file is to be made anew."""
_F32 = 0
"""The ggml type of fp32."""
_LOSS = 2**-11
"""Of a tensor's norm, at most, that fp16 may lose."""
_WIDE = "gemma"
"""Models that need bf16's range, by the beginning of their type."""
_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Vocabularies (tokenizer.ggml.pre) made from text in which every digit is a word."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How Llama 3.1 and its successors scale rotary positions, but for the factor."""
_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Of experts, which transformers' reader leaves at a config's defaults: their names in a file and in a config."""
_TURNS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Tokens that end a turn of a conversation."""


def cache_root() -> Path:
    """Where quantkit keeps what it makes of downloads: beside the hub's own."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "quantkit"


def gguf_folder(file: Path) -> Path:
    """The model folder of a GGUF file, made where it is not there yet.

    Raises:
        QuantkitError: the package gguf is missing, the file is none, damaged, one of several parts, or of a model that
            transformers' reader does not know or does not read whole; or the cache cannot be written.
    """
    root = cache_root() / "gguf"
    folder = root / f"{file.stem[:120]}-{_digest(file)}"
    if folder.is_dir():
        return folder
    header = _checked(file)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            if not folder.is_dir():  # else another process has made it meanwhile
                logger.info("converting %s, once, to %s", file, folder)
                _make(file, header, folder)
    except (OSError, SafetensorError) as error:
        raise QuantkitError(
            f"{file} cannot be converted in {root} ({first_line(error)}); HF_HOME says where that is"
        ) from error
    return folder


def _digest(file: Path) -> str:
    found = xxh3_128(seed=_MADE)
    try:
        with open(file, "rb") as content:
            while part := content.read(2**22):
                found.update(part)
    except OSError as error:
        raise QuantkitError(f"{file} cannot be read ({error.strerror})") from error
    return found.hexdigest()[:16]


def _make(file: Path, header: Header, folder: Path) -> None:
    """Makes the folder whole, or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed has left
    try:
        _convert(file, header, partial)
        for path in partial.iterdir():
            path.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
            with open(path, "rb") as written:
                os.fsync(written.fileno())
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked(file: Path) -> Header:
    """The file's header, where the file is whole and can be read here."""
    header = read_header(file)
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise QuantkitError(
            f"{file} is one of {parts} parts of a model; make one file of them with `llama-gguf-split --merge`"
        )
    if not isinstance(header.metadata.get("general.architecture"), str):
        raise CheckpointError(f"{file} does not say which architecture it holds; fetch it anew")
    if not header.tensors:
        raise CheckpointError(f"{file} holds no tensors, only a vocabulary, say; give a model's file")
    if importlib.util.find_spec("gguf") is None:
        raise QuantkitError(
            f"{file} is read by the package gguf, which is not installed (pip install 'quantkit-llm[gguf]')"
        )
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    check_extents(file, header, sizes.get)
    return header


def _convert(file: Path, header: Header, folder: Path) -> None:
    """Makes the folder; the file is read through a link with nothing beside it that transformers would read too."""
    alone = folder / "alone"
    alone.mkdir(parents=True)
    (alone / "model.gguf").symlink_to(file.resolve())
    try:
        with _quietly():
            model = _model(file, header, alone)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    except (QuantkitError, OSError):
        raise
    except Exception as error:  # transformers, tokenizers and gguf raise many kinds
        named = header.metadata["general.architecture"]
        raise QuantkitError(
            f"transformers does not read {file}, whose architecture is {named!r} ({first_line(error)}); give the "
            "model's own folder or hub id"
        ) from error
    finally:
        shutil.rmtree(alone)
    _split_digits(tokenizer, header)
    _begin(tokenizer, header)
    record = _store(file, header, model, folder)
    with _quietly():
        tokenizer.save_pretrained(folder)
    (folder / ORIGIN).write_text(json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars of transformers' reader, which cannot be turned off otherwise."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _model(file: Path, header: Header, alone: Path) -> Any:
    """The model in fp32, as transformers reads it.

    Raises:
        QuantkitError: it is not whole.
    """
    whole = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _keeps_blocks() else {}
    said = {key.partition(".")[2]: value for key, value in header.metadata.items()}
    named = str(header.metadata["general.architecture"])  # Mixtral's is Llama's, whose config has no such width
    widths = {name: said[key] for key, name in _WIDTHS.items() if key in said and named.endswith("moe")}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True, **whole, **widths
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{file} lacks {len(missing)} tensors of the model, {missing[0]} among them")
    _scale_rope(file, header, model.config)
    read = sum(tensor.numel() for tensor in _tensors(model))
    held = {name: place.elements for name, place in header.tensors.items() if not name.startswith("rope_")}
    left = sum(held.values()) - read - (held.get("output.weight", 0) if model.config.tie_word_embeddings else 0)
    if left > 0:
        raise QuantkitError(
            f"{file} holds {left:,} numbers that transformers' reader leaves out, so that another model would come of "
            "it; give the model's own folder or hub id"
        )
    return model


def _keeps_blocks() -> bool:
    """Whether this transformers can leave weights in their blocks, and has to be told not to."""
    return hasattr(transformers, "GgufConfig")


def _tensors(model: Any) -> Iterable[Tensor]:
    """The numbers of a model, those that are shared once."""
    return {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}.values()


def _scale_rope(file: Path, header: Header, config: Any) -> None:
    """Gives the config what the file says of scaled rotary positions, which transformers' reader leaves out.

    Raises:
        QuantkitError: in another way than Llama 3's, which is the one that can be told from the file's factors.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    factors = header.tensors.get("rope_freqs.weight")
    kinds = {value for key, value in header.metadata.items() if key.endswith(".rope.scaling.type")} - {"none", ""}
    named = [name for name in header.tensors if name.startswith("rope_")] + sorted(map(str, kinds))
    if not named or rope.get("rope_type", "default") != "default":
        return
    theta = rope.get("rope_theta")
    if factors is not None and len(named) == 1 and factors.kind == _F32 and theta:
        with open(file, "rb") as content:
            content.seek(factors.offset)
            found = torch.frombuffer(bytearray(content.read(4 * factors.elements)), dtype=torch.float32)
        if torch.allclose(found, torch.ones_like(found)):
            return
        factor = round(float(found.max()), 3)
        if torch.allclose(found, llama3_factors(theta, found.numel(), factor), rtol=1e-3):
            config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}
            return
    raise QuantkitError(
        f"{file} scales its rotary positions ({', '.join(named[:3])}), which transformers' reader leaves out; give the "
        "model's own folder or hub id"
    )


def llama3_factors(theta: float, count: int, factor: float) -> Tensor:
    """By what Llama 3.1 and its successors divide the frequencies of rotary positions.

    Waves that turn four times or more in the 8,192 positions of the first training stay as they are, those that never
    turn whole are divided by the factor, and those between by a part of it.

    Args:
        theta: base of the frequencies.
        count: of frequencies, half the width of a head.
        factor: of long waves, 8 for Llama 3.1 and 32 for the small ones of 3.2.

    Returns:
        fp32 [count].
    """
    waves = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kept = ((LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def _begin(tokenizer: Any, header: Header) -> None:
    """Has texts begin with the file's token, and sets the padding, as transformers does from 5.18 on."""
    from tokenizers import processors

    places = header.metadata.get("tokenizer.ggml.bos_token_id"), header.metadata.get("tokenizer.ggml.padding_token_id")
    first, padding = (tokenizer.convert_ids_to_tokens(place) if isinstance(place, int) else None for place in places)
    if tokenizer.pad_token is None and padding is not None:
        tokenizer.pad_token = padding
    if first is None or not header.metadata.get("tokenizer.ggml.add_bos_token"):
        return
    if tokenizer("a")["input_ids"][:1] != [places[0]]:
        template = processors.TemplateProcessing(f"{first} $A", f"{first} $A {first} $B", [(first, places[0])])
        before = tokenizer.backend_tokenizer.post_processor
        both = template if before is None else processors.Sequence([before, template])
        tokenizer.backend_tokenizer.post_processor = both


def _split_digits(tokenizer: Any, header: Header) -> None:
    """Every digit is a word in some vocabularies; transformers' reader splits their text as GPT-2 does.

    That differs for spaces in front of digits alone: "a  1" has a token of two spaces in the model's own tokenizer.
    """
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.pre") in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def choose_dtype(tensors: Iterable[Tensor], may_round: bool) -> tuple[torch.dtype, dict[str, float]]:
    """The smallest type that keeps a model's numbers.

    Args:
        tensors: fp32, of any shapes.
        may_round: whether fp16 may round them, by 2^-11 of a tensor's norm; or else only hold them as they are.

    Returns:
        The type, and of fp16 and bf16 the largest relative error of a tensor (inf where one leaves fp16's range).
    """
    error = {torch.bfloat16: 0.0, torch.float16: 0.0}
    for tensor in tensors:
        norm = _norm(tensor)
        for dtype in error:
            lost = _norm(tensor - tensor.to(dtype).float())  # inf where a number overflows
            relative = lost / norm if lost else 0.0
            error[dtype] = max(error[dtype], relative if math.isfinite(relative) else math.inf)
    if error[torch.bfloat16] == 0:
        chosen = torch.bfloat16
    else:
        chosen = torch.float16 if error[torch.float16] <= (_LOSS if may_round else 0) else torch.float32
    return chosen, {str(dtype).removeprefix("torch."): value for dtype, value in error.items()}


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _store(file: Path, header: Header, model: Any, folder: Path) -> dict[str, Any]:
    """Saves the model as any model is saved; gives what is to be known of the conversion.

    What transformers has read knows that it comes from GGUF, and does not let itself be saved: a clean model takes its
    tensors over.
    """
    matrices = {place.kind for place in header.tensors.values() if len(place.shape) > 1}
    dtype, error = choose_dtype(_tensors(model), may_round=matrices != {_F32})
    config = type(model.config).from_dict(model.config.to_dict())
    if dtype == torch.float16 and config.model_type.startswith(_WIDE):
        dtype = torch.float32
    for attribute in ("_model_name_or_path", "quantization_config"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    with torch.device("meta"):
        clean: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # one at a time: the model is not in memory twice
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    ends = [config.eos_token_id, *(header.metadata.get(key) for key in _TURNS)]
    ends = [token for token in dict.fromkeys(ends) if isinstance(token, int)]
    if len(ends) > 1:
        clean.generation_config.eos_token_id = ends
    with _quietly():
        clean.save_pretrained(folder)
    named = str(dtype).removeprefix("torch.")
    logger.info("stored as %s, which loses %.1g of a tensor's norm at most", named, error.get(named, 0))
    return {
        "file": file.name,
        "bytes": header.nbytes,
        "dtype": named,
        "relative_error": error,
        "transformers": transformers.__version__,
    }
