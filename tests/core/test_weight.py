import hashlib
from dataclasses import dataclass

import pytest
import torch

from quantkit.core.errors import CheckpointError, UnknownName
from quantkit.core.schema import TensorSpec
from quantkit.core.weight import QuantizedWeight
from quantkit.formats.dense import DenseWeight
from quantkit.formats.int_group import IntGroupWeight
from quantkit.quantizers.rtn import RTN


@dataclass(frozen=True, eq=False)
class ScaledWeight(QuantizedWeight, format="scaled_for_tests"):
    """A wrapper: per-row factors over any inner weight."""

    factors: torch.Tensor
    base: QuantizedWeight
    note: str = "nested"

    @property
    def shape(self):
        return self.base.shape

    def schema(self):
        return {"factors": TensorSpec(torch.float32, (self.shape[0], 1), continuous=True)}

    def dequantize(self, dtype=torch.float32):
        return (self.factors * self.base.dequantize()).to(dtype)


@pytest.fixture
def nested(monkeypatch):
    import quantkit.core.registry as registry

    table = {"scaled_for_tests": f"{__name__}:ScaledWeight"}
    monkeypatch.setitem(registry._BUILT_IN, "quantkit.formats", registry._BUILT_IN["quantkit.formats"] | table)
    monkeypatch.setitem(
        __import__("sys").modules, __name__, __import__("types").SimpleNamespace(ScaledWeight=ScaledWeight)
    )
    return ScaledWeight(torch.rand(6, 1), RTN(3, 32, symmetric=False).quantize(torch.randn(6, 80)))


def test_state_and_metadata_round_trip_with_nesting(nested):
    state, metadata = nested.state(), nested.metadata()
    assert set(state) == {"factors", "base.codes", "base.scales", "base.zeros"}
    assert metadata["note"] == "nested"
    assert metadata["base"]["bits"] == 3
    back = QuantizedWeight.from_state(metadata, state)
    assert torch.equal(back.dequantize(), nested.dequantize())
    assert back.metadata() == metadata
    empty = QuantizedWeight.empty(metadata)
    assert {k: (v.shape, v.dtype) for k, v in empty.state().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }


def test_size_counts_every_byte(nested):
    words = nested.base.codes.numel() * 4
    assert nested.nbytes == words + 2 * 2 * nested.base.scales.numel() + 4 * 6
    assert nested.bits_per_weight == 8 * nested.nbytes / (6 * 80)
    assert RTN(3, 128, grid="half").layout(4096, 4096).bits_per_weight == 3 + 16 / 128
    assert RTN(3, 128).layout(4096, 4096).bits_per_weight == 3 + 16 / 128
    assert RTN(3, 128, symmetric=False).layout(4096, 4096).bits_per_weight == 3 + 32 / 128


def test_map_reaches_every_tensor(nested):
    moved = nested.map(lambda tensor: tensor.to("meta"))
    assert all(tensor.is_meta for tensor in moved.state().values())


def test_damaged_state_is_refused(nested):
    metadata, state = nested.metadata(), nested.state()
    with pytest.raises(CheckpointError, match="'codes' is missing"):
        QuantizedWeight.from_state(metadata, {k: v for k, v in state.items() if k != "base.codes"})
    with pytest.raises(CheckpointError, match=r"'factors' is float32 \[7, 1\]; .* declares it as float32 \[6, 1\]"):
        QuantizedWeight.from_state(metadata, state | {"factors": torch.ones(7, 1)})
    with pytest.raises(CheckpointError, match="does not fit its metadata"):
        QuantizedWeight.from_state(metadata | {"surprise": 1}, state)
    with pytest.raises(UnknownName, match="int_group"):
        QuantizedWeight.from_state(metadata | {"format": "int_grop"}, state)


def test_dense_format():
    weight = DenseWeight(torch.randn(3, 5).bfloat16())
    assert weight.bits_per_weight == 16
    assert torch.equal(weight.matmul(torch.eye(5)).T, weight.weight.float())


def test_golden_bytes_of_the_integer_format():
    """The packed bytes of a fixed weight: a change here breaks every checkpoint in the world."""
    weight = ((torch.arange(4 * 200) * 37 % 101).float() / 50 - 1).view(4, 200)
    digests = {}
    for bits in (2, 3, 4, 8):
        state = RTN(bits, 64, symmetric=False, search=False).quantize(weight).state()
        content = b"".join(state[name].numpy().tobytes() for name in ("codes", "scales", "zeros"))
        digests[bits] = hashlib.sha256(content).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {2: "fe52fa86c820fb5e", 3: "decfa152cf11e8c8", 4: "f904e1a5e5b7ea67", 8: "bf09b042b18b4102"}


@pytest.mark.parametrize(
    "damage",
    [
        {"group_size": 0},
        {"group_size": 32},
        {"in_features": 500},
        {"bits": 4},
        {"scales": torch.full((2, 6), float("nan"), dtype=torch.float16)},
        {"codes": torch.zeros(6, 3, dtype=torch.int32)},
        {"zeros": torch.zeros(3, 6, dtype=torch.float16)},
    ],
)
def test_validation_catches_what_a_kernel_would_trip_over(damage):
    good = RTN(3, 64).quantize(torch.randn(6, 128))
    good.validate()
    fields = {
        "codes": good.codes,
        "scales": good.scales,
        "bits": 3,
        "group_size": 64,
        "in_features": 128,
        "zeros": None,
    }
    with pytest.raises(ValueError, match=r"take|NaN"):
        IntGroupWeight(**fields | damage).validate()
