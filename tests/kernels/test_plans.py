"""Launch plans: the same result as the launch that they repeat, without its work, and never for another launch."""

import copy
import ctypes
import gc
import io
import weakref
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.formats.codebook import CodebookWeight
from quantkit.formats.low_rank import LowRankWeight
from quantkit.formats.pyramid import PyramidWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import hadamard, launching, operators, plans, pyramid
from quantkit.models.linear import QuantizedLinear
from quantkit.quantizers.rtn import RTN

from ..helpers.products import in_turn

OUT, IN = 48, 256


class Compiled:
    """In the place of Triton's compiled kernel: takes addresses as that does, and has the interpreter run them."""

    packed_metadata = ()
    function = 7

    def __init__(self, kernel, arguments, constants):
        self.kernel, self.constants = kernel, constants
        self.dtypes = [argument.dtype if isinstance(argument, torch.Tensor) else None for argument in arguments]
        self.runs = []

    def run(self, *arguments):
        grid, rest, arguments = arguments[:3], arguments[3:9], arguments[9:]
        self.runs.append(rest)
        values = [
            argument if dtype is None else at(argument, dtype)
            for argument, dtype in zip(arguments, self.dtypes, strict=False)
        ]
        self.kernel[grid](*values, **self.constants)

    def launch_metadata(self, grid, stream, *arguments):
        return {"grid": grid}


def at(address, dtype):
    """A tensor of one number at an address; the interpreter reads around it as a kernel does."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


class Kernel:
    """A kernel that says what it was compiled to, as Triton's do where they are not interpreted."""

    pre_run_hooks = ()

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled, self.arg_names = kernel, compiled, kernel.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            self.compiled.append(Compiled(self.kernel, arguments, constants))
            return self.compiled[-1]

        return launch


@pytest.fixture
def launched(monkeypatch):
    """What was launched through Triton's own launcher; tensors in the CPU's memory pass for a GPU's."""
    compiled = []
    start = plans.start
    monkeypatch.setattr(plans, "start", lambda kernel, *rest, **kw: start(Kernel(kernel, compiled), *rest, **kw))
    monkeypatch.setattr(plans, "on_gpu", lambda x: True)
    monkeypatch.setattr(launching, "current_device", lambda: None)
    monkeypatch.setattr(launching, "current_stream", lambda device: 5)
    return compiled


def int4(**options):
    return RTN(4, 128, **options).quantize(torch.randn(OUT, IN))


def trellis():
    empty = TrellisWeight.layout([OUT], IN, 2, 8)
    codes = torch.randint(-(2**31), 2**31, empty.codes.shape).int()
    return TrellisWeight(codes, torch.full((1, IN), 127).byte(), torch.ones(1), 2, 8, [OUT])


