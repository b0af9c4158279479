"""A full-precision model, of which these tests tune packed copies."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="package")
def teacher(short_reference):
    return AutoModelForCausalLM.from_pretrained(short_reference, dtype=torch.float32).eval()
