"""Weighted k-means: Lloyd's invariants, determinism, and the source-coding references."""

from itertools import pairwise

import pytest
import torch

from quantkit.quantizers import kmeans


def error(samples, importance, centroids):
    return float((kmeans.assign(samples, centroids)[1] * importance).sum() / importance.sum())


def test_inertia_never_rises():
    samples, importance = torch.randn(3000, 4), torch.rand(3000)
    errors = [error(samples, importance, kmeans.fit(samples, importance, 5, steps, tolerance=0)) for steps in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_equal_weights_are_no_weights():
    samples = torch.randn(2000, 3)
    one = kmeans.fit(samples, torch.ones(2000), 4)
    assert torch.allclose(kmeans.fit(samples, torch.full((2000,), 7.5), 4), one, atol=1e-4)


def test_weights_pull_centroids():
    samples = torch.randn(4000, 2)
    importance = torch.where(samples[:, 0] > 1, 50.0, 1.0)
    heavy = samples[:, 0] > 1
    found = [kmeans.assign(samples, kmeans.fit(samples, w, 5))[1][heavy].mean() for w in (importance, torch.ones(4000))]
    assert found[0] < 0.7 * found[1]


def test_the_same_centroids_whatever_the_global_seed():
    samples = torch.randn(200000, 2)  # more than are read
    weights = torch.rand(200000)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(kmeans.fit(samples, weights, 3))
    assert torch.equal(*found)


def test_degenerate_samples():
    """Fewer distinct samples than centroids, zero weights, all samples equal."""
    few = torch.randn(5, 3)
    centroids = kmeans.fit(few, torch.ones(5), 4)
    assert torch.isfinite(centroids).all()
    assert error(few, torch.ones(5), centroids) < 1e-10
    assert torch.isfinite(kmeans.fit(torch.ones(100, 2), torch.ones(100), 3)).all()
    assert torch.isfinite(kmeans.fit(torch.randn(100, 2), torch.zeros(100), 3)).all()
    half = torch.cat([torch.zeros(50), torch.ones(50)])
    samples = torch.randn(100, 2)
    assert error(samples, half, kmeans.fit(samples, half, 6)) < 0.1 * error(samples, half, kmeans.fit(samples, half, 2))


@pytest.mark.parametrize(("length", "bits", "limit"), [(2, 4, 0.1087 * 1.02), (4, 8, 0.0974 * 1.02)])
def test_error_on_gaussian_weights(length, bits, limit):
    """Error a weight at 2 bits, held out, beside the source-coding references."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(1 << 17, length, generator=generator)
    held_out = torch.randn(1 << 15, length, generator=generator)
    centroids = kmeans.fit(samples, torch.ones(len(samples)), bits)
    assert float(kmeans.assign(held_out, centroids)[1].mean()) / length < limit
