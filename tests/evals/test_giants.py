"""Models of which nothing is there but shapes."""

import pytest
import torch
from transformers import LlamaConfig

from quantkit.evals.giants import METHODS, asked, lay_out
from quantkit.io.source import open_folder
from quantkit.models.plan import plan_needs
from quantkit.run.estimate import experts_chosen, multiplications, shapes_of

from ..helpers.experts import EXPERTS, SIZES


def test_a_model_without_content_is_asked_what_it_takes(tmp_path):
    folder = lay_out(tmp_path / "model", LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], dtype="bfloat16"))
    found = {name: asked(folder, recipe) for name, recipe in METHODS.items()}
    for row in found.values():
        assert row["bytes_after"] < row["bytes_before"] < 2**20
        assert row["memory_1"] > 0 and row["peta"] > 0
    assert found["trellis"]["peta"] > 1.5 * found["GPTQ"]["peta"], "there and back"


@pytest.mark.parametrize(("name", "chosen"), [("qwen3_moe", 2), ("llama4", 1), ("mixtral", 2)])
def test_tokens_pass_through_the_experts_that_they_choose(name, chosen, model_folder):
    source = open_folder(model_folder(name), torch.float32, structure_only=True)
    assert experts_chosen(source) == chosen
    plan = METHODS["GPTQ"].plan(source.model)
    shapes = shapes_of(source, plan)
    inside = {layer: shape for layer, shape in shapes.items() if ".experts." in layer}
    count = EXPERTS[name].num_local_experts if name != "qwen3_moe" else EXPERTS[name].num_experts
    whole, routed = (multiplications(inside, 64, plan_needs(plan), chosen=each) for each in (0, chosen))
    assert routed == pytest.approx(whole * chosen / count)
