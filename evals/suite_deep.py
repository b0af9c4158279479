"""Groups of the deep check: every regime, odd shapes, both 16-bit types, biases and low-rank corrections."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.evals import kv_speed
from quantkit.evals.kernel_kinds import CHECKED, Kind, Layer
from quantkit.evals.suite_groups import Group, Run, relative_error
from quantkit.kernels import hadamard

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""Limits of the relative error, one rounding."""
ROWS = (1, 3, 8, 16, 31, 64, 300)
WIDTHS = (64, 896, 4096, 5120, 11008, 14336, 18944)
_RANK = 24


def products(family: str) -> list[Group]:
    """A family's kinds in both types."""
    return [
        _product(kind, N, K, dtype) for kind, N, K in CHECKED if kind.family == family for dtype in TOLERANCE
    ]  # fmt: skip


def _product(kind: Kind, N: int, K: int, dtype: torch.dtype) -> Group:
    def launch(device: torch.device) -> None:
        """All launches that `measure` will make, so that they are compiled by then."""
        layer = kind.layer(N, K, device)
        bias, up, down = _extra(N, K, dtype, device)
        for M in (*ROWS, 32, K):
            x = torch.empty(M, K, device=device, dtype=dtype)
            layer.matmul(x)
            if M in ROWS:
                layer.matmul(x, bias, up, down)

    def measure(run: Run) -> None:
        """Compares products with fp64, and those of unit vectors with the weight itself, bit for bit."""
        layer = kind.layer(N, K, run.device)
        weight = layer.dequantize()
        for M in ROWS:
            detail, ok = _compared(layer, weight, torch.randn(M, K, device=run.device, dtype=dtype))
            run.report.check(f"M={M}", detail, ok)
        if kind.family == "rotation":
            return  # rounds in between
        identity = torch.eye(K, device=run.device, dtype=dtype)
        wrong = [
            rows for rows in (8, 16, 32, 64, K)
            if not torch.equal(layer.matmul(identity[-rows:]).T, weight.to(dtype)[:, -rows:])
        ]  # fmt: skip
        detail = f"{wrong} rows of the identity do not give the weight exactly" if wrong else "exact"
        run.report.check("identity", detail, not wrong)

    name = str(dtype).removeprefix("torch.")
    return Group(f"deep {kind.family}", f"{N} x {K}, {name}", kind.name, launch, measure)


def _extra(N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A bias and a low-rank correction."""
    up, down = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((N, _RANK), (_RANK, K)))
    return torch.randn(N, device=device, dtype=dtype), up, down / 32


def _compared(layer: Layer, weight: Tensor, x: Tensor) -> tuple[str, bool]:
    N, K = weight.shape
    bias, up, down = _extra(N, K, x.dtype, x.device)
    exact = x.double() @ weight.double().T
    y = layer.matmul(x)
    errors = [relative_error(y, exact)]
    exact = exact + bias.double() + x.double() @ down.double().T @ up.double().T
    errors.append(relative_error(layer.matmul(x, bias, up, down), exact))
    # outside the integers' decode regime weights are rounded to x's type, then the result: two roundings
    ok = all(error <= 1.5 * TOLERANCE[x.dtype] for error in errors)
    detail = f"relative error {errors[0]:.2e}, with bias and correction {errors[1]:.2e}"
    if not torch.equal(y, layer.matmul(x)):
        detail, ok = detail + ", two runs differ", False
    return detail, ok


def rotations() -> list[Group]:
    """Widths with and without a core, and what is behind rotations."""
    return [_rotation(n, dtype) for n in WIDTHS for dtype in TOLERANCE] + products("rotation")


def _rotation(n: int, dtype: torch.dtype) -> Group:
    def inputs(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        signs = torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, device=device)
        return torch.randn(rows, n, device=device, dtype=dtype), signs

    def launch(device: torch.device) -> None:
        for rows in (1, 5, 700):
            hadamard.rotate(*inputs(rows, device), False)

    def measure(run: Run) -> None:
        """Compares rotations of few and of many rows with fp64."""
        for rows in (1, 5, 700):
            x, signs = inputs(rows, run.device)
            error = relative_error(hadamard.rotate(x, signs, False), hadamard.reference(x.double(), signs, False))
            run.report.check(f"M={rows}", f"relative error {error:.2e}", error <= TOLERANCE[dtype])

    name = str(dtype).removeprefix("torch.")
    return Group("deep rotation", f"{n} features, {name}", "rotation", launch, measure)


FAMILIES: dict[str, Callable[[], list[Group]]] = {
    "int": lambda: products("int"),
    "trellis": lambda: products("trellis"),
    "codebook": lambda: products("codebook"),
    "pyramid": lambda: products("pyramid"),
    "rotation": rotations,
    "attention": kv_speed.deep_groups,
}
"""Parts of the check."""
