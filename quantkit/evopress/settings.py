"""Settings of the evolutionary search, apart from what carries it out, which imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.core.errors import QuantkitError

Rule = Literal["any", "size"]
CANDIDATES = "gptq(2), gptq(3), gptq(4), gptq(5), gptq(6), gptq(8)"
"""Ways to pack a layer, unless others are given."""


@dataclass(frozen=True)
class Evolution:
    """The search's settings.

    Attributes:
        generations: of the search.
        offspring: drawn in each.
        stages: (survivors, tokens) of each selection; the last has one survivor.
        switches: most switches of an offspring; their number is the lesser of two draws from 1 to that.
        rule: see `quantkit.evopress.evolve`.
    """

    generations: int = 100
    offspring: int = 16
    stages: tuple[tuple[int, int], ...] = ((4, 2048), (2, 8192), (1, 16384))
    switches: int = 3
    rule: Rule = "any"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise QuantkitError(f"rule={self.rule!r}: known rules are {', '.join(get_args(Rule))}")
        for name in ("offspring", "switches"):
            if getattr(self, name) < 1:
                raise QuantkitError(f"{name}={getattr(self, name)}: give at least 1")
        if self.generations < 0:
            raise QuantkitError(f"generations={self.generations}: give none (0) or more")
        survivors = [count for count, _ in self.stages]
        if (
            min((tokens for _, tokens in self.stages), default=0) < 1
            or survivors[-1] != 1
            or min(survivors) < 1
            or survivors != sorted(survivors, reverse=True)
        ):
            raise QuantkitError(f"stages={self.stages}: survivors must fall to 1, such as ((4, 2048), (1, 16384))")


def stages_text(stages: Iterable[tuple[int, int]]) -> str:
    """Stages as `parse_stages` reads them."""
    return ",".join(f"{survivors}x{tokens}" for survivors, tokens in stages)


def parse_stages(text: str) -> tuple[tuple[int, int], ...]:
    """Stages in words: "4x2048,2x8192,1x16384", survivors x tokens.

    Raises:
        QuantkitError: it is none.
    """
    try:
        pairs = [part.split("x") for part in text.split(",")]
        return tuple((int(survivors), int(tokens)) for survivors, tokens in pairs)
    except ValueError as error:
        raise QuantkitError(
            f"{text!r} are no stages; write survivors x tokens, such as 4x2048,2x8192,1x16384"
        ) from error
