"""Every method, and layers for it to pack: a new method is a row of METHODS."""

import torch

from quantkit import GPTQ, RTN, VPTQ, Hadamard, LowRank, Pyramid, Trellis
from quantkit.core.stats import LayerStats
from quantkit.quantizers.sparse import Sparse

METHODS = {
    "rtn": RTN(3, 64),
    "gptq": GPTQ(3, 64, symmetric=False),
    "gptq-half": GPTQ(3, 64, grid="half"),
    "pyramid": Pyramid(2.0, 8),
    "pyramid-wide": Pyramid(2.5, 32),
    "pyramid-in": Pyramid(3.0, 16, axis="in"),
    "trellis": Trellis(2, 12),
    "trellis-in": Trellis(3, 10, axis="in"),
    "vptq": VPTQ(2.0, 3),
    "vptq-residual": VPTQ(2.0, 4, residual_bits=4),
    "vptq-outliers": VPTQ(1.5, 2, outliers=0.05, ranges=2, scale_inputs=True),
    "hadamard-rtn": Hadamard(RTN(4, 64), outputs=False),
    "hadamard-gptq": Hadamard(GPTQ(2, 64)),
    "hadamard-pyramid": Hadamard(Pyramid(2.25, 16)),
    "hadamard-vptq": Hadamard(VPTQ(2.5)),
    "hadamard-trellis": Hadamard(Trellis(3, 12)),
    "low-rank-rtn": LowRank(RTN(3, 64), 3),
    "low-rank-gptq": LowRank(GPTQ(2, 64), 4, adapter_bits=8),
    "sparse": Sparse(0.5),
    "hadamard-low-rank-pyramid": Hadamard(LowRank(Pyramid(2.0), 4)),
}


def layer(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, LayerStats(x.T @ x / 400, num_tokens=400)


def problem(out_features=20, in_features=48, seed=0):
    """(weight, H) in fp64, of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(400, in_features, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def first_of_each(found):
    """Names of layers whose Hessian no layer before them has: statistics by name."""
    firsts = {}
    for name, stats in found.items():
        firsts.setdefault(id(stats.hessian), name)
    return set(firsts.values())


def spy(reads, seen):
    """RTN that asks for statistics and leaves them in `seen`, by the name they carry."""

    class Spy(RTN):
        needs = reads

        def quantize(self, weight, stats=None):
            seen[stats.name] = stats
            return super().quantize(weight)

    return Spy
