"""What several verbs share: options of the same meaning, and how processes that share work begin.

Here as in the verbs' own files nothing that takes long to import is imported before a verb runs: `--help` needs none of
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

import typer

from quantkit.core.errors import QuantkitError

T = TypeVar("T")
ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",  # torch, huge pages on a CPU: a lower, steadier peak, no slower
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""What a verb has in its environment where nobody has said otherwise.

The last two bound what torch keeps on a CPU of products by the shapes that they had, 1024 of either by default: experts
see another number of tokens each time, and a shape takes most of a megabyte.
"""
TEXTS = "wikitext2, c4, stdlib (offline), a .txt or .jsonl file, or a hub dataset id."

Model = Annotated[str, typer.Argument(help="Folder of a transformers model, its id on the hub, or a GGUF file.")]
Subject = Annotated[
    str, typer.Argument(help="Folder, hub id or GGUF file: a packed checkpoint or any causal language model.")
]
Text = Annotated[str, typer.Option(help=TEXTS)]
NumSamples = Annotated[int, typer.Option(help="Calibration sequences.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens a sequence; by default 2048 or the model's context.")]
Shift = Annotated[float, typer.Option("--target-shift", help="0 (off) to 1: aim at the full-precision output.")]
Fisher = Annotated[
    bool | None,
    typer.Option(
        "--fisher/--no-fisher",
        help="Weigh tokens and outputs by how much predictions feel them, for a pass back through the model; by "
        "default where trellis codes are made (in a search: where its base makes them).",
    ),
]
AllExperts = Annotated[
    bool,
    typer.Option(
        "--all-experts", help="Gather the statistics of a mixture's experts from all tokens, not from those it gets."
    ),
]
ExpertsBits = Annotated[float | None, typer.Option(help="Bits of a mixture's experts; by default those of all layers.")]
HeadBits = Annotated[
    int | None, typer.Option(help="Pack the head (GPTQ) and the input embedding too, at 1 to 8 bits; dense by default.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output or unfinished run.")]
Unpack = Annotated[
    bool | None,
    typer.Option(
        "--unpack/--no-unpack",
        help="On a CPU, unpack packed layers once; by default those that are faster so, as far as memory allows.",
    ),
]


def _of_a_cache(bits: int | None) -> int | None:
    if bits is not None:
        from quantkit.kvcache.config import WIDTHS

        if bits not in WIDTHS:
            raise QuantkitError(f"--kv-bits {bits}: a cache has 2, 3, 4 or 8 bits, or 16 for none")
    return bits


KvBits = Annotated[
    int | None,
    typer.Option(
        callback=_of_a_cache,
        help="Compress the KV cache (GEAR) to codes of 2, 3, 4 or 8 bits; 16 leaves it as it is.",
        rich_help_panel="KV cache",
    ),
]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what the run would make and need.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def check_generation(max_new_tokens: int, temperature: float | None) -> None:
    """Raises QuantkitError where text cannot be written like that."""
    if max_new_tokens < 1 or not 0 <= (temperature or 0) < float("inf"):
        raise QuantkitError("give --max-new-tokens of at least 1 and a --temperature of at least 0")


def is_first_process() -> bool:
    """Whether this process prints, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Of the processes that torchrun or accelerate started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def by_all(work: Callable[[], T], device: str, alone: bool = False) -> T:
    """What each process does before the run; where one of several cannot do it, its error is said once, and ends all.

    Args:
        work: what is to be done.
        device: of the run.
        alone: others are not waited for.
    """
    if alone or process_count() == 1:
        return work()
    from quantkit.run.processes import together

    return together(device)[0].alike(work)


def own_settings(context: typer.Context, method: str, known: Collection[str]) -> dict[str, Any]:
    """A method's settings from the options that a verb does not know by itself.

    Args:
        context: of the verb; what it left over is --name value, --name=value, --name or --no-name.
        method: whose settings they are to be.
        known: settings that the verb has options for.

    Raises:
        QuantkitError: no setting of the method's, or words that belong to no option.
    """
    if not context.args:
        return {}
    from dataclasses import fields

    from quantkit.core import spec
    from quantkit.core.registry import resolve

    own = set() if "(" in method else {entry.name for entry in fields(resolve(spec.GROUP, method))} - set(known)
    found: dict[str, Any] = {}
    left = list(context.args)
    while left:
        word, given, value = left.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and name.removeprefix("no_") in own
        name = name.removeprefix("no_") if negated else name
        if not word.startswith("--") or name not in own:
            options = {option for parameter in context.command.params for option in parameter.opts}
            raise QuantkitError(_unknown(word, method, options | {f"--{entry.replace('_', '-')}" for entry in own}))
        if given:
            found[name] = _literal(value)
        elif negated or not left or left[0].startswith("--"):
            found[name] = not negated
        else:
            found[name] = _literal(left.pop(0))
    return found


def _unknown(word: str, method: str, options: Collection[str]) -> str:
    import difflib

    if not word.startswith("--"):
        return f"{word!r} belongs to no option; `quantkit quantize --help` lists them"
    close = difflib.get_close_matches(word, sorted(options), n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `quantkit quantize --help` lists them"
    return f"there is no option {word}, and {method} has no such setting{hint}"


def _literal(text: str) -> Any:
    """A number, a truth value, or else the word itself."""
    import ast

    if text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
