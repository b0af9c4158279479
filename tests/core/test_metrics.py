import torch

from quantkit.core.metrics import proxy_loss, token_kl, token_nll


def test_proxy_loss_is_the_mean_squared_output_error():
    x, error = torch.randn(500, 6), torch.randn(4, 6)
    expected = (x @ error.T).square().sum(1).mean()
    torch.testing.assert_close(torch.tensor(proxy_loss(error, x.T @ x / 500)), expected)


def test_nll_and_kl_against_torch():
    logits, base = torch.randn(7, 11), torch.randn(7, 11)
    targets = torch.randint(0, 11, (7,))
    torch.testing.assert_close(
        token_nll(logits, targets), torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(token_kl(base, logits), expected.sum(-1))
    assert token_kl(base, base).abs().max() == 0
