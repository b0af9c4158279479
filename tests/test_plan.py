import pytest

from quantkit.errors import QuantkitError, UnknownName
from quantkit.plan import make_plan
from quantkit.quantizers.gptq import GPTQ
from quantkit.quantizers.rtn import RTN
from quantkit.recipe import Recipe, make_quantizer
from quantkit.registry import names, resolve

INNER = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def test_last_matching_rule_decides():
    rules = {"*.down_proj": GPTQ(4), "model.layers.0.*": GPTQ(8), "lm_head": None}
    plan = make_plan(INNER, ["lm_head"], GPTQ(3), rules)
    assert list(plan) == INNER
    assert [plan[name].bits for name in INNER] == [8, 8, 3, 4]


def test_outer_layers_stay_dense_unless_named():
    assert "lm_head" not in make_plan(INNER, ["lm_head"], RTN(3))
    assert make_plan(INNER, ["lm_head"], RTN(3), {"lm_head": RTN(8)})["lm_head"].bits == 8


def test_senseless_rules_are_refused():
    with pytest.raises(QuantkitError, match=r"'\*\.down_prj' matches none.*down_proj"):
        make_plan(INNER, [], RTN(3), {"*.down_prj": RTN(4)})
    with pytest.raises(QuantkitError, match="no layer to quantize"):
        make_plan(INNER, [], RTN(3), {"*": None})


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
