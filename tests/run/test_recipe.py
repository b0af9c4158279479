"""Recipes: what a plan allows and refuses."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import GPTQ, RTN, Recipe
from quantkit.core.errors import QuantkitError


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)


def test_a_group_may_exceed_some_layers_and_not_all(model):
    """As a search's plan has it, which gives a method to whatever layers it suits."""
    narrow = Recipe(None, {"*.q_proj": GPTQ(4, 512), "*.down_proj": RTN(3, 64)}).plan(model)
    assert {name.rpartition(".")[2] for name in narrow} == {"q_proj", "down_proj"}
    with pytest.raises(QuantkitError, match="exceeds the widest layer's 320 input features"):
        Recipe(None, {"*.q_proj": GPTQ(4, 512)}).plan(model)
    with pytest.raises(QuantkitError, match="exceeds the widest layer's 704 input features"):
        Recipe(GPTQ(4, 1024)).plan(model)
