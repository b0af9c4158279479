"""The models whose peak memory is measured are read a block at a time, whatever form their files hold them in."""

import pytest

from quantkit import RTN, Recipe
from quantkit.evals import memory
from quantkit.io.source import Sharded, open_folder
from quantkit.run.pipeline import quantize_checkpoint


@pytest.mark.parametrize("stored", memory.STORED)
def test_stored_models_are_read_a_block_at_a_time(stored, tmp_path):
    config = memory._stored(2, stored)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 128, 256, 4, 2
    text.moe_intermediate_size, text.head_dim = 64, 32
    if config is not text:
        config.vision_config.out_hidden_size, text.rope_parameters["mrope_section"] = 128, [4, 6, 6]
    memory.write_untrained(tmp_path / "model", config)
    source = open_folder(tmp_path / "model")
    assert isinstance(source, Sharded) and not source._others
    names = {*source.shards._shards.specs} if stored == "fp8" else {*source.shards.specs}
    assert not names <= source.model.state_dict().keys(), "stored as something else"
    report = quantize_checkpoint(tmp_path / "model", Recipe(RTN(3, 64)), tmp_path / "packed")
    assert report.packed_weights / report.all_weights > 0.1
