import pytest
import torch
from transformers.pytorch_utils import Conv1D

from quantkit.models.linear import QuantizedLinear, new_linear
from quantkit.quantizers.rtn import RTN


@pytest.fixture
def layer():
    return QuantizedLinear(RTN(4, 32, symmetric=False).quantize(torch.randn(24, 64)), torch.randn(24))


def test_forward_is_the_dequantized_linear(layer):
    x = torch.randn(3, 5, 64)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x.half()).dtype == torch.float16


def test_state_dict_has_the_checkpoints_names(layer):
    assert set(layer.state_dict()) == {"codes", "scales", "zeros", "bias"}


def test_casts_leave_the_payload_alone_and_moves_do_not(layer):
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16).half()
    assert layer.bias.dtype == torch.float16
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == before[name].dtype
    layer.to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert layer.packed.codes.is_meta


def test_loading_a_state_changes_the_weight(layer):
    other = QuantizedLinear(RTN(4, 32, symmetric=False).quantize(torch.randn(24, 64)), torch.randn(24))
    layer.packed  # noqa: B018  (fill the cache)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), other(x))
    third = QuantizedLinear(RTN(4, 32, symmetric=False).quantize(torch.randn(24, 64)), torch.randn(24))
    layer.load_state_dict(third.state_dict(), assign=True)
    assert torch.equal(layer(x), third(x))


def test_bias_of_the_replaced_layer_stays():
    conv = Conv1D(24, 64)
    torch.nn.init.normal_(conv.bias)
    packed = new_linear(RTN(8, 32).quantize(conv.weight.T.contiguous()), conv)
    x = torch.randn(2, 64)
    torch.testing.assert_close(packed(x), conv(x), rtol=0.02, atol=0.02)
    assert new_linear(RTN(8, 32).quantize(torch.randn(24, 64)), torch.nn.Linear(64, 24, bias=False)).bias is None


def test_an_input_of_another_width_is_refused(layer):
    """63 columns take as many words a row as 64."""
    for width in (63, 32, 1, 65):
        with pytest.raises(ValueError, match=r"takes \[..., 64\]"):
            layer(torch.randn(2, width))
