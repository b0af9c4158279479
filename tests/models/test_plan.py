import pytest

from quantkit.core.errors import QuantkitError, UnknownName
from quantkit.core.registry import names, resolve
from quantkit.models.plan import Tied, make_plan, tied
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN
from quantkit.run.recipe import Recipe, make_quantizer

INNER = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def test_last_matching_rule_decides():
    rules = {"*.down_proj": GPTQ(4), "model.layers.0.*": GPTQ(8), "lm_head": None}
    plan = make_plan(dict.fromkeys(INNER, GPTQ(3)) | {"lm_head": None}, rules)
    assert list(plan) == INNER
    assert [plan[name].bits for name in INNER] == [8, 8, 3, 4]


def test_outer_layers_stay_dense_unless_named():
    defaults = dict.fromkeys(INNER, RTN(3)) | {"lm_head": None}
    assert "lm_head" not in make_plan(defaults)
    assert make_plan(defaults, {"lm_head": RTN(8)})["lm_head"].bits == 8


def test_embeddings_are_packed_by_their_full_name_only():
    defaults = {"model.embed_tokens": None} | dict.fromkeys(INNER, RTN(3))
    lookups = ["model.embed_tokens"]
    assert "model.embed_tokens" not in make_plan(defaults, {"*": RTN(4)}, lookups)
    assert make_plan(defaults, {"model.embed_tokens": RTN(4)}, lookups)["model.embed_tokens"].bits == 4
    with pytest.raises(QuantkitError, match=r"matches none.*nearest layer is 'model\.embed_tokens'"):
        make_plan(defaults, {"*embed*": RTN(4)}, lookups)
    packed = defaults | {"model.embed_tokens": RTN(6)}
    assert "model.embed_tokens" not in make_plan(packed, {"*embed*": None}, lookups)


def test_an_embedding_stays_dense_with_the_head_that_it_is_tied_to():
    defaults = {"model.embed_tokens": Tied("lm_head"), **dict.fromkeys(INNER, RTN(3)), "lm_head": RTN(6)}
    assert tied(make_plan(defaults)) == {"model.embed_tokens": "lm_head"}
    assert list(make_plan(defaults, {"lm_head": None})) == INNER


def test_senseless_rules_are_refused():
    with pytest.raises(QuantkitError, match=r"'\*\.down_prj' matches none.*down_proj"):
        make_plan(dict.fromkeys(INNER, RTN(3)), {"*.down_prj": RTN(4)})
    with pytest.raises(QuantkitError, match="no layer to quantize"):
        make_plan(dict.fromkeys(INNER, RTN(3)), {"*": None})


def test_quantizers_by_name():
    assert make_quantizer("gptq", bits=3, group_size=64) == GPTQ(3, 64)
    own = RTN(5)
    assert make_quantizer(own) is own
    with pytest.raises(UnknownName, match="did you mean 'gptq'"):
        make_quantizer("gptk", bits=3)
    with pytest.raises(QuantkitError, match="has no setting 'bit'"):
        make_quantizer("rtn", bit=3)
    with pytest.raises(QuantkitError, match="1 to 8 bits"):
        make_quantizer("rtn", bits=9)
    with pytest.raises(QuantkitError, match="give a quantizer object"):
        make_quantizer(3)
    with pytest.raises(QuantkitError, match="method is given GPTQ"):
        make_quantizer(GPTQ)
    with pytest.raises(QuantkitError, match="rule"):
        Recipe(RTN(3), {"*": "gptq"})


def test_every_registered_name_resolves():
    for group in ("quantkit.formats", "quantkit.quantizers"):
        assert names(group)
        for name in names(group):
            assert isinstance(resolve(group, name), type)
