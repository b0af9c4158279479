"""Products with the experts that each row chose: against their specification, in the interpreter."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import GPTQ, RTN, Calibration, Hadamard, Trellis
from quantkit.core.weight import QuantizedWeight
from quantkit.kernels import int_group_layout, int_group_matmul, trellis_matmul
from quantkit.kernels.experts import products
from quantkit.models.experts import Apart
from quantkit.models.linear import QuantizedLinear
from quantkit.models.stacking import stack

from ..helpers.methods import layer


def integers(N, K, bits, group_size, symmetric=True, experts=4):
    torch.manual_seed(0)
    whole = symmetric == "whole"
    quantizer = RTN(bits, group_size, symmetric=symmetric not in (False, "wide"), grid="int" if whole else "half")
    made = [quantizer.quantize(torch.randn(N, K), None) for _ in range(experts)]
    return [replace(weight, zeros=weight.zeros.float() + 1e-3) for weight in made] if symmetric == "wide" else made


def stacked(weights):
    found = QuantizedWeight.stacked(weights)
    return found, [weight.dequantize() for weight in weights]


FORMS = [
    ((100, 256), 3, 128, True), ((64, 128), 2, 64, False), ((70, 512), 4, 32, True), ((70, 256), 8, 256, False),
     ((70, 256), 4, 128, "whole"), ((70, 256), 4, 32, "wide"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "symmetric", "arranged"),
    [(*form, arranged) for form in FORMS for arranged in (False, True) if not arranged or form[-1] != "wide"],
)  # the arranged stream has no place for zeros in fp32
def test_integers(shape, bits, group_size, symmetric, arranged, dtype):
    weights = integers(*shape, bits, group_size, symmetric)
    whole, dense = stacked(weights)
    x, chosen = torch.randn(2, shape[1]).to(dtype), torch.tensor([3, 0, 1, 3, 3, 2])
    bias = torch.randn(4, shape[0]).to(dtype)
    own = whole.codes, whole.scales, whole.zeros if weights[0].zero == int_group_layout.STORED else None
    if arranged:
        form = bits, group_size
        own = torch.stack([int_group_layout.arranged(w.codes, w.scales, w.zeros, *form) for w in weights]), None, None
    weight = *own, bits, group_size, shape[0], weights[0].zero
    found = int_group_matmul.launch_experts(x, chosen, *weight, bias)
    exact = products(x.float(), chosen, dense.__getitem__, bias.float())
    assert found.dtype == dtype and found.shape == (6, shape[0])
    most = (2e-2 if dtype == torch.bfloat16 else 2e-3) * float(exact.abs().max())
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=most)
    again = int_group_matmul.reference_experts(x.float(), chosen, *weight, bias.float())
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(int_group_matmul.launch_experts(x, chosen.int(), *weight, bias), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "bits", "state_bits"), [((128, 256), 2, 12), ((200, 144), 3, 16), ((96, 100), 1, 8)])
def test_trellis_codes(shape, bits, state_bits, dtype):
    weights = [Trellis(bits, state_bits).quantize(*layer(*shape, seed)) for seed in range(3)]
    whole, dense = stacked(weights)
    x, chosen = torch.randn(3, shape[1]).to(dtype), torch.tensor([2, 0, 2])
    weight = whole.codes, whole.scales, whole.scale, bits, state_bits, shape[0]
    found = trellis_matmul.launch_experts(x, chosen, *weight)
    exact = products(x.float(), chosen, dense.__getitem__)
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=2e-3 * float(exact.abs().max()))
    torch.testing.assert_close(
        trellis_matmul.reference_experts(x.float(), chosen, *weight), exact, rtol=1e-4, atol=1e-4
    )


def test_a_number_of_no_expert_reads_nothing_beyond_the_stack():
    whole, _ = stacked(integers(64, 128, 4, 128))
    weight = whole.codes, whole.scales, None, 4, 128, 64, False
    x = torch.randn(1, 128).half()
    found = int_group_matmul.launch_experts(x, torch.tensor([4, -1, 2**40]), *weight)
    first, last = int_group_matmul.launch_experts(x, torch.tensor([0, 3]), *weight)
    assert torch.equal(found[0], last) and torch.equal(found[1], first)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chosen": torch.tensor([0, 1, 2])}, "some pairs a row"),
        ({"chosen": torch.tensor([0.0, 1.0])}, "int32 or int64"),
        ({"codes": torch.zeros(4, 64, 15, dtype=torch.int32)}, "codes are"),
        ({"scales": torch.zeros(4, 2, 64).half()}, "scales are"),
        ({"bias": torch.zeros(3, 64)}, "bias are"),
        ({"x": torch.randn(2, 100).half()}, "no kernel"),
        ({"x": torch.randn(2, 128)}, "no kernel"),
    ],
)
def test_addresses_outside_of_the_tensors_are_refused(change, why):
    whole, _ = stacked(integers(64, 128, 4, 128))
    given = {
        "x": torch.randn(2, 128).half(), "chosen": torch.tensor([0, 1]), "codes": whole.codes, "scales": whole.scales,
        "zeros": None, "bits": 4, "group_size": 128, "out_features": 64, "zero": 0, "bias": None,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=why):
        int_group_matmul.launch_experts(**given)


def test_a_stack_is_views_that_a_move_takes_apart():
    layers = [QuantizedLinear(weight, torch.randn(64)) for weight in integers(64, 128, 4, 128)]
    x = torch.randn(3, 128)
    before, state = [own(x) for own in layers], [own.state_dict() for own in layers]
    found = stack(layers)
    assert all(torch.equal(own(x), y) for own, y in zip(layers, before, strict=True))
    assert layers[2].codes.data_ptr() == found.weight.codes[2].data_ptr()
    for own, kept in zip(layers, state, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in own.state_dict().items())
    assert found.whole and stack(layers) is None, "they are shared already"
    layers[1].to(torch.float64)
    assert not found.whole and layers[1].shared is None and layers[0].shared is found
    assert torch.equal(layers[1](x), before[1])
    unlike = [QuantizedLinear(integers(64, 128, bits, 128)[0]) for bits in (3, 4)]
    assert stack(unlike) is None and stack([*unlike, torch.nn.Linear(128, 64)]) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("method", [GPTQ(4, 32), Hadamard(Trellis(2, 8)), Hadamard(GPTQ(3, 32))], ids=str)
def test_all_chosen_experts_at_once(family, method, model_folder, text_file, monkeypatch):
    """What a GPU would run, through the specification of its kernels; these layers are less than a tile wide."""
    monkeypatch.setattr(int_group_matmul.Problem, "decodes", True)
    folder = model_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = Calibration(str(text_file), 2, 64)
    quantkit.quantize(model, AutoTokenizer.from_pretrained(folder), method=method, calibration=text)
    module = next(module for module in model.modules() if isinstance(module, Apart))
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 3], [2, 1], [3, 2]]), torch.rand(3, 2)
    with torch.no_grad():
        one_by_one = module(x, index, weights)
        at_once = module._at_once(x, index).view(3, 2, -1)
        assert module._at_once(x, index) is not None and len(module.at_once) == 2
        torch.testing.assert_close((at_once * weights.unsqueeze(-1)).sum(1), one_by_one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x, index, weights), one_by_one)
        module.double().float()
        assert not any(found.whole for found in module.at_once)
        torch.testing.assert_close(module._at_once(x, index).view(3, 2, -1), at_once)
        stacks = module.at_once
        other = copy.deepcopy(module.get_submodule("1.down_proj"))
        other.unshare()
        module.set_submodule("1.down_proj", other)  # as a search, an adapter or a tuned layer comes
        assert module._at_once(x, index) is not None and module.at_once is not stacks
        module.set_submodule("1.down_proj", torch.nn.Linear(other.in_features, other.out_features))
        assert module._at_once(x, index) is None, "one of them is not packed any more"
        torch.testing.assert_close(module(x, index, weights)[0], one_by_one[0], rtol=1e-4, atol=1e-5)
