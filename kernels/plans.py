"""Launch plans: what every eager call of a kernel would repeat, done once a weight.

A call through torch's dispatcher and Triton's launcher checks shapes, chooses sizes, binds some forty arguments and
looks the binary up: 50 microseconds of Python for a product that takes a GPU ten. All of it depends on the weight and
on the shape, strides, type and alignment of x alone. `Planned` runs an ordinary launch the first time that it sees
such an x, notes what was launched, and from then on hands the compiled kernel to the driver itself.

Launchers take part by a few calls instead of torch's and Triton's own:

    start(kernel, grid, *arguments, **constants)     for kernel[grid](*arguments, **constants)
    result(shape, x), workspace(size, x)             for torch.empty: what a launch writes
    counters(device, count), inner(rows, down)       for those of a split-K launch and of a low-rank correction

A plan is made only where every tensor among the arguments is x, one of those, or the weight's, a bias's or a
correction's; then it passes the same binary the same arguments. The key holds whatever a binary is specialised for: an
integer that is a multiple of 16 or 1 is a weight's or follows from the shape or the strides of x, and of the addresses
only that of x may be aligned at one call and not at another. Anything else is launched as ever.

`direct` says when the dispatcher is not needed: nothing is traced, transformed, differentiated or cast.
"""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from quantkit.kernels import launching, self_check

_NVIDIA = torch.version.hip is None
MOST = 128
"""Plans that a weight keeps; then it begins anew."""


def on_gpu(x: Tensor) -> bool:
    """Whether x [...] is where plans are made: on a GPU by NVIDIA."""
    return x.is_cuda and _NVIDIA


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a product with x may go past torch's dispatcher.

    Args:
        x: the inputs [..., in_features].
        others: what is added besides: a bias [out_features], a low-rank correction [out_features, rank] and
            [rank, in_features].
    """
    if is_compiling() or type(x) is not Tensor or not on_gpu(x):
        return False
    if _len_torch_dispatch_stack() or peek_interpreter_stack() is not None or _get_tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0 or is_autocast_enabled() or x.is_neg():
        return False
    if not is_grad_enabled():
        return True
    if x.requires_grad:
        return False
    for other in others:  # noqa: SIM110  (a generator takes twice as long)
        if other is not None and other.requires_grad:
            return False
    return True


def launches(family: str, x: Tensor) -> bool:
    """Whether a product with x [..., in_features] may go straight to a family's kernels, which are right there."""
    return direct(x) and launching.properties(x.device)[0] >= 80 and self_check.trusted(family, x.device)


class _Recorder(threading.local):
    """What the launch of a plan in the making has done so far; None where none is."""

    recording: "_Recording | None" = None


_recorder = _Recorder()


class _Recording:
    """The tensors of a launch by their role, and the kernels that it started.

    Args:
        x: the inputs.
        fixed: tensors that are the same at every call.
    """

    def __init__(self, x: Tensor, fixed: Sequence[Any]) -> None:
        self.x = x
        self.fixed = {tensor.data_ptr(): tensor for tensor in fixed if isinstance(tensor, Tensor)}  # and their views
        self.made: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []  # a tensor, and how to make it from x
        self.started: list[tuple[Any, tuple[int, ...], list[Any], list[tuple[int, int]]]] = []
        self.complete = True

    def note(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Adds a kernel; `complete` ends where an argument is of no known role."""
        slots = []
        made = [id(tensor) for tensor, _ in self.made]
        for at, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            if id(argument) in made:
                slots.append((at, 1 + made.index(id(argument))))
                self.complete &= argument.data_ptr() % 16 == 0  # as it will be at every call
            elif argument.data_ptr() in self.fixed:
                arguments[at] = argument.data_ptr()
            elif argument.data_ptr() == self.x.data_ptr():
                slots.append((at, 0))
            else:
                self.complete = False
        self.complete &= all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
        self.started.append((compiled, (*grid, 1, 1)[:3], arguments, slots))

    def gives(self, y: Tensor) -> bool:
        """Whether launching the same again gives y."""
        places = [tensor.data_ptr() for tensor, _ in self.made]
        return self.complete and bool(self.started) and y.data_ptr() in places and y.is_contiguous()


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a Triton kernel, and notes it where a plan is being made.

    Args:
        kernel: what `triton.jit` returned.
        grid: one to three numbers of programs.
        arguments: the kernel's, in order, up to its compile-time ones.
        constants: the compile-time arguments and Triton's options.
    """
    compiled = kernel[grid](*arguments, **constants)
    recording = _recorder.recording
    if recording is not None:
        every = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :] if name in constants)]
        recording.note(compiled, grid, every)
        recording.complete &= len(every) == len(kernel.arg_names) and not kernel.pre_run_hooks


