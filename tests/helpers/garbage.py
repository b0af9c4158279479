"""Garbage in the shape of what a file should hold, drawn by hypothesis."""

import json

from hypothesis import settings
from hypothesis import strategies as st

from quantkit.core.errors import QuantkitError
from quantkit.evals.fuzz_damage import changed_tree

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
"""Examples that take seconds, the same each time."""
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
"""Any JSON."""
raw = st.binary(max_size=60) | st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b"\xff\xfe{"])
"""Any bytes, and JSON that is too deep for a parser or for a reader."""


def changed(tree):
    """JSON text of a tree with some values replaced, left out, renamed or nested; or something else altogether."""
    shaped = st.randoms(use_true_random=False).map(lambda draw: changed_tree(tree, draw)[0])
    return (shaped | shaped | shaped | values).map(lambda value: json.dumps(value).encode()) | raw


def refused(function, *arguments):
    """Whether a call ends in an error of one printable line; its result where it ends in none."""
    try:
        return False, function(*arguments)
    except QuantkitError as error:
        assert str(error).isprintable() and 10 < len(str(error)) < 1500, error
        return True, None
