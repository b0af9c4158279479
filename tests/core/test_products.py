"""Products of fp32 at full width: as exact as others, and only while they are asked for."""

import pytest
import torch

from quantkit.core import products
from quantkit.core.products import full_width


def test_products_stay_exact():
    x, y = torch.randn(300, 700), torch.randn(700, 200)
    exact = x.double() @ y.double()
    with full_width():
        found = x @ y
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_the_setting_is_as_it_was(monkeypatch):
    monkeypatch.setattr(products, "_widens", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(KeyError), full_width(), full_width():
        assert settings.fp32_precision == "bf16"
        raise KeyError
    assert settings.fp32_precision == before


def test_a_cpu_that_rounds_products_is_left_alone(monkeypatch):
    """As one with units for bf16 does, products by oneDNN are rounded here."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "EXACT", 1e-9)
    assert not products._widens.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(products, "EXACT", 1.0)
    assert not products._widens.__wrapped__()
