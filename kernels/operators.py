"""What every product with a packed weight shares: y = x @ W^T + (x @ D^T) @ U^T + bias as an operator of torch.

x is [..., K], W [N, K] however packed, bias [N]; U [N, r] and D [r, K] are an optional low-rank correction.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import cpu, launching, self_check


def product(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
    """The specification, on any device, once the weight is known: y [..., N] in x's dtype."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if up is None or down is None else y + (x @ down.T.to(x.dtype)) @ up.T.to(x.dtype)


def dense(rows: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor | None, up: Tensor | None) -> Tensor:
    """torch's product with a weight [N, K] that a kernel has written out; inner [M, r] is x @ D^T."""
    y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    return y if inner is None or up is None else torch.addmm(y, inner, up.T)


def check(x: Tensor, N: int, expected: dict[str, tuple], bias, up, down) -> None:
    """Raises ValueError unless every address that follows from the arguments lies inside the tensors.

    Args:
        expected: the weight's tensors by name, or None, each with the dtype and the shape that it must have.
    """
    K = x.shape[-1]
    if K == 0 or N < 1:
        raise ValueError(f"x has {K} columns and the weight {N} rows; both need one at least")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}; the kernel takes float16, bfloat16 or float32")
    if (up is None) != (down is None):
        raise ValueError("a low-rank correction has both up and down, or neither")
    rank = 0 if up is None or up.dim() != 2 else up.shape[1]
    expected = expected | {
        "bias": (bias, None, (N,)),
        "up": (up, x.dtype, (N, max(rank, 1))),
        "down": (down, x.dtype, (max(rank, 1), K)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}; all must be on one device")
        wrong_type = not tensor.is_floating_point() if dtype is None else tensor.dtype != dtype
        if wrong_type or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}; a weight of {N} x {K} and x {tuple(x.shape)} take "
                f"contiguous {dtype or 'floating-point'} {shape}"
            )


_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")


def define(schema: str, launch: Callable[..., Tensor], reference: Callable[..., Tensor], fake: Callable) -> Any:
    """Makes an operator quantkit::... without gradients.

    Args:
        schema: its name, arguments and result.
        launch, reference: it on NVIDIA's GPUs since sm_80 where the kernel is right (`self_check`), and elsewhere.
        fake: its result's shape and type, as a tensor without data.
    """
    name = schema.split("(")[0]

    def on_gpu(x, *others):
        fit = launching.properties(x.device)[0] >= 80 and self_check.trusted(name, x.device)
        return launching.in_own_types(launch if fit else reference, x, *others)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, on_gpu, "CUDA")
    _LIBRARY.impl(name, partial(launching.in_own_types, reference), "CPU")
    torch.library.register_fake(f"quantkit::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.quantkit, name)


def register(
    name: str,
    arguments: str,
    rows: Callable[..., int],
    dequantized: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    launch: Callable[..., Tensor],
    compiled: str = "",
    check: Callable[..., None] | None = None,
) -> Any:
    """Makes the operator quantkit::`name`(x, *weight, bias, up, down), differentiable but for the weight.

    It gives y [..., out_features] in x's dtype for x [..., in_features]; bias is [out_features], up [out_features,
    rank] and down [rank, in_features].

    Args:
        arguments: of the weight, as in a schema.
        rows: the weight's rows, from its arguments.
        dequantized: the weight, fp32 [out_features, in_features], from its arguments and in_features.
        reference, launch: the product on other devices than NVIDIA's GPUs since sm_80, and on those: older ones lack
            the kernels' instructions and shared memory. Where a kernel errs (`self_check`) the reference runs too.
        compiled: the module of a CPU's compiled loops, see `cpu`; empty for none.
        check: raises ValueError for arguments (x, *weight, bias, up, down) whose addresses compiled loops must not
            follow.
    """
    last = 1 + len(arguments.split(","))  # x and the weight; then bias, up and down
    _LIBRARY.define(f"{name}(Tensor x, {arguments}, Tensor? bias=None, Tensor? up=None, Tensor? down=None) -> Tensor")

    def fake(x, *others):
        return x.new_empty(*x.shape[:-1], rows(*others[: last - 1]))

    def elsewhere(x, *others):
        """The product where no kernel runs: by compiled loops on a CPU, else by the reference."""
        weight, extra = others[: last - 1], others[last - 1 :]
        if not cpu.takes(compiled, x):
            return launching.in_own_types(reference, x, *others)
        if check is not None:
            check(x, *others)
        return launching.in_own_types(cpu.product, x, compiled, weight, rows(*weight), *extra)

    def on_gpu(x, *others):
        fit = launching.properties(x.device)[0] >= 80 and self_check.trusted(name, x.device)
        return launching.in_own_types(launch if fit else reference, x, *others)

    def remember(ctx, inputs, output):
        """Keeps what the gradients are made of; x only where a correction's are wanted."""
        x, weight, (bias, up, down) = inputs[0], inputs[1:last], inputs[last:]
        needed = x if up is not None and any(ctx.needs_input_grad[last + 1 :]) else None
        ctx.shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
        ctx.weight = [... if isinstance(value, Tensor) else value for value in weight]
        ctx.save_for_backward(needed, up, down, *(value for value in weight if isinstance(value, Tensor)))

    def backward(ctx, grad):
        """Through the packed weight to x, the bias and the low-rank correction; the weight is a constant."""
        x, up, down, *tensors = ctx.saved_tensors
        weight = [tensors.pop(0) if value is ... else value for value in ctx.weight]
        flat_grad = grad.reshape(-1, grad.shape[-1])
        found: list[Tensor | None] = [None] * (last + 3)
        if ctx.needs_input_grad[0]:
            whole = cpu.unpacked(compiled, dequantized, weight, rows(*weight), ctx.shape[-1])
            grad_x = flat_grad @ whole.to(grad.dtype)
            grad_x = grad_x if up is None else grad_x + (flat_grad @ up) @ down
            found[0] = grad_x.view(ctx.shape)
        if any(ctx.needs_input_grad[last : last + 1]):  # trailing arguments that were left out are not counted
            found[last] = flat_grad.sum(0).to(ctx.bias_dtype)
        if x is not None:
            flat = x.reshape(-1, ctx.shape[-1])
            found[last + 1], found[last + 2] = flat_grad.T @ (flat @ down.T), (flat_grad @ up).T @ flat
        return tuple(found[: len(ctx.needs_input_grad)])

    torch.library.register_fake(f"quantkit::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    launching.ON_GPU[name] = on_gpu
    torch.library.register_autograd(f"quantkit::{name}", backward, setup_context=remember, lib=_LIBRARY)
    return getattr(torch.ops.quantkit, name).default
