"""Errors quote what files hold, and stay one line that every terminal can print."""

import pytest

from quantkit.core.errors import LONGEST, CheckpointError, QuantkitError, UnknownName


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\r\n and\ttabs", "two lines and tabs"),
        ("half \ud800 a pair", "half \\ud800 a pair"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("turned \u202e round", "turned \\u202e round"),
        ("a paragraph\u2029ends", "a paragraph ends"),
        ("plain: é 中 💥", "plain: é 中 💥"),
    ],
)
def test_one_printable_line(text, shown):
    for kind in (QuantkitError, CheckpointError):
        assert str(kind(text)) == shown
        assert shown.encode()


def test_the_middle_of_a_long_one_is_left_out():
    text = str(UnknownName("format", "x" * 10_000, ["int_group"]))
    assert len(text) <= LONGEST
    assert text.startswith("unknown format 'xxx") and text.endswith("Known: int_group")
