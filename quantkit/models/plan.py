"""A plan: which quantizer each layer gets, and which layers share another's weight."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from quantkit.core.errors import QuantkitError
from quantkit.core.protocols import Needs, Quantizer
from quantkit.formats.tied import TiedWeight


@dataclass(frozen=True)
class Tied:
    """A plan's entry of what shares the packed weight of another layer.

    That is an embedding, which has the head's, or a layer of a block that is called at several depths.

    Attributes:
        layer: whose weight it is, by full name.
        needs: nothing; the other layer's quantizer decides.
    """

    layer: str
    needs: ClassVar[Needs] = Needs.NOTHING

    def layout(self, out_features: int, in_features: int) -> TiedWeight:
        """Where the weight is."""
        return TiedWeight(self.layer, out_features, in_features)


Plan = dict[str, Quantizer | Tied]
Rules = Mapping[str, Quantizer | None]


def make_plan(
    defaults: Mapping[str, Quantizer | Tied | None], rules: Rules | None = None, lookups: Collection[str] = ()
) -> Plan:
    """Gives every layer its quantizer.

    Args:
        defaults: what layers get unless a rule says otherwise, in model order; None leaves a layer dense.
        rules: shell patterns over full layer names -> quantizer, or None to leave the layer dense. Where several
            match a layer, the last one decides.
        lookups: names of embeddings, which a rule with a quantizer has to give in full: what suits linear layers
            does not suit them.

    Returns:
        Quantizers by layer name, in model order; layers that stay dense are absent.

    Raises:
        QuantkitError: a rule matches no layer, or nothing is left to quantize.
    """
    chosen = dict(defaults)
    for pattern, quantizer in (rules or {}).items():
        matches = [
            name for name in chosen
            if fnmatchcase(name, pattern) and (quantizer is None or name not in lookups or name == pattern)
        ]  # fmt: skip
        if not matches:
            close = difflib.get_close_matches(pattern.replace("*", ""), chosen, n=1, cutoff=0.1)
            hint = f"; the nearest layer is {close[0]!r}" if close else ""
            raise QuantkitError(f"the rule {pattern!r} matches none of the model's {len(chosen)} layers{hint}")
        chosen |= dict.fromkeys(matches, quantizer)
    dense = {name for name, quantizer in chosen.items() if quantizer is None}
    plan = {
        name: quantizer for name, quantizer in chosen.items()
        if quantizer is not None and not (isinstance(quantizer, Tied) and quantizer.layer in dense)
    }  # fmt: skip
    if not plan:
        raise QuantkitError("the rules leave no layer to quantize")
    return plan


def plan_needs(plan: Plan) -> Needs:
    """The most that any quantizer of the plan reads."""
    return max(quantizer.needs for quantizer in plan.values())


def with_own_weight(plan: Plan) -> dict[str, Quantizer]:
    """The layers that are packed themselves."""
    return {name: quantizer for name, quantizer in plan.items() if not isinstance(quantizer, Tied)}


def tied(plan: Plan) -> dict[str, str]:
    """Embeddings and layers that share the packed weight of another layer -> that layer."""
    return {name: quantizer.layer for name, quantizer in plan.items() if isinstance(quantizer, Tied)}
