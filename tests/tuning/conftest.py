"""The full-precision reference model, which these tests tune packed copies of."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="package")
def teacher(reference):
    return AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
