"""The form that integer weights take on a GPU: held instead of the checkpoint's, which comes back byte for byte."""

import copy
import io

import pytest
import torch
from torch import nn

from quantkit.formats.int_group import ArrangedIntGroupWeight
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.kernels import hadamard, launching, plans
from quantkit.models.fusion import fuse
from quantkit.models.linear import QuantizedLinear
from quantkit.quantizers.rtn import RTN


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Tensors in the CPU's memory pass for a GPU's; products are by torch's operators."""
    monkeypatch.setattr(plans, "on_gpu", lambda x: True)
    monkeypatch.setattr(plans, "direct", lambda *arguments: False)
    monkeypatch.setattr(launching, "prepare", lambda device: None)


def plain(outputs=96, bits=3, **options):
    return RTN(bits, 128, **options).quantize(torch.randn(outputs, 256))


def nested():
    up, down = torch.randn(96, 2).half(), torch.randn(2, 256).half()
    return LowRankWeight(RotatedWeight(plain(symmetric=False), hadamard.random_signs(256, 0)), up, down)


def bytes_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    return True


@pytest.mark.parametrize("make", [plain, nested])
def test_a_settled_layer_holds_one_form_and_saves_the_other(make):
    layer = QuantizedLinear(make(), torch.randn(96))
    x = torch.randn(3, 256)
    before, y, size = bytes_of(layer), layer(x), layer.packed.nbytes
    layer.settle()
    held = {name: buffer for name, buffer in layer.named_buffers()}
    assert any(name.endswith("stream") for name in held)
    assert not any(name.endswith("codes") for name in held)
    assert sum(buffer.nbytes for buffer in held.values()) <= 1.4 * size  # 96 rows fill one block and a half
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=5e-5)  # of 28: sums in another order
    assert same(bytes_of(layer), before)
    assert layer.packed.metadata() == layer.metadata
    assert same(layer.packed.state(), {name: before[name] for name in layer.packed.state()})
    assert any(name.endswith("stream") for name, _ in layer.named_buffers()), "saving changed nothing"
    layer.settle()
    torch.testing.assert_close(layer.weight, layer.packed.dequantize())


@pytest.mark.parametrize("make", [plain, nested])
def test_moves_casts_loads_and_copies(make, monkeypatch):
    layer, other = QuantizedLinear(make()), QuantizedLinear(make())
    before, expected = bytes_of(layer), bytes_of(other)
    layer.to(torch.bfloat16)
    assert layer._prepared
    assert same(bytes_of(layer), before)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert same(bytes_of(twin), before)
        torch.testing.assert_close(twin(torch.ones(1, 256)), layer(torch.ones(1, 256)))
    layer.load_state_dict(expected)
    assert same(bytes_of(layer), expected)
    layer.settle()
    monkeypatch.setattr(plans, "on_gpu", lambda x: False)
    layer.to("cpu")
    assert not layer._prepared
    assert same({name: buffer for name, buffer in layer.named_buffers()}, expected)


@pytest.mark.parametrize("outputs", [(128, 64, 96), (96, 96, 64)])
def test_fused_layers_share_what_divides(outputs):
    attention = nn.Module()
    for name, size in zip(("q_proj", "k_proj", "v_proj"), outputs, strict=True):
        setattr(attention, name, QuantizedLinear(plain(size, bits=4)))
    before, x = bytes_of(attention), torch.randn(2, 256)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = [layer(x) for layer in layers]
    for layer in layers:
        layer.settle()
    assert fuse(attention) == 1
    for layer, y in zip(layers, expected, strict=True):
        # fused, the compiled loops add up in other shares: fp32 sums of 256 terms of size 10
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-4)
    fused = attention.q_proj.shared.weight
    assert isinstance(fused, ArrangedIntGroupWeight) == (outputs[0] == 128)
    own = attention.q_proj.used
    assert own.state().keys() == fused.state().keys()
    storages = [next(iter(weight.state().values())).untyped_storage().data_ptr() for weight in (own, fused)]
    assert storages[0] == storages[1]
    assert same(bytes_of(attention), before)
    attention.to(torch.float16)
    assert same(bytes_of(attention), before)
    assert all(layer.shared is None for layer in layers)


def test_rows_and_what_has_no_such_form():
    weight = plain(outputs=150, bits=5).prepared()
    index = torch.tensor([[3, 149], [64, 0]])
    assert torch.equal(weight.rows(index), weight.dequantize()[index])
    weight.validate()
    with pytest.raises(ValueError, match=r"stream is .*; int_group_arranged takes"):
        ArrangedIntGroupWeight(weight.stream, 5, 128, 0, 150, 512).validate()
    ragged = RTN(4, 64).quantize(torch.randn(32, 200))
    narrow = RTN(8, 32).quantize(torch.randn(32, 128))
    assert ragged.prepared() is ragged
    assert narrow.prepared() is narrow
    assert weight.label == "int_group"
