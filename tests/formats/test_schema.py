"""Damaged and hostile metadata: every format refuses them in words, or gives a weight that holds together."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import RTN, VPTQ, Hadamard, LowRank, Pyramid, Trellis
from quantkit.core.errors import CheckpointError, UnknownName
from quantkit.core.registry import names
from quantkit.core.schema import TensorSpec, fits
from quantkit.core.stats import LayerStats
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.dense import DenseWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.formats.ordered import OrderedWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.tied import TiedWeight
from quantkit.io.checkpoint import check_tensors
from quantkit.kernels import int_group_layout
from quantkit.quantizers.factor import quantized
from quantkit.quantizers.sparse import Sparse

SHAPE = 24, 32


def made(method):
    generator = torch.Generator().manual_seed(0)
    return method.quantize(torch.randn(SHAPE, generator=generator), LayerStats(torch.eye(SHAPE[1]), num_tokens=1))


def arranged():
    form = 3, 32
    plain = RTN(*form, symmetric=False).quantize(torch.randn(24, 128))
    words = int_group_layout.arranged(plain.codes, plain.scales, plain.zeros, *form)
    return {"format": "int_group_arranged", "bits": 3, "group_size": 32, "zero": 1, "out_features": 24,
            "in_features": 128, "tensors": {"stream": ["int32", list(words.shape)]}}, {"stream": words}  # fmt: skip


def stored(weight):
    return weight.metadata(), weight.state()


WEIGHTS = {
    "dense": lambda: stored(made(Sparse(0.5))),
    "int_group": lambda: stored(made(RTN(3, 16, symmetric=False))),
    "int_group_arranged": arranged,
    "codebook": lambda: stored(made(VPTQ(2.0, 2, outliers=0.1, residual_bits=2, scale_inputs=True))),
    "low_rank": lambda: stored(made(LowRank(RTN(2, 16), 3, adapter_bits=8))),
    "ordered": lambda: stored(OrderedWeight(made(RTN(3, 16)), torch.arange(SHAPE[1]).flip(0).int())),
    "pyramid": lambda: stored(made(Pyramid(2.0, 8))),
    "rotated": lambda: stored(made(Hadamard(LowRank(Pyramid(3.0, 16, axis="in"), 2)))),
    "scaled": lambda: stored(quantized(Hadamard(RTN(3, 16)), torch.randn(SHAPE) * 1e-8, None)),
    "tied": lambda: (TiedWeight("lm_head", *SHAPE).metadata(), {}),
    "trellis": lambda: stored(made(Trellis(2, 10))),
}
each = pytest.mark.parametrize("name", WEIGHTS)
KNOWN = {name: WEIGHTS[name]() for name in WEIGHTS}
HOSTILE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**62,
    2**63,
    10**30,
    1.0,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "3",
]
HOSTILE += ["out", "in", [], [0], [8, 16], [24], [-8, 32], [2**62], ["8"], [[]], {}, {"format": "dense"}]
HOSTILE += [{"format": 3, "tensors": {}}, {"format": "tied", "layer": "x", "out_features": 24, "in_features": 32}]
HOSTILE += [TiedWeight("x", *SHAPE).metadata(), DenseWeight(torch.empty(*SHAPE, device="meta")).metadata()]
HOSTILE += [["float16", [24, 32]], ["int32", []], ["int32", [0]], ["int32", [24]], ["int32", [2**61]], ["int32", [-1]]]
HOSTILE += [["int32", [1, 2, 3, 4]], ["int32", [2**40, 2**40]], ["int32", [True]], ["int32", [1.5]], ["int32", None]]
HOSTILE += [["qint8", [2]], ["complex64", [2]], ["load", [2]], ["", [2]], [["int32"], [2]], ["int32", "2"], ["int32"]]
HOSTILE += ["int_group", "INT_GROUP", "dense", "tied", "int_grop", "bits"]


def places(tree, path=()):
    """The path of every value in metadata, whole branches among them."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def damaged(draw, metadata):
    """Metadata with one to three values replaced, left out or added."""
    found = copy.deepcopy(metadata)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(found), key=repr)))
        inside, what = parent(found, path), draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        value = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        if what == "replace":
            inside[path[-1]] = value
        elif what == "drop":
            del inside[path[-1]]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(["surprise", "zeros", "scales", "order", "base", "out_parts", "self"]))] = value
        if not found:
            break
    return found


def holds_together(metadata, state):
    """Whether what is described is a weight: then it is one throughout, else it is refused."""
    try:
        weight = QuantizedWeight.empty(metadata)
        weight.validate()
    except (ValueError, CheckpointError, UnknownName) as error:
        assert str(error)
        assert len(str(error)) < 1000
        return False
    assert all(tensor.is_meta for tensor in weight.state().values())
    assert weight.laid_out().metadata() == weight.metadata()
    assert QuantizedWeight.empty(json.loads(json.dumps(weight.metadata()))).metadata() == weight.metadata()
    try:
        weight = QuantizedWeight.from_state(metadata, state)
        weight.validate()
    except (ValueError, CheckpointError):
        return True
    if not isinstance(weight, TiedWeight):
        assert tuple(weight.dequantize().shape) == weight.shape
        assert bool(torch.isfinite(weight.dequantize()).all())
    return True


