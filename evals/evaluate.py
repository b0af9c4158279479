"""A model measured on held-out text, from a folder or in memory: what `quantkit eval` and `quantkit.evaluate` do."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.core.device import compute_dtype, parse_dtype, pick_device
from quantkit.core.errors import QuantkitError
from quantkit.core.products import full_width
from quantkit.evals import perplexity
from quantkit.evals.activations import ActivationCode, Observed, quantized_activations
from quantkit.evals.kv_prefix import compressed_prefix
from quantkit.evals.kv_quality import retrieval
from quantkit.evals.perplexity import Quality, Stopped
from quantkit.io.checkpoint import read_config
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.kvcache.config import KVCacheConfig
from quantkit.models.structure import check_vocabulary, context_length
from quantkit.run.documents import documents
from quantkit.run.recipe import sequence_length
from quantkit.run.text import evaluation_text


@dataclass(frozen=True)
class CacheTest:
    """How a compressed KV cache is measured beside the model.

    Attributes:
        config: of the cache.
        prefix: tokens of every sequence whose cache is compressed; the rest is scored. None for three quarters.
        retrieval: so many documents of key-value pairs whose values are looked up from that cache; 0 for none.
    """

    config: KVCacheConfig
    prefix: int | None = None
    retrieval: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        quality: perplexity, and with a baseline what differs from it.
        settings: on what: model, data, seqlen, stride, bos (whether every sequence begins with it), baseline.
        activations: of quantized activations: their code, measured bits, relative error, layers; or None.
        kv_cache: of a compressed cache: its measured bits per element, prefix, retrieval by depth; or None.
    """

    quality: Quality
    settings: dict[str, Any]
    activations: dict[str, Any] | None = None
    kv_cache: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return {**self.settings, "activations": self.activations, "kv_cache": self.kv_cache, **asdict(self.quality)}


@full_width()
def evaluate(
    model: PreTrainedModel | str | Path,
    data: str = "wikitext2",
    *,
    tokenizer: Any = None,
    seqlen: int | None = None,
    stride: int | None = None,
    baseline: PreTrainedModel | str | Path | None = None,
    num_samples: int | None = None,
    bos: bool = True,
    activations: ActivationCode | None = None,
    cache: CacheTest | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    unpack: bool | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Measures a model on held-out text: perplexity, and with a baseline KL, top-1 agreement and flips.

    Args:
        model: a transformers model, or a folder or hub id of a packed checkpoint or of any causal language model.
        data: "wikitext2", "c4", "stdlib" (offline), a .txt or .jsonl file, or a hub id.
        tokenizer: of a model in memory.
        seqlen: tokens a sequence; None for 2048, or the model's context where that is shorter.
        stride: tokens between sequences; None for `seqlen`.
        baseline: full-precision model to compare with; with `cache` by default the model with an exact cache.
        num_samples: stop after so many sequences.
        bos: begin every sequence with the BOS token that the tokenizer adds, if it adds one.
        activations: code of what the decoder blocks' linear layers read; see `evals.activations.activation_code`.
        cache: of a compressed KV cache; None for an exact one.
        device, dtype, unpack: of models that are loaded here; see `quantkit.load`. By default a GPU if there is one,
            and float32 on a CPU.
        progress: called with (sequences done, sequences in all).

    Returns:
        The figures, with standard errors over sequences.

    Raises:
        QuantkitError: bad input; the message says what would work.
        Stopped: on Ctrl-C, once a sequence is measured; its `measured` is an `Evaluation` of those that are.
    """
    where, kind = pick_device(device), parse_dtype(dtype)
    tokenizer = tokenizer_of(model, tokenizer)
    text = evaluation_text(documents(data, "evaluation", tokenizer), tokenizer, bos)
    subject = loaded(model, where, kind, unpack=unpack)
    reference = None if baseline is None else loaded(baseline, where, kind)
    for one in (subject, reference):
        if one is not None:
            check_vocabulary(text.tokens, one)
    length = sequence_length(seqlen, context_length(subject))
    prefix = _prefix(cache, length)
    compared = "with an exact cache" if cache is not None and baseline is None else named(baseline)
    coding = nullcontext() if activations is None else quantized_activations(subject, activations)
    caching = nullcontext(subject) if cache is None else compressed_prefix(subject, cache.config, prefix)
    stopped = False
    with coding as observed, caching as reader:
        try:
            quality = perplexity.evaluate(
                reader, text, length, stride=stride, prefix=prefix, num_samples=num_samples,
                baseline=subject if cache is not None and reference is None else reference, progress=progress,
            )  # fmt: skip
        except Stopped as error:
            quality, stopped = error.measured, True
    coded = None if observed is None else _activations(activations, observed)
    cached: dict[str, Any] | None = None
    if cache is not None:
        cached = {"bits": cache.config.k_bits, "prefix": prefix, "bits_per_element": reader.bits}
        cached |= {} if stopped else _retrieved(cache, subject, tokenizer)
    settings = {"model": named(model), "data": data, "seqlen": length, "stride": stride or text.body(length)}
    found = Evaluation(quality, settings | {"bos": text.bos is not None, "baseline": compared}, coded, cached)
    if stopped:
        raise Stopped(found)
    return found


def tokenizer_of(model: PreTrainedModel | str | Path, given: Any) -> Any:
    """The tokenizer beside a model in a folder, or the one given with a model in memory."""
    if not isinstance(model, PreTrainedModel):
        folder = resolve_folder(model)
        read_config(folder)  # the tokenizer reads it too, and blames itself
        return load_tokenizer(folder)
    if given is None:
        raise QuantkitError("a model in memory is measured with its tokenizer; give `tokenizer`")
    return given


def loaded(
    asked: PreTrainedModel | str | Path, device: torch.device, dtype: torch.dtype | None, **settings: Any
) -> PreTrainedModel:
    """A model in memory as it is, another loaded in `dtype`, by default float32 on a CPU; see `quantkit.load`."""
    if isinstance(asked, PreTrainedModel):
        return asked
    kind = dtype or compute_dtype(device) or "auto"
    return load(resolve_folder(asked), dtype=kind, device=device, **settings).eval()


def _activations(code: ActivationCode | None, observed: Observed) -> dict[str, Any]:
    """What was seen of quantized activations."""
    return {
        "code": repr(code),
        "bits_per_activation": observed.bits_per_activation,
        "relative_error": observed.relative_error,
        "layers": observed.layers,
        "layers_reached": len(observed.reached),
    }


def _prefix(cache: CacheTest | None, length: int) -> int:
    """How many of a sequence's tokens are cached in compressed form."""
    if cache is None:
        return 0
    prefix = length * 3 // 4 if cache.prefix is None else cache.prefix
    if prefix < cache.config.buffer:
        raise QuantkitError(
            f"`kv_prefix` {prefix}: the newest {cache.config.buffer} tokens are not compressed, give at least as many"
        )
    return prefix


def _retrieved(cache: CacheTest, model: PreTrainedModel, tokenizer: Any) -> dict[str, list[float]]:
    """The fraction of values found, by depth, from the compressed and from the exact cache."""
    if not cache.retrieval:
        return {}
    tested = {"retrieval": cache.config, "retrieval_exact": KVCacheConfig(16, 16)}
    return {name: retrieval(model, tokenizer, config, cache.retrieval) for name, config in tested.items()}


def named(model: PreTrainedModel | str | Path | None) -> str | None:
    """What to call a model."""
    if isinstance(model, PreTrainedModel):
        return getattr(model.config, "_name_or_path", "") or type(model).__name__
    return None if model is None else str(model)
