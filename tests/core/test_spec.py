"""Quantizers in words: every one is read as it was written, and what is none is refused in a line."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid, TargetShift, Trellis
from quantkit.core import registry, spec
from quantkit.core.errors import QuantkitError
from quantkit.quantizers.sparse import Sparse

TEXTS = {
    "gptq(3)": GPTQ(3),
    "gptq(4, group_size=64, symmetric=False)": GPTQ(4, 64, symmetric=False),
    "pyramid(2.5)": Pyramid(2.5),
    "trellis(3, state_bits=10, axis='in')": Trellis(3, 10, axis="in"),
    "hadamard(vptq(2, outliers=0.01))": Hadamard(VPTQ(2, outliers=0.01)),
    "low_rank(gptq(2), 4)": LowRank(GPTQ(2), 4),
    "target_shift(hadamard(low_rank(rtn(3, group_size=64), 3, adapter_bits=8)), 0.7)": TargetShift(
        Hadamard(LowRank(RTN(3, 64), 3, adapter_bits=8)), 0.7
    ),
    "sparse(0.5)": Sparse(0.5),
}


@pytest.mark.parametrize("text", TEXTS)
def test_written_and_read(text):
    assert spec.read(text) == TEXTS[text]
    assert spec.read(spec.write(TEXTS[text])) == TEXTS[text]


def test_the_shortest_text_is_written():
    assert spec.write(GPTQ(4)) == "gptq(4)", "bits, though 4 is the default"
    assert spec.write(Pyramid(2.0)) == "pyramid(2)"
    assert spec.write(Hadamard(VPTQ(2.0))) == "hadamard(vptq(2))"
    assert spec.read("gptq") == GPTQ() and spec.read("gptq(bits=3.0)").bits == 3
    assert spec.read("gptq(3, order=group)") == GPTQ(3)


def test_several_are_read_once_each():
    assert spec.read_several("gptq(2), hadamard(pyramid(2.5)), gptq(2)") == [GPTQ(2), Hadamard(Pyramid(2.5))]
    assert spec.read_several("gptq(2)") == [GPTQ(2)]
    with pytest.raises(QuantkitError, match="several quantizers"):
        spec.read("gptq(2), gptq(3)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq(3, groupsize=64)", "no setting 'groupsize'.*did you mean 'group_size'"),
        ("gptq(3, bits=2)", "given bits twice"),
        ("gptq(3, group_size=64, group_size=32)", "given group_size twice"),
        ("gptq(3, 64, True, True, 'group', 0.1, 128, 5)", "has 7 settings"),
        ("gptq(1 + 1)", "'1 \\+ 1' is no value"),
        ("gptq(11)", "1 to 8 bits"),
        ("hadamard(3)", "wraps a method, and 3 is none"),
        ("hadamard()", "hadamard needs inner"),
        ("gptq:3", "no quantizer; write"),
        ("gptq(3", "no quantizer; write"),
        ("gptq(3)(2)", "no quantizer; write"),
        ("a.b(3)", "no quantizer; write"),
        ("gptq(*[3])", "no quantizer; write"),
        ("gptq(**{})", "no quantizer; write"),
        ("", "no quantizer; write"),
        ("3", "no quantizer; write"),
    ],
)
def test_what_is_none_is_refused(text, message):
    with pytest.raises(QuantkitError, match=message):
        spec.read(text)


def test_nothing_is_called_but_methods():
    for text in ("__import__('os').system('true')", "exec('1')", "gptq(__import__('os'))"):
        with pytest.raises(QuantkitError):
            spec.read(text)


@given(st.text(alphabet="gptqrnhadm(),=.0123456789'\"[]{}:+- _\\\n", max_size=40))
def test_garbage_is_refused_in_words(text):
    try:
        assert spec.read(spec.write(spec.read(text))) == spec.read(text)
    except QuantkitError as error:
        assert str(error)


METHOD = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Ternary:
    scale: float
    group_size: int = 32
"""


def test_another_packages_method_has_its_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ternary_with_a_text.py").write_text(METHOD)
    metadata = tmp_path / "ternary_with_a_text-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ternary-with-a-text\nVersion: 0.1\n")
    entry = "[quantkit.quantizers]\nternary = ternary_with_a_text:Ternary\nlost = nowhere_at_all:Lost\n"
    (metadata / "entry_points.txt").write_text(entry)
    registry.rescan()
    try:
        quantizer = spec.read("ternary(0.5, group_size=16)")
        assert (quantizer.scale, quantizer.group_size) == (0.5, 16)
        assert spec.write(quantizer) == "ternary(0.5, group_size=16)"
    finally:
        monkeypatch.undo()
        registry.rescan()


def test_an_unregistered_class_is_described_as_python_does():
    @dataclass(frozen=True)
    class Own:
        bits: int

    assert spec.write(Own(3)) == repr(Own(3))
