"""Key-value recall: short documents whose only learnable part is looking an earlier line up.

    # recall
    mozuk = 4821
    tarel = 1930
    # query
    tarel -> 1930

Keys and values are random, so nothing but attention to the definition can predict an answer. A
model trained on these shows whether its KV cache still holds what was written into it.
"""

import random
from dataclasses import dataclass

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


@dataclass(frozen=True)
class RecallDocument:
    """One generated document and where its answers stand.

    Attributes:
        text: the document.
        answers: (start, end) character positions of each answer's value in `text`, in order.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def recall_document(rng: random.Random, pairs: int, queries: int) -> RecallDocument:
    """Makes a document of `pairs` definitions followed by `queries` look-ups in random order."""
    keys: list[str] = []
    while len(keys) < pairs:
        key = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(2))
        key += rng.choice(_CONSONANTS)
        if key not in keys:
            keys.append(key)
    values = {key: str(rng.randrange(1000, 10000)) for key in keys}
    text = "# recall\n" + "".join(f"{key} = {values[key]}\n" for key in keys) + "# query\n"
    answers = []
    for key in rng.choices(keys, k=queries):
        text += f"{key} -> "
        answers.append((len(text), len(text) + len(values[key])))
        text += f"{values[key]}\n"
    return RecallDocument(text, tuple(answers))
