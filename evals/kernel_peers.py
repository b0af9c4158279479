"""Other libraries' layers of the same shapes, where they can be imported, to be timed beside ours."""

import importlib.util
from collections.abc import Callable, Sequence

import torch

from quantkit.evals.suite_groups import Group, Run, call

GROUP_SIZE = 128


def groups(bits: Sequence[int], shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[Group]:
    """Those whose library is there; one that refuses a width, a shape or this GPU says so in the results."""

    def group(name: str, width: int, N: int, K: int) -> Group:
        """One library's product of one shape; it launches nothing ahead."""
        return Group(
            "product", f"{N} x {K}", f"{name} int{width}", lambda device: None,
            lambda run: _measure(run, f"{name} int{width}", _LIBRARIES[name], width, N, K, rows),
            patience=4,  # some compile or tune at their first call
        )  # fmt: skip

    return [group(name, width, N, K) for name in present() for N, K in shapes for width in bits]


def present() -> list[str]:
    """The libraries that can be imported."""
    return [name for name in _LIBRARIES if importlib.util.find_spec(name)]


def _measure(run: Run, what: str, make: Callable, bits: int, N: int, K: int, rows: Sequence[int]) -> None:
    base = run.dense(N, K, rows)
    nbytes = N * K * bits // 8 + 4 * N * K // GROUP_SIZE
    layers = [make(N, K, bits, run.device) for _ in range(run.distinct(nbytes))]
    for M in rows:
        x = run.random(M, K)
        seconds = run.replays([call(layer, x) for layer in layers]).seconds()
        share = (nbytes + 2 * M * (N + K)) / seconds / run.bandwidth
        run.baseline(what, f"M={M}", seconds, speed_up=base[M] / seconds, bandwidth_share=share)


def _gemlite(N: int, K: int, bits: int, device: torch.device) -> Callable:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(bits, GROUP_SIZE, K, N, input_dtype=DType.BF16, output_dtype=DType.BF16)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(N * K // GROUP_SIZE, 1, device=device, dtype=torch.bfloat16)
    layer.pack(codes, scales, torch.full_like(scales, (2**bits - 1) / 2), None)
    return layer


def _torchao(N: int, K: int, bits: int, device: torch.device) -> Callable:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if bits != 4:
        raise ValueError("4 bits only")
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16))
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP_SIZE))
    return model


def _hqq(N: int, K: int, bits: int, device: torch.device) -> Callable:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP_SIZE)
    return HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=str(device))


def _humming(N: int, K: int, bits: int, device: torch.device) -> Callable:
    from humming.layer import HummingLayer

    weight = {"dtype": f"int{bits}", "group_size": GROUP_SIZE}
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=weight, torch_dtype=torch.bfloat16).to(device)
    layer.load_from_unquantized(torch.randn(N, K, device=device, dtype=torch.bfloat16))
    layer.transform()
    layer.prepare_default_kernel_configs()
    return layer


_LIBRARIES = {"humming": _humming, "gemlite": _gemlite, "torchao": _torchao, "hqq": _hqq}
