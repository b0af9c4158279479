"""A packed model as the draft of another: how many of its tokens are accepted, and what that is worth in time.

    python -m quantkit.evals.speculation TARGET DRAFT [DRAFT ...] --data TEXT [--drafts 3] [--output JSON]

The draft writes a few tokens, the target reads them at once and keeps those that it would have written itself
(Leviathan et al., arXiv 2211.17192), here the likeliest ones: the text is the target's own, which is checked. It runs
by transformers' `generate(assistant_model=...)`, from places of held-out text. Three figures say the same in different
words:

    accepted        of all tokens that were drafted, those that were kept
    alike           of drafted tokens that all before them were kept of, those that were kept: how often both models
                    would write the same token next
    tokens a step   what one pass of the target gives: the tokens kept and the one after them
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from quantkit.core.device import pick_device
from quantkit.core.errors import QuantkitError
from quantkit.evals.machine import cpu_name, name_of, versions
from quantkit.io.hf import load, resolve_folder
from quantkit.io.source import load_tokenizer
from quantkit.run.documents import documents
from quantkit.run.text import evaluation_text


@dataclass(frozen=True)
class Speculation:
    """Figures of one draft.

    Attributes:
        accepted, alike, tokens_per_step: see above.
        drafted: tokens in all.
        same_text: whether the target wrote what it writes alone, but for prompts where two tokens were as likely.
        seconds, seconds_alone: of all prompts, with the draft and without.
    """

    accepted: float
    alike: float
    tokens_per_step: float
    drafted: int
    same_text: float
    seconds: float
    seconds_alone: float


@contextmanager
def _steps(found: list[tuple[int, int]]) -> Iterator[None]:
    """While it lasts, each step of assisted generation leaves (drafted, accepted) in `found`."""
    told = AssistedCandidateGenerator.update_candidate_strategy

    def update(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
        found.append((scores.shape[1] - 1, int(num_matches)))
        return told(self, input_ids, scores, num_matches)  # type: ignore[arg-type]

    with patch.object(AssistedCandidateGenerator, "update_candidate_strategy", update):
        yield


@torch.no_grad()
def measure(target: Any, draft: Any, prompts: Tensor, new_tokens: int, drafts: int) -> Speculation:
    """Writes on from prompts with a draft and without.

    Args:
        target, draft: models with one vocabulary, on one device.
        prompts: int64 [prompts, tokens].
        new_tokens: written after each prompt.
        drafts: tokens that are drafted in each step.

    Raises:
        QuantkitError: the vocabularies differ.
    """
    if draft.config.get_text_config().vocab_size != target.config.get_text_config().vocab_size:
        raise QuantkitError("target and draft have different vocabularies; a draft is a pack of the same model")
    draft.generation_config.num_assistant_tokens = drafts
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    common = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    steps: list[tuple[int, int]] = []
    seconds, alone, same = 0.0, 0.0, 0
    for prompt in prompts:
        ids = prompt[None].to(target.device)
        begun = time.monotonic()
        plain = target.generate(ids, **common)
        between = time.monotonic()
        with _steps(steps):
            helped = target.generate(ids, assistant_model=draft, **common)
        alone, seconds = alone + between - begun, seconds + time.monotonic() - between
        same += bool(torch.equal(plain, helped))
    drafted, accepted = (sum(step[i] for step in steps) for i in (0, 1))
    asked = sum(min(kept + 1, made) for made, kept in steps)
    return Speculation(
        accepted / drafted, accepted / asked, len(prompts) * new_tokens / len(steps), drafted, same / len(prompts),
        seconds, alone,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("target")
    made.add_argument("draft", nargs="+")
    made.add_argument("--data", default="wikitext2")
    made.add_argument("--prompts", type=int, default=16)
    made.add_argument("--prompt-tokens", type=int, default=128)
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--drafts", type=int, default=3)
    made.add_argument("--device", default="auto")
    made.add_argument("--output", type=Path)
    return made


def main() -> None:
    """Measures all drafts of one target."""
    arguments = parser().parse_args()
    device = pick_device(arguments.device)
    text = evaluation_text(documents(arguments.data, "evaluation"), load_tokenizer(resolve_folder(arguments.target)))
    count = min(arguments.prompts, len(text.tokens) // arguments.prompt_tokens)
    apart = len(text.tokens) // count
    prompts = torch.stack([text.tokens[i * apart :][: arguments.prompt_tokens] for i in range(count)])
    target, rows = load(arguments.target, dtype=torch.float32, device=device).eval(), []
    print("| draft | accepted | alike | tokens a step | the target's own text | time / alone |")
    print("|---" * 6 + "|")
    for name in arguments.draft:
        draft = load(name, dtype=torch.float32, device=device).eval()
        found = measure(target, draft, prompts, arguments.new_tokens, arguments.drafts)
        where = {"target": name_of(arguments.target), "draft": name_of(name), "data": name_of(arguments.data)}
        rows.append(where | asdict(found) | {"ratio": found.seconds / found.seconds_alone})
        print(
            f"| {name_of(name)} | {found.accepted:.1%} | {found.alike:.1%} | {found.tokens_per_step:.2f} | "
            f"{found.same_text:.0%} | {found.seconds / found.seconds_alone:.2f} |",
            flush=True,
        )
    if arguments.output:
        _write(arguments, count, rows)


def _write(arguments: argparse.Namespace, prompts: int, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, beside those of other models that the file has already."""
    settings = {name: getattr(arguments, name) for name in ("prompt_tokens", "new_tokens", "drafts")}
    record = {"machine": cpu_name(), "versions": versions(), "prompts": prompts} | settings
    before = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    made = {(row["target"], row["draft"]) for row in rows}
    kept = [row for row in before if (row["target"], row["draft"]) not in made]
    arguments.output.write_text(json.dumps(record | {"rows": [*kept, *rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
