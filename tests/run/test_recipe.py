"""Recipes: what a plan allows and refuses."""

import json

import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM

from quantkit import GPTQ, RTN, Recipe
from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Quantizer
from quantkit.run.recipe import read_plan

from ..helpers.garbage import changed, few, refused


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


PLAN = {"layers": {"*.q_proj": "gptq(3)", "model.layers.0.mlp.up_proj": "hadamard(vptq(2, outliers=0.01))"}}


@few
@given(content=changed(PLAN))
def test_any_plan(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_bytes(content)
    wrong, plan = refused(read_plan, path)
    assert wrong or all(isinstance(quantizer, Quantizer) for quantizer in plan.values())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "no plan .it lists no layers"),
        ({"layers": {}}, "it lists no layers"),
        ({"layers": {"q": None}}, "'q' has missing"),
        ({"layers": {"q": 3}}, "'q' has 3"),
        ({"layers": {"q": "gptq(3"}}, "'gptq.3' is no quantizer"),
        ({"layers": {"q": "gptk(3)"}}, "did you mean 'gptq'"),
    ],
)
def test_what_is_no_plan(plan, message, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(QuantkitError, match=message):
        read_plan(tmp_path / "plan.json")
