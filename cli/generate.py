"""`quantkit generate`: text from a model, with its KV cache compressed if asked for."""

import sys
import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from quantkit.cli import options
from quantkit.cli.loading import subject
from quantkit.cli.voice import Voice, voice
from quantkit.core.errors import Interrupted, QuantkitError
from quantkit.core.units import size


def generate_command(
    model: options.Subject,
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; by default what comes on standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, more draws.")] = 0,
    kv_bits: options.KvBits = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: options.Device = "auto",
    unpack: options.Unpack = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation; by default float32 on a CPU.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
) -> None:
    """Generate text; --kv-bits compresses the cache meanwhile. Speed and cache are told on standard error."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise QuantkitError("the prompt is empty; give --prompt or text on standard input")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise QuantkitError("--prompt is not UTF-8") from None
    options.check_generation(max_new_tokens, temperature)
    import torch
    from transformers import TextStreamer

    from quantkit.kvcache.attention import compressed_kv
    from quantkit.kvcache.cache import cache_argument
    from quantkit.models.structure import context_length
    from quantkit.serve.chat import check_template, rendered

    loaded, tokenizer = subject(model, device, dtype, unpack, check_template if chat else lambda _tokenizer: None)
    if chat:
        text = rendered(tokenizer, [{"role": "user", "content": text}])
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False).to(loaded.device)
    tokens, context = inputs["input_ids"].shape[1], context_length(loaded)
    if context is not None and tokens + max_new_tokens > context:
        raise QuantkitError(f"{tokens} tokens of prompt and {max_new_tokens} new ones exceed the context of {context}")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    caching = nullcontext(lambda: None) if kv_bits is None else compressed_kv(loaded, bits=kv_bits)
    try:
        with caching as make_cache:
            cache: Any = make_cache()
            begun = time.monotonic()
            settings[cache_argument(loaded)] = cache
            found = loaded.generate(**inputs, streamer=streamer, pad_token_id=0, **settings)
            seconds = time.monotonic() - begun
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
    made = found.shape[1] - tokens
    if voice() == Voice.QUIET:
        return
    notes = Console(stderr=True, highlight=False)
    notes.print(f"{tokens} + {made} tokens in {seconds:.1f} s, {made / seconds:.1f} new ones a second")
    if cache is not None:
        notes.print(f"KV cache: {size(cache.nbytes)}, {cache.bits_per_element:.2f} bits a number, every byte counted")
