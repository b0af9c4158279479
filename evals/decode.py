"""End-to-end generation speed: time to the first token, seconds a token after it, memory, and the ideal beside them.

Decoding one token reads every weight once, so its ideal time is the bytes that a token needs (packed and dense
weights but for the embedding's rows, and the cache) over the memory's measured copy bandwidth.

On a GPU a token is one replay of a CUDA graph over a static cache; where a model cannot be captured, and on a CPU, it
is one call of the model.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from quantkit.core.errors import QuantkitError
from quantkit.kernels.timing import copy_bandwidth, timed
from quantkit.kvcache.cache import GearCache, cache_argument
from quantkit.models.embedding import QuantizedEmbedding
from quantkit.models.structure import context_length, tensor_bytes


@dataclass(frozen=True)
class Decoding:
    """What a run of generation cost.

    Attributes:
        prompt_tokens, new_tokens: of the run.
        first_token_seconds: from the prompt to the first new token.
        token_seconds: median of the tokens after it.
        tokens_per_second: 1 / token_seconds.
        ideal_token_seconds: bytes_per_token / bandwidth.
        bytes_per_token: weights and cache that a token reads.
        bandwidth: measured by copying, bytes read and written a second.
        peak_bytes: of GPU memory; on a CPU the model's tensors.
        how: "CUDA graph" or "eager".
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    token_seconds: float
    tokens_per_second: float
    ideal_token_seconds: float
    bytes_per_token: int
    bandwidth: float
    peak_bytes: int
    how: str


@torch.inference_mode()
def measure(
    model: Any, prompt_tokens: int, new_tokens: int, seed: int = 0, make_cache: Callable[[], Any] | None = None
) -> Decoding:
    """Generates from random tokens, greedily.

    Args:
        model: a causal language model in evaluation mode.
        prompt_tokens: at least 1.
        new_tokens: at least 2, the first of which is the prompt's.
        seed: of the prompt.
        make_cache: makes an empty cache; None for a plain one.

    Raises:
        QuantkitError: more tokens than the model's context holds, or too few to measure.
    """
    context = context_length(model)
    if prompt_tokens < 1 or new_tokens < 2:
        raise QuantkitError(f"{prompt_tokens} prompt and {new_tokens} new tokens: use at least 1 and 2")
    if context is not None and prompt_tokens + new_tokens > context:
        raise QuantkitError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's context of {context}"
        )
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model(prompt[:, :1], use_cache=False)  # compiles, and allocates what is allocated once
    cache, other = (make_cache() if make_cache else _cache(model, prompt_tokens + more) for more in (new_tokens + 8, 8))
    name = cache_argument(model)
    model(prompt, **{name: other}, use_cache=True, logits_to_keep=1)
    first, token = timed(device, lambda: _next(model(prompt, **{name: cache}, use_cache=True, logits_to_keep=1)))

    def step() -> None:
        token.copy_(_next(model(token, **{name: cache}, use_cache=True)))

    # A sliding window's static cache counts its tokens on the host, where a graph would not see them grow.
    fixed = (
        device.type == "cuda"
        and make_cache is None
        and not any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    )
    run, how = (_captured(step) if fixed else None) or step, "eager"
    if run is not step:
        how = "CUDA graph"
    times = [timed(device, run)[0] for _ in range(new_tokens - 1)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else tensor_bytes(model)
    seconds, bandwidth = statistics.median(times), copy_bandwidth(device)
    needed = bytes_per_token(model) + _cache_bytes(cache)
    return Decoding(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        first_token_seconds=first,
        token_seconds=seconds,
        tokens_per_second=1 / seconds,
        ideal_token_seconds=needed / bandwidth,
        bytes_per_token=needed,
        bandwidth=bandwidth,
        peak_bytes=peak,
        how=how,
    )


def _cache(model: Any, length: int) -> Any:
    if model.device.type == "cuda":
        return StaticCache(model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def _next(output: Any) -> torch.Tensor:
    return output.logits[:, -1:].argmax(-1)


def _captured(step: Any) -> Any:
    """The step as a CUDA graph, or None where it cannot be captured (some models wait for the GPU in between)."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return None
    return graph.replay


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of the tensors that decoding one token reads: all but an embedding that is not also the head."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    total = tensor_bytes(model)
    if isinstance(embedding, QuantizedEmbedding):
        return total if embedding.head is not None else total - embedding.packed.nbytes
    if head is None or head._parameters.get("weight") is not embedding.weight:
        total -= embedding.weight.numel() * embedding.weight.element_size()
    return total


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds, of tokens that it has seen."""
    if isinstance(cache, GearCache):
        return cache.nbytes
    total = 0
    for layer in getattr(cache, "layers", []):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                seen = min(int(layer.get_seq_length()), tensor.shape[2])
                total += tensor.nbytes * seen // max(tensor.shape[2], 1)
    return total
