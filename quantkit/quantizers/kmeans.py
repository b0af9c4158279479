"""Weighted k-means in torch, deterministic, on the CPU and on a GPU.

    minimise  sum_n  i_n |x_n - c_{a(n)}|^2        i_n the importance of sample n

Start: the samples are halved k times over, each part at the weighted median of the coordinate in which it varies most
(a k-d tree); the parts' means are the first centroids. Then Lloyd's steps (Least squares quantization in PCM, 1982,
method I) until the error falls by less than `tolerance` or `iterations` are done; a centroid that lost all samples goes
where the largest error is.
"""

import torch
from torch import Tensor

SAMPLES_PER_CENTROID = 256
"""More samples than this hardly move a centroid; beyond it, and 2^17 in all, a fit reads a random part of them."""


def fit(
    samples: Tensor,
    importance: Tensor,
    bits: int,
    iterations: int | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """2^bits centroids of weighted samples, by k-means.

    Args:
        samples: float [count, dimension].
        importance: non-negative [count].
        bits: log2 of the number of centroids.
        iterations: Lloyd's steps at most; None for 200 up to 256 centroids, whose start may be close to a saddle of
            the error, and 30 beyond.
        tolerance: relative fall of the error that is still worth a step.

    Returns:
        [2^bits, dimension].
    """
    most = max(SAMPLES_PER_CENTROID << bits, 1 << 17)
    if len(samples) > most:
        generator = torch.Generator().manual_seed(0)
        part = torch.randperm(len(samples), generator=generator)[:most].to(samples.device)
        samples, importance = samples[part], importance[part]
    centroids = split(samples, importance, bits)
    before = float("inf")
    for _ in range((200 if bits <= 8 else 30) if iterations is None else iterations):
        nearest, error = assign(samples, centroids)
        total = float((error * importance).sum())
        centroids = _means(samples, importance, nearest, error, centroids)
        if total >= before * (1 - tolerance):
            break
        before = total
    return centroids


def split(samples: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The means of 2^bits parts of a k-d tree over samples [count, dimension], [2^bits, dimension]."""
    count, dimension = samples.shape
    importance = importance / importance.sum().clamp_min(1e-30) + 1e-12 / count  # keeps every part's weight positive
    part = torch.zeros(count, dtype=torch.int64, device=samples.device)
    for level in range(bits):
        mean, weight = _moments(samples, importance, part, 1 << level)
        spread = torch.zeros(1 << level, dimension, dtype=samples.dtype, device=samples.device)
        spread.index_add_(0, part, (samples - mean[part]).square() * importance[:, None])
        along = samples.gather(1, spread.argmax(1)[part, None]).squeeze(1)
        order = along.argsort(stable=True)
        order = order[part[order].argsort(stable=True)]  # by part, then along its widest coordinate
        passed = importance[order].cumsum(0)
        middle = weight.cumsum(0) - weight / 2
        upper = passed - importance[order] / 2 >= middle[part[order]]
        part[order] = 2 * part[order] + upper
    return _moments(samples, importance, part, 1 << bits)[0]


def assign(samples: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each sample.

    Args:
        samples: float [count, dimension].
        centroids: float [centroids, dimension].

    Returns:
        (index int64 [count], squared distance [count]).
    """
    half = centroids.square().sum(1) / 2
    nearest = torch.empty(len(samples), dtype=torch.int64, device=samples.device)
    at_once = 1 << 19 if samples.device.type == "cpu" else 1 << 27  # distances that stay in a CPU's cache
    rows = max(1, at_once // len(centroids))
    for start in range(0, len(samples), rows):
        scores = torch.addmm(half, samples[start : start + rows], centroids.T, alpha=-1)
        nearest[start : start + rows] = scores.min(1).indices  # three times as fast as argmin on a CPU
    return nearest, (samples - centroids[nearest]).square().sum(1)


def _moments(samples: Tensor, importance: Tensor, part: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(weighted means [count, dimension], weights [count]) of each part."""
    weight = torch.zeros(count, dtype=samples.dtype, device=samples.device).index_add_(0, part, importance)
    total = torch.zeros(count, samples.shape[1], dtype=samples.dtype, device=samples.device)
    total.index_add_(0, part, samples * importance[:, None])
    return total / weight.clamp_min(1e-30)[:, None], weight


def _means(samples: Tensor, importance: Tensor, nearest: Tensor, error: Tensor, centroids: Tensor) -> Tensor:
    """Lloyd's step: means of the samples of each centroid; those without any go to the largest errors."""
    means, weight = _moments(samples, importance, nearest, len(centroids))
    empty = (weight <= 0).nonzero().flatten()
    if len(empty):
        count = min(len(empty), len(samples))
        means[empty] = centroids[empty]
        means[empty[:count]] = samples[(error * importance).topk(count).indices]
    return means
