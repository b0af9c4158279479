import copy
import logging

import pytest
import torch
from torch import nn

import quantkit
from quantkit import RTN
from quantkit.core.errors import QuantkitError
from quantkit.models.linear import QuantizedLinear
from quantkit.models.unpacking import choose_unpacked


class Model(nn.Module):
    """A large layer that is fast packed, a small one and one of a format without compiled loops."""

    def __init__(self):
        super().__init__()
        self.large = QuantizedLinear(RTN(4, 128).quantize(torch.randn(4096, 1024)))
        self.small = QuantizedLinear(RTN(4, 128).quantize(torch.randn(32, 128)))
        self.slow = QuantizedLinear(RTN(4, 100).quantize(torch.randn(2048, 1024)))

    def forward(self, x):
        return self.large(x), self.slow(x)


def chosen(model):
    return [name for name, module in model.named_modules() if getattr(module, "unpacked", False)]


def test_each_layer_takes_the_faster_way(caplog):
    pytest.importorskip("numba")
    caplog.set_level(logging.INFO, "quantkit")
    model = Model()
    taken = choose_unpacked(model, free=lambda: 2**40)
    assert chosen(model) == ["small", "slow"]
    assert taken == 4 * (32 * 128 + 2048 * 1024)
    assert "2 of 3 packed layers are unpacked" in caplog.text


def test_memory_decides_what_may_be_unpacked(caplog):
    pytest.importorskip("numba")
    model = Model()
    choose_unpacked(model, free=lambda: 2 * 4 * 32 * 128)  # half of it
    assert chosen(model) == ["small"]
    assert "times the time of dense ones" in caplog.text
    with pytest.raises(QuantkitError, match=r"25\.2 MB, and 1\.0 MB"):
        choose_unpacked(model, True, free=lambda: 10**6)


def test_asked_for_all_or_none(caplog):
    model = Model()
    choose_unpacked(model, True, free=lambda: 2**40)
    assert chosen(model) == ["large", "small", "slow"] and not caplog.records
    choose_unpacked(model, False)
    assert chosen(model) == []
    assert "unpack=True" in caplog.text


def test_without_numba_the_log_says_so(caplog, monkeypatch):
    monkeypatch.setattr("quantkit.models.unpacking.has_numba", lambda: False)
    monkeypatch.setattr("quantkit.formats.int_group.has_numba", lambda: False)
    model = Model()
    choose_unpacked(model, free=lambda: 2**40)
    assert chosen(model) == ["large", "small", "slow"]
    choose_unpacked(model, False)
    assert "install numba" in caplog.text


def test_an_unpacked_layer_answers_alike_saves_alike_and_moves():
    model, x = Model(), torch.randn(1, 1024)
    packed, state = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_unpacked(model, True)
    for _ in range(2):
        for found, expected in zip(model(x), packed, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert model.slow._held is not None
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert copy.deepcopy(model).slow.unpacked
    model.to("meta")
    assert model.slow._held is None  # nothing dense moves


def test_fusing_leaves_unpacked_layers_alone():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, QuantizedLinear(RTN(4, 64).quantize(torch.randn(64, 64))))

    model = Attention()
    choose_unpacked(model, True)
    assert quantkit.fuse(model) == 0
    choose_unpacked(model, False)
    assert quantkit.fuse(model) == 1


def test_load_decides(tmp_path, reference, caplog):
    caplog.set_level(logging.INFO, "quantkit")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference)
    quantkit.quantize(model, bits=4, method="rtn", group_size=64)
    model.save_pretrained(tmp_path)
    token = torch.tensor([[5, 9]])
    logits = {}
    for unpack, count in ((None, 42), (True, 42), (False, 0)):
        caplog.clear()
        loaded = quantkit.load(tmp_path, dtype=torch.float32, unpack=unpack)
        assert len(chosen(loaded)) == count
        assert len(caplog.records) == 1  # what was decided, once
        logits[unpack] = loaded(token).logits
    torch.testing.assert_close(logits[None], logits[False], atol=1e-4, rtol=1e-4)


def test_an_unpacked_layer_follows_its_tensors_and_lets_them_be_trained():
    layer = QuantizedLinear(RTN(4, 64).quantize(torch.randn(64, 64)))
    layer.unpacked, x = True, torch.randn(2, 64)
    with torch.no_grad():
        before = layer(x)
        layer.scales.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
    layer.scales.requires_grad_()
    layer(x)
    assert layer._held is None, "a weight that is trained is not held"


def test_tensors_that_take_the_places_of_others_are_unpacked_anew():
    layer = QuantizedLinear(RTN(4, 32).quantize(torch.randn(8, 64)))
    layer.unpacked = True
    x, other = torch.randn(3, 64), QuantizedLinear(RTN(4, 32).quantize(torch.randn(8, 64)))
    first = layer(x)
    for name, buffer in other.named_buffers():
        layer._buffers[name] = buffer
    assert not torch.allclose(layer(x), first)
    torch.testing.assert_close(layer(x), other(x))
