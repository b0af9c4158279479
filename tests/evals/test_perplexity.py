import math
from types import SimpleNamespace

import pytest
import torch

from quantkit.core.errors import QuantkitError
from quantkit.evals.perplexity import evaluate
from quantkit.run.text import EvaluationText


class Table:
    """A language model whose logits depend on the present token alone."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits[input_ids])


TOKENS = torch.randint(0, 13, (1000,), generator=torch.Generator().manual_seed(0))
TEXT = EvaluationText(TOKENS, 4.0)


def test_uniform_model():
    quality = evaluate(Table(torch.zeros(13, 13)), TEXT, 100)
    assert quality.perplexity == pytest.approx(13)
    assert quality.perplexity_se == pytest.approx(0, abs=1e-4)
    assert quality.bits_per_byte == pytest.approx(math.log2(13) / 4)
    assert (quality.windows, quality.available, quality.tokens) == (10, 10, 10 * 99)
    assert quality.kl is None


def test_against_a_plain_computation():
    torch.manual_seed(1)
    model, base = Table(torch.randn(13, 13)), Table(torch.randn(13, 13))
    quality = evaluate(model, TEXT, 100, baseline=base)
    windows = TOKENS.view(10, 100)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    log_p, log_q = base.logits.log_softmax(-1)[inputs], model.logits.log_softmax(-1)[inputs]
    nll = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert quality.nll == pytest.approx(nll.mean().item(), rel=1e-5)
    assert quality.perplexity_se == pytest.approx(
        quality.perplexity * nll.mean(1).std().item() / math.sqrt(10), rel=1e-4
    )
    assert quality.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert quality.kl_se == pytest.approx(kl.mean(1).std().item() / math.sqrt(10), rel=1e-4)
    top, base_top = log_q.argmax(-1), log_p.argmax(-1)
    assert quality.top1_agreement == pytest.approx((top == base_top).float().mean().item())
    assert quality.flip_rate == pytest.approx(((top == targets) != (base_top == targets)).float().mean().item())


def test_a_model_against_itself():
    model = Table(torch.randn(13, 13))
    quality = evaluate(model, TEXT, 100, baseline=model)
    assert (quality.kl, quality.top1_agreement, quality.flip_rate) == (0, 1, 0)
    assert quality.baseline_perplexity == quality.perplexity


def test_stride_scores_every_token_once():
    quality = evaluate(Table(torch.randn(13, 13)), TEXT, 100, stride=30)
    assert quality.windows == 31
    assert quality.tokens == 99 + 30 * 30


def test_senseless_requests_are_refused():
    with pytest.raises(QuantkitError, match="one sequence takes 2000"):
        evaluate(Table(torch.zeros(13, 13)), TEXT, 2000)
    with pytest.raises(QuantkitError, match="stride"):
        evaluate(Table(torch.zeros(13, 13)), TEXT, 100, stride=101)
    with pytest.raises(QuantkitError, match="vocabulary of 7"):
        evaluate(Table(torch.zeros(13, 13)), TEXT, 100, baseline=Table(torch.zeros(13, 7)))


def test_every_sequence_begins_with_the_bos_token_of_a_tokenizer_that_adds_one():
    seen = []

    class Spy(Table):
        def __call__(self, input_ids, **settings):
            seen.append(input_ids[0])
            return super().__call__(input_ids, **settings)

    text = EvaluationText(TOKENS, 4.0, bos=7)
    quality = evaluate(Spy(torch.zeros(13, 13)), text, 101, num_samples=3)
    assert all(len(sequence) == 101 and sequence[0] == 7 for sequence in seen)
    assert torch.equal(torch.cat([sequence[1:] for sequence in seen]), TOKENS[:300]), (
        "no token is left out or read twice"
    )
    assert quality.tokens == 300, "each is predicted, the first of the text behind BOS too"
    seen.clear()
    strided = evaluate(Spy(torch.zeros(13, 13)), text, 101, stride=40, num_samples=3)
    assert strided.tokens == 100 + 2 * 40
    assert torch.equal(seen[1][1:], TOKENS[40:140])
