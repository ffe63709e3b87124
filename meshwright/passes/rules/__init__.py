"""What every operator does to its dims: one line each (the notation is in factors.py), or a function of the shapes.

Pointwise operators need no line: torch tags them. An operator without a rule runs whole.
"""

from dataclasses import replace

from meshwright.passes.factors import Factors, Rule, instantiate
from meshwright.passes.rules.call import Call, RuleFunction, Rules
from meshwright.passes.rules.indexing import INDEXING
from meshwright.passes.rules.layers import LAYERS, attention
from meshwright.passes.rules.losses import LOSSES
from meshwright.passes.rules.pointwise import POINTWISE, is_pointwise, pointwise
from meshwright.passes.rules.reductions import REDUCTIONS
from meshwright.passes.rules.views import VIEWS, constant
from meshwright.runtime import random

__all__ = ["DEFAULT_RULES", "RANDOM_RULES", "Call", "RuleFunction", "Rules", "factors_of", "is_pointwise"]


def _drawn(rule: RuleFunction) -> RuleFunction:
    """Every piece is drawn by its place, which equal pieces tell by their lengths."""

    def drawn(call: Call) -> Factors:
        factors = rule(call)
        return replace(factors, factors=tuple(replace(factor, equal=True) for factor in factors.factors))

    return drawn


RANDOM_RULES: Rules = {
    random.dropout: _drawn(pointwise),
    random.feature_dropout: _drawn(pointwise),
    random.alpha_dropout: _drawn(pointwise),
    random.feature_alpha_dropout: _drawn(pointwise),
    random.attention_with_dropout: _drawn(attention),
    random.rand_like: _drawn(pointwise),
    random.randn_like: _drawn(pointwise),
    random.rand: constant,
    random.randn: constant,
}
"""Random operators."""

DEFAULT_RULES: Rules = {**POINTWISE, **LAYERS, **INDEXING, **LOSSES, **REDUCTIONS, **VIEWS, **RANDOM_RULES}


def factors_of(call: Call, rules: Rules) -> Factors | None:
    """The factors of a call, or None where no rule knows the operator."""
    rule = rules.get(call.target)
    if rule is None and is_pointwise(call.target):
        rule = pointwise
    if rule is None:
        return None
    if isinstance(rule, Rule):
        return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))
    return rule(call)
