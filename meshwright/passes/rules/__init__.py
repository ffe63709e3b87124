"""What every operator does to its dims: one line each (the notation is in factors.py), or a function of the shapes.

Pointwise operators need no line: torch tags them. An operator without a rule runs whole.
"""

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

RANDOM_RULES: Rules = {
    random.dropout: pointwise,
    random.feature_dropout: pointwise,
    random.alpha_dropout: pointwise,
    random.feature_alpha_dropout: pointwise,
    random.attention_with_dropout: attention,
    random.rand_like: pointwise,
    random.randn_like: pointwise,
    random.rand: constant,
    random.randn: constant,
}
"""Random operators: every piece is drawn by its place."""

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