def test_every_format_is_here():
    assert set(WEIGHTS) == set(names("quantkit.formats"))


@each
def test_what_is_stored_holds_together(name):
    metadata, state = KNOWN[name]
    assert holds_together(metadata, state)
    weight = QuantizedWeight.from_state(metadata, state)
    assert weight.tensors().keys() <= weight.schema().keys()
    assert all(spec.fits(getattr(weight, key)) for key, spec in weight.schema().items())


@each
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_metadata_are_refused_or_hold_together(name, data):
    metadata, state = KNOWN[name]
    holds_together(damaged(data.draw, metadata), state)


@each
def test_every_value_is_looked_at(name):
    """No field can be garbage, be left out or be something else's, unless what results holds together."""
    metadata, state = KNOWN[name]
    refused = 0
    for path in places(metadata):
        for value in (None, True, -1, 2**62, "x", [], [-8, 32], {}):
            changed = copy.deepcopy(metadata)
            parent(changed, path)[path[-1]] = value
            refused += not holds_together(changed, state)
        changed = copy.deepcopy(metadata)
        del parent(changed, path)[path[-1]]
        holds_together(changed, state)
    assert refused >= 5 * len([*places(metadata)])


@each
def test_every_tensor_is_looked_at(name):
    """Other dimensions, sizes, types and numbers than those of the schema, one tensor at a time."""
    weight = QuantizedWeight.from_state(*KNOWN[name])
    for tensor in weight.state().values():
        wrong = [tensor.unsqueeze(0), tensor.flatten(), tensor.narrow(-1, 0, tensor.shape[-1] - 1), tensor.bool()]
        if tensor.is_floating_point():
            wrong += [torch.full_like(tensor, number) for number in (torch.nan, torch.inf)]
        for other in wrong:
            if (same := other.shape == tensor.shape and other.dtype == tensor.dtype) and torch.equal(other, tensor):
                continue
            if name == "dense" and other.dim() == 2 and other.dtype == tensor.dtype and not same:
                continue  # whose shape is its tensor's
            with pytest.raises(ValueError, match=r" takes | holds NaN or Inf"):
                weight.map(lambda found, old=tensor, new=other: new if found is old else found).validate()


def test_the_sentence_says_what_was_found_and_what_would_fit():
    weight = RTN(3, 16).quantize(torch.randn(24, 32))
    wrong = IntGroupWeight(weight.codes, weight.scales[:1], 3, 16, 32)
    with pytest.raises(ValueError, match=r"^scales is float16 \[1, 24\]; int_group takes float16 \[2, 24\]$"):
        wrong.validate()
    outer = RotatedWeight(wrong, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^base: scales is float16"):
        outer.validate()


@pytest.mark.parametrize("metadata", [None, 9.5, [], {}, {"format": "int_group"}, {"format": "dense", "tensors": {}}])
def test_a_checkpoint_names_the_layer(metadata):
    """Also where another layer is tied to it."""
    tied = TiedWeight("head", *SHAPE).metadata()
    for damaged in (metadata, KNOWN["int_group"][0] | {"bits": metadata}):
        with pytest.raises(CheckpointError, match=r"^head: .*; config\.json is damaged$"):
            check_tensors({"embedding": tied, "head": damaged}, {})
    with pytest.raises(CheckpointError, match=r"^embedding: it is tied to head, \[24, 32\], which is not there"):
        check_tensors({"embedding": tied}, {})


def test_no_weights_in_weights_without_end():
    metadata = DenseWeight(torch.empty(8, 8, device="meta")).metadata()
    for _ in range(300):
        metadata = {"format": "rotated", "base": metadata, "tensors": {"in_signs": ["uint8", [1]]}}
    with pytest.raises(CheckpointError, match="weights in weights"):
        QuantizedWeight.empty(metadata)


def test_numbers_that_would_take_for_ever_are_refused():
    metadata = copy.deepcopy(KNOWN["pyramid"][0])
    for change in ({"pulses": 2**40}, {"dimension": 2**40}, {"dimension": 2**20, "pulses": 2**13}):
        with pytest.raises(ValueError, match="pulses"):
            QuantizedWeight.empty(metadata | change).validate()


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (3, int, True), (True, int, False), (3.0, int, False), (2**63, int, False), (None, int, False),
        (3, float, True), (float("nan"), float, False), (True, float, False),
        ([1, 2], list[int], True), ((1, 2), list[int], True), ([1, True], list[int], False), ("12", list[int], False),
        (None, int | None, True), ("x", int | None, False), (True, bool, True), (1, bool, False),
        (-(10**400), float | None, False), (torch.ones(1), torch.Tensor, True), (1, torch.Tensor, False),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_types_of_fields(value, hint, answer):
    assert fits(value, hint) == answer


def test_a_spec_makes_and_knows_its_tensors():
    spec = TensorSpec((torch.int16, torch.int32), (2, 3))
    assert spec.fits(spec.empty()) and spec.empty().is_meta and spec.empty().dtype == torch.int16
    assert spec.fits(torch.ones(2, 3).int()) and not spec.fits(torch.ones(2, 3)) and not spec.fits(None)
    assert str(spec) == "int16 or int32 [2, 3]"
    assert TensorSpec(torch.float16, (1,), optional=True).fits(None)