def codebook():
    books = torch.randn(1, 16, 4).half()
    return CodebookWeight.pack([torch.randint(0, 16, (OUT // 4, IN))], [books], OUT)


def pyramids(dimension, pulses):
    points = pyramid.decode(torch.randint(0, 200, (OUT // dimension, IN, 1)), dimension, pulses)
    gains, scales = torch.randint(0, 2, (OUT // dimension, IN)), torch.rand(IN).half()
    return PyramidWeight.pack(points, gains, scales, torch.tensor([1.0, 2.0]).half(), pulses, "out", (OUT, IN))


def rotated(twice=False):
    return RotatedWeight(int4(), hadamard.random_signs(IN, 0), hadamard.random_signs(OUT, 1) if twice else None)


WEIGHTS = {
    "int": int4,
    "int with zeros": lambda: int4(symmetric=False),
    "ragged": lambda: RTN(3, 64).quantize(torch.randn(OUT, 200)),
    "trellis": trellis,
    "codebook": codebook,
    "pyramid": lambda: pyramids(8, 4),
    "pyramid, factored": lambda: pyramids(16, 12),
    "rotated": rotated,
    "rotated twice": lambda: rotated(True),
    "low rank": lambda: LowRankWeight(int4(), torch.randn(OUT, 4).half(), torch.randn(4, IN).half()),
}


@pytest.mark.parametrize(
    ("name", "bias", "dtype"),
    in_turn(product(WEIGHTS, [False, True]), [torch.float16, torch.float32, torch.float32, torch.float16]),
)
@torch.no_grad()
def test_a_plan_repeats_the_launch_for_another_x(name, bias, dtype, launched):
    layer = QuantizedLinear(WEIGHTS[name](), torch.randn(OUT).half() if bias else None)
    columns = layer.in_features
    first, second = torch.randn(2, 3, columns).to(dtype), torch.randn(2, 3, columns).to(dtype)
    layer(first)
    count = len(launched)
    dense = name == "codebook" and dtype == torch.float32  # written out, and a product of torch's
    assert count == {"rotated": 2, "rotated twice": 3}.get(name, 1 - dense)
    y = layer(second)
    assert len(launched) == count, "no second time through Triton's launcher"
    assert all(len(compiled.runs) == 1 for compiled in launched)
    twin = QuantizedLinear(layer.packed.map(torch.clone), layer.bias)
    if dense:  # a product of torch's rounds by where its operands begin in memory
        torch.testing.assert_close(y, twin(second))
    else:
        assert torch.equal(y, twin(second))


@torch.no_grad()
def test_a_second_call_checks_and_chooses_nothing(launched, monkeypatch):
    layer = QuantizedLinear(rotated())
    x = torch.randn(1, 1, IN).half()
    layer(x)

    def never(*arguments, **constants):
        raise AssertionError("work that a plan has done")

    weight = layer.packed
    monkeypatch.setattr(operators, "check", never)
    monkeypatch.setattr(hadamard, "check", never)
    monkeypatch.setattr(plans, "start", never)
    monkeypatch.setattr(launching, "properties", never)
    monkeypatch.setattr(type(weight), "from_state", never)
    layer(x)
    assert layer.packed is weight
    with pytest.raises(AssertionError, match="work"):
        layer(torch.randn(2, IN).half())


@torch.no_grad()
def test_whatever_a_binary_depends_on_has_a_plan_of_its_own(launched):
    weight = int4()
    wide = torch.randn(9, 2 * IN).half()
    bytes_ = torch.zeros(2 * IN + 2, dtype=torch.float16)
    inputs = [
        wide[:1, :IN].clone(),
        wide[:2, :IN].clone(),
        wide[:2, :IN],  # rows lie apart
        wide[:1, :IN].clone().view(1, 1, IN),
        wide[:1, :IN].float(),
        bytes_[1 : IN + 1].view(1, IN),  # begins at no multiple of 16 bytes
        wide[:9, :IN].clone(),
    ]
    for x in inputs:
        expected = weight.map(torch.clone).matmul(x)
        count = len(launched)
        for _ in range(3):
            assert torch.equal(weight.matmul(x), expected)
        assert len(launched) == count + 1
    assert len(weight._planned._found) == len(inputs)


@torch.no_grad()
def test_what_no_view_can_address_and_products_of_torch_have_none(launched):
    weight = int4()
    for x in (torch.randn(2, IN, 3).half().transpose(1, 2), torch.randn(400, IN).half()):
        for _ in range(2):
            torch.testing.assert_close(weight.matmul(x), x @ weight.dequantize(x.dtype).T, rtol=1e-2, atol=0.1)
    assert list(weight._planned._found.values()) == [None, None]
    for rows in range(1, plans.MOST + 2):
        weight._planned._found[rows] = None
    weight.matmul(torch.randn(1, IN).half())
    assert len(weight._planned._found) == 1, "plans are not hoarded"


@torch.no_grad()
def test_what_does_not_fit_is_refused_with_and_without_a_plan(launched):
    layer = QuantizedLinear(int4())
    layer(torch.randn(1, IN).half())
    for x in (torch.randn(1, IN - 1), torch.randn(1, 2 * IN), torch.randn(3, 1)):
        with pytest.raises(ValueError, match=f"takes \\[..., {IN}\\]"):
            layer(x.half())
    with pytest.raises(ValueError, match="takes float16"):
        layer(torch.randn(1, IN).double())
    with pytest.raises(ValueError, match="codes are"):
        layer.packed.matmul(torch.randn(1, IN // 2).half())
    with pytest.raises(ValueError, match="bias are"):
        layer.packed.matmul(torch.randn(1, IN).half(), torch.randn(OUT + 1).half())


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        return function(*arguments, **(kwargs or {}))


def test_the_dispatcher_is_asked_where_it_has_something_to_do(launched):
    x, bias = torch.randn(2, IN), torch.nn.Parameter(torch.randn(OUT))
    assert plans.direct(x)
    assert plans.direct(x, None, None)
    assert not plans.direct(x, bias)
    assert not plans.direct(x.clone().requires_grad_())
    with torch.no_grad():
        assert plans.direct(x.clone().requires_grad_(), bias)
    with torch.inference_mode():
        assert plans.direct(torch.randn(2, IN))
    assert not plans.direct(torch.nn.Parameter(x))
    assert not plans.direct(torch.randn(2, 3, dtype=torch.complex64).conj().imag)
    with Mode():
        assert not plans.direct(x)
    seen = []
    torch.vmap(lambda row: seen.append(plans.direct(row)) or row)(x)
    torch.func.grad(lambda x: seen.append(plans.direct(x)) or x.sum())(x)
    torch.compile(lambda x: x + plans.direct(x), backend="eager", fullgraph=True)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(plans.direct(torch.autograd.forward_ad.make_dual(x, x)))
    assert seen == [False] * 3
    compiled = torch.compile(lambda x: x + plans.direct(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)


def test_autocast_and_gradients_go_through_torch(launched, monkeypatch):
    layer = QuantizedLinear(int4(), torch.randn(OUT))
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(plans, "is_autocast_enabled", lambda: True)
    assert not plans.direct(x.detach())


@torch.no_grad()
def test_a_profilers_hooks_are_called(launched):
    from triton import knobs

    weight, x = int4(), torch.randn(1, IN).half()
    weight.matmul(x)
    weight.matmul(x)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        weight.matmul(x)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    weight.matmul(x)
    before, during, after = launched[0].runs
    assert before == after == (5, 7, (), None, None, None)
    assert during[3] == {"grid": launched[0].runs and during[3]["grid"]}
    assert during[4] is knobs.runtime.launch_enter_hook


@torch.no_grad()
def test_a_bias_may_be_replaced_or_cast(launched):
    layer = QuantizedLinear(int4(), torch.zeros(OUT).half())
    x = torch.randn(1, IN).half()
    plain = layer(x)
    layer.bias = torch.nn.Parameter(torch.full((OUT,), 64.0).half(), requires_grad=False)
    torch.testing.assert_close(layer(x), plain + 64, rtol=1e-2, atol=0.1)
    layer.bias.data = torch.full((OUT,), 32.0)
    for _ in range(2):
        torch.testing.assert_close(layer(x), plain + 32, rtol=1e-2, atol=0.1)


@torch.no_grad()
def test_plans_die_with_the_tensors_they_are_for(launched):
    layer = QuantizedLinear(int4())
    x = torch.randn(1, IN).half()
    layer(x)
    old = weakref.ref(layer.packed.codes)
    layer.codes = layer.codes.clone()
    layer(x)
    gc.collect()
    assert old() is None
    assert len(launched) == 2
    layer.to(torch.bfloat16)
    layer(x)
    assert len(launched) == 3
    layer.load_state_dict(QuantizedLinear(int4()).state_dict())
    twin = QuantizedLinear(layer.packed.map(torch.clone))
    assert torch.equal(layer(x), twin(x))


@torch.no_grad()
def test_copies_and_files_have_no_plans(launched):
    layer = QuantizedLinear(rotated(), torch.randn(OUT))
    x = torch.randn(1, IN).half()
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin._cached is None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    count = len(launched)
    assert torch.equal(twin(x), y)
    assert torch.equal(read(x), y)
    assert len(launched) == count + 4
    weight = copy.deepcopy(layer.packed)
    assert set(weight.__dict__) == {"base", "in_signs", "out_signs", "out_parts"}


def test_a_launch_with_an_unknown_tensor_gives_no_plan(launched):
    x = torch.randn(1, IN)
    recording = plans._Recording(x, [])
    recording.note(Compiled(None, (), {}), (1,), [x, torch.randn(3), 4])
    assert not recording.complete


def test_counters_begin_where_binaries_expect_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(launching, "current_stream", lambda device: 0)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    counters = launching._Counters(torch.device("cpu"))
    captured = [counters.take(count) for count in (1, 3, 5, 2)]
    assert all(taken.data_ptr() % 16 == 0 for taken in captured)
    assert len({taken.data_ptr() for taken in captured}) == 4
    capturing[0] = False
    own = counters.take(7)
    assert counters.take(2000) is own
    assert own.data_ptr() not in {taken.data_ptr() for taken in captured}
    assert len(counters.take(3000)) >= 3000
