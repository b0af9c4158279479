"""A plan: which quantizer each layer gets."""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from quantkit.errors import QuantkitError
from quantkit.protocols import Needs, Quantizer

Plan = dict[str, Quantizer]
Rules = Mapping[str, Quantizer | None]


def make_plan(
    inner: Iterable[str], outer: Iterable[str], default: Quantizer | None, rules: Rules | None = None
) -> Plan:
    """Gives every layer its quantizer.

    Args:
        inner: names of the linear layers in the decoder blocks; they get `default` unless a rule says otherwise.
        outer: names of the linear layers elsewhere (lm_head); they stay dense unless a rule names them.
        default: the quantizer of the inner layers, or None to quantize only what rules name.
        rules: shell patterns over full layer names -> quantizer, or None to leave the layer dense. Where several
            match a layer, the last one decides.

    Returns:
        Quantizers by layer name, in model order; layers that stay dense are absent.

    Raises:
        QuantkitError: a rule matches no layer, or nothing is left to quantize.
    """
    inner = list(inner)
    chosen: dict[str, Quantizer | None] = dict.fromkeys(inner, default) | dict.fromkeys(outer)
    for pattern, quantizer in (rules or {}).items():
        matches = [name for name in chosen if fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern.replace("*", ""), chosen, n=1, cutoff=0.1)
            hint = f"; the nearest layer is {close[0]!r}" if close else ""
            raise QuantkitError(f"the rule {pattern!r} matches none of the model's {len(chosen)} linear layers{hint}")
        chosen |= dict.fromkeys(matches, quantizer)
    plan = {name: quantizer for name, quantizer in chosen.items() if quantizer is not None}
    if not plan:
        raise QuantkitError("the rules leave no layer to quantize")
    return plan


def plan_needs(plan: Plan) -> Needs:
    """The most that any quantizer of the plan reads."""
    return max(quantizer.needs for quantizer in plan.values())
