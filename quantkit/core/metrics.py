"""What quantization costs: proxy loss of a layer, NLL and KL of a model's predictions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T): the mean squared output error of a layer, summed over its outputs.

    Args:
        error: [out, in], original weight less quantized weight.
        hessian: [in, in], mean over tokens of x x^T.
    """
    error = error.to(hessian.dtype)
    return float((error @ hessian * error).sum())


def predicted_kl(error: Tensor, hessian: Tensor, outputs: Tensor) -> float:
    """1/2 tr(H_O E H_I E^T): the KL that a small error of one layer costs, in nats a token (`quantkit.run.fisher`).

    Args:
        error: E, [out, in], original weight less quantized weight.
        hessian: H_I, [in, in], over tokens weighted by what predictions feel of them.
        outputs: H_O, [out, out].
    """
    error = error.to(hessian.dtype)
    return float((outputs.to(hessian.dtype) @ error @ hessian * error).sum()) / 2


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats, fp32 [...].

    Args:
        logits: [..., vocabulary].
        targets: int64 [...].
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_kl(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(baseline || model) of each position, in nats, fp32 [...]; both inputs [..., vocabulary]."""
    baseline = torch.log_softmax(baseline_logits.float(), dim=-1)
    model = torch.log_softmax(logits.float(), dim=-1)
    return (baseline.exp() * (baseline - model)).sum(-1)


def mean_and_error(sums: Sequence[float], counts: Tensor) -> tuple[float, float]:
    """Mean over all tokens of sequences' sums, and its standard error over sequences (a ratio estimate's).

    Args:
        sums: of a figure over each sequence's tokens.
        counts: of those tokens, fp64 [sequences].
    """
    values = torch.tensor(sums, dtype=torch.float64)
    mean = float(values.sum() / counts.sum())
    if len(sums) < 2:
        return mean, 0.0
    deviations = values - mean * counts
    variance = float(deviations.square().sum()) / (len(sums) - 1) * len(sums) / float(counts.sum()) ** 2
    return mean, math.sqrt(variance)