def _made(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor`, instead of which a plan will make one from its x."""
    if _recorder.recording is not None:
        _recorder.recording.made.append((tensor, make))
    return tensor


def _like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Makes uninitialised tensors."""
    # torch takes half as long to read a shape from a tensor as from a tuple; this one has a single number
    template = torch.empty(1, dtype=dtype, device=device).expand(shape)
    return lambda _: torch.empty_like(template, memory_format=torch.contiguous_format)


def result(shape: Sequence[int], x: Tensor) -> Tensor:
    """An uninitialised result [shape], in x's dtype and on its device."""
    return _made(torch.empty(shape, dtype=x.dtype, device=x.device), _like(shape, x.dtype, x.device))


def workspace(size: int, x: Tensor) -> Tensor:
    """Uninitialised fp32 [size] on x's device."""
    tensor = torch.empty(size, dtype=torch.float32, device=x.device)
    return _made(tensor, _like((size,), torch.float32, x.device))


def counters(x: Tensor, count: int) -> Tensor:
    """int32 zeros [count] on x's device, as `launching.counters`."""
    device = x.device
    return _made(launching.counters(device, count), lambda _: launching.counters(device, count))


def scratch(blocks: int, split_k: int, block: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """What shares of K leave their sums and their counts in, where there are shares: `blocks` of `block` numbers."""
    return (workspace(blocks * split_k * block, y), counters(y, blocks)) if split_k > 1 else (y, y)


def inner(rows: Tensor, down: Tensor) -> Tensor:
    """rows [M, K] @ down^T [K, r], of a low-rank correction."""
    shape, transposed = rows.shape, down.T
    return _made(torch.mm(rows, transposed), lambda x: torch.mm(x if x.dim() == 2 else x.view(shape), transposed))


class _Hooks:
    """Triton's hooks around launches, where profilers register."""

    def __init__(self) -> None:
        from triton import knobs

        self._runtime = knobs.runtime
        self._enter, self._exit = self.present
        self._calls = [getattr(hook, "calls", [hook]) for hook in self.present if hook is not None]

    @property
    def present(self) -> tuple[Any, Any]:
        """(before, after) a launch."""
        return self._runtime.launch_enter_hook, self._runtime.launch_exit_hook

    @property
    def quiet(self) -> bool:
        """Whether they call nobody."""
        runtime = self._runtime
        if runtime.launch_enter_hook is not self._enter or runtime.launch_exit_hook is not self._exit:
            self.__init__()  # type: ignore[misc]
        return not any(self._calls)


class _Plan:
    """A launch that is made again for every x of one shape, strides, type, device and alignment.

    Args:
        recording: of the first.
        y: its result.
        others: the bias and the correction that it was made with, or None each.
    """

    def __init__(self, recording: _Recording, y: Tensor, others: Sequence[Tensor | None]) -> None:
        self.bias, self.up, self.down = others
        self._places = self._others_places()
        self._hooks = _hooks()
        self._device = y.device.index
        makes = [make for _, make in recording.made]
        self._result = [tensor.data_ptr() for tensor, _ in recording.made].index(y.data_ptr())
        makes[self._result] = _like(y.shape, y.dtype, y.device)
        self._makes = makes
        self._started = [
            (compiled, compiled.run, compiled.function, compiled.packed_metadata, grid, arguments, slots)
            for compiled, grid, arguments, slots in recording.started
        ]
        self._fixed = list(recording.fixed.values())  # whose addresses the arguments are: they live as long

    def _others_places(self) -> list[tuple[int, torch.dtype]]:
        others = (self.bias, self.up, self.down)
        return [(other.data_ptr(), other.dtype) for other in others if other is not None]

    def serves(self, bias: Tensor | None, up: Tensor | None, down: Tensor | None) -> bool:
        """Whether the bias and the correction are those that the plan was made with, and where they were."""
        same = bias is self.bias and up is self.up and down is self.down
        return same and (not self._places or self._places == self._others_places())

    def __call__(self, x: Tensor) -> Tensor:
        """The result for an x of the plan's key."""
        if launching.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(x)
        made = [make(x) for make in self._makes]
        places = [x.data_ptr()]
        for tensor in made:
            places.append(tensor.data_ptr())
        stream, quiet = launching.current_stream(self._device), self._hooks.quiet
        for compiled, run, function, packed, grid, template, slots in self._started:
            arguments = template.copy()
            for at, which in slots:
                arguments[at] = places[which]
            if quiet:
                run(*grid, stream, function, packed, None, None, None, *arguments)
            else:
                metadata = compiled.launch_metadata(grid, stream, *arguments)
                run(*grid, stream, function, packed, metadata, *self._hooks.present, *arguments)
        return made[self._result]


@lru_cache
def _hooks() -> _Hooks:
    return _Hooks()


class Planned:
    """A product with one weight, or a rotation, for those x that are `direct`: by a plan if there can be one.

    Args:
        operator: (x, *weight, bias, up, down) -> y, of a product; (x, *weight) -> y of a rotation.
        launch: what it runs on a GPU, with the same arguments.
        weight: the operator's arguments after x. They are kept, and must not be replaced by others.
        product: whether it is one.
    """

    def __init__(
        self, operator: Callable[..., Tensor], launch: Callable[..., Tensor], *weight: Any, product: bool = True
    ) -> None:
        self._operator, self._launch, self._weight, self._is_product = operator, launch, weight, product
        self._found: dict[Any, _Plan | None] = {}

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """The operator's result.

        Args:
            x: [..., in_features], on the weight's GPU.
            bias, up, down: as in `QuantizedWeight.matmul`; of a product only.

        Raises:
            ValueError: an argument does not fit the weight.
        """
        address = x.data_ptr()
        alignment = address % 16 == 0, address % 4 == 0
        key = x.shape, x.stride(), x.dtype, x.get_device(), alignment, launching.overlapping()
        plan = self._found.get(key, ...)
        if plan is ... or (plan is not None and not plan.serves(bias, up, down)):
            return self._first(key, x, (bias, up, down))
        return self.through_torch(x, bias, up, down) if plan is None else plan(x)

    def through_torch(
        self, x: Tensor, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None
    ) -> Tensor:
        """The same for any x [..., in_features] and corrections as `operators.register` has them.

        It goes through torch's dispatcher.
        """
        others = (bias, up, down) if self._is_product else ()
        return self._operator(x, *self._weight, *others)

    def _first(self, key: Any, x: Tensor, others: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
        """A launch with all its checks, from which a plan is made if it can be."""
        family = self._operator.__name__.removesuffix(".default")  # of an overload
        if launching.properties(x.device)[0] < 80 or not self_check.trusted(family, x.device):
            self._found[key] = None  # where the operator launches nothing
            return self.through_torch(x, *others)
        self._weight = tuple(_aligned(value) if isinstance(value, Tensor) else value for value in self._weight)
        recording = _Recording(x, [*self._weight, *others])
        before, _recorder.recording = _recorder.recording, recording
        try:
            y = self._launch(x, *self._weight, *(others if self._is_product else ()))
        finally:
            _recorder.recording = before
        if len(self._found) >= MOST:
            self._found.clear()
        if self_check.known(family, x.device):
            self._found[key] = _Plan(recording, y, others) if recording.gives(y) else None
        return y


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins at a multiple of 16 bytes, as kernels that read words want it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
