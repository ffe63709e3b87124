"""What every operator does to its dims: one line each (the notation is in factors.py), or a function of the shapes.

Pointwise operators need no line: torch tags them. An operator without a rule runs whole.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from meshwright.compiler.errors import PlanError
from meshwright.passes.factors import Factors, Rule, instantiate
from meshwright.passes.rules.call import Call, RuleFunction, Rules
from meshwright.passes.rules.cuts import CUTS
from meshwright.passes.rules.images import IMAGES
from meshwright.passes.rules.indexing import INDEXING
from meshwright.passes.rules.layers import LAYERS, attention
from meshwright.passes.rules.losses import LOSSES
from meshwright.passes.rules.pointwise import POINTWISE, is_pointwise, pointwise
from meshwright.passes.rules.products import PRODUCTS
from meshwright.passes.rules.recurrent import RECURRENT
from meshwright.passes.rules.reductions import REDUCTIONS
from meshwright.passes.rules.views import VIEWS, constant
from meshwright.runtime import random

__all__ = [
    "DEFAULT_RULES",
    "RANDOM_RULES",
    "Call",
    "RuleFunction",
    "Rules",
    "a_rule_for",
    "by_overload",
    "factors_of",
    "is_pointwise",
]


def _drawn(rule: RuleFunction) -> RuleFunction:
    """Every piece is drawn by its place, which equal pieces tell by their lengths."""

    def drawn(call: Call) -> Factors:
        factors = rule(call)
        assert factors is not None
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

DEFAULT_RULES: Rules = {
    **POINTWISE, **PRODUCTS, **LAYERS, **IMAGES, **RECURRENT, **INDEXING, **LOSSES, **REDUCTIONS, **VIEWS, **CUTS,
    **RANDOM_RULES,
}  # fmt: skip


def by_overload(rules: Mapping[Any, Rule | RuleFunction]) -> Rules:
    """Rules by the overloads that graphs call: ``torch.ops.mylib.op``, or what ``torch.library.custom_op`` returns, may
    stand for its one overload. Raises PlanError where there are several.
    """
    return {_overload(operator): rule for operator, rule in rules.items()}


def _overload(operator: Any) -> Any:
    operator = getattr(operator, "_opoverload", operator)
    if not isinstance(operator, torch._ops.OpOverloadPacket):
        return operator
    names = operator.overloads()
    if len(names) != 1:
        ways = ", ".join(f"torch.ops.{operator}.{name}" for name in names)
        raise PlanError(f"a rule for {operator} may be one for any of its overloads\n  name one of them: {ways}")
    return getattr(operator, names[0])


def factors_of(call: Call, rules: Rules) -> Factors | None:
    """The factors of a call, or None where no rule knows the operator, or its rule not such a call."""
    rule = rules.get(call.target)
    if rule is None and is_pointwise(call.target):
        rule = pointwise
    if rule is None:
        return None
    if isinstance(rule, Rule):
        return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))
    return rule(call)


def a_rule_for(target: Any) -> str:
    """How a user adds the rule that an operator lacks, for messages."""
    return (
        f'add a rule: rules={{**DEFAULT_RULES, torch.ops.{target}: Rule("...")}}, proven with '
        "meshwright.testing.check_rule"
    )
