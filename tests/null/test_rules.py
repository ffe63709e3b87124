"""Every operator rule, proven by brute force; a rule without a case fails."""

from typing import Any

import pytest
import torch

from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Value
from meshwright.passes.factors import Rule, of_view, parse
from meshwright.passes.rules import DEFAULT_RULES, RANDOM_RULES, Call, factors_of
from meshwright.runtime import store
from meshwright.testing import check_rule
from tests.null.rule_cases import CASES, FIXED, WHOLE, x

aten = torch.ops.aten


CONSTANTS: dict[Any, list[Any]] = {aten.zeros.default: [], aten.ones.default: [], aten.full.default: [2.5]}
"""Without an operand, and their arguments behind the shape."""
ELSEWHERE = {*CONSTANTS, *RANDOM_RULES, store}
"""Proven below, in test_random.py, and in gloo/test_written.py."""

POINTWISE: list[tuple[Any, list[Any]]] = [
    (aten.add.Tensor, [x(2, 4, 6), x(4, 6)]),
    (aten.sub.Tensor, [x(4, 6), x(4, 1)]),
    (aten.mul.Tensor, [x(4, 6), x(6)]),
    (aten.div.Tensor, [x(4, 6), x(4, 6)]),
    (aten.neg.default, [x(4, 6)]),
    (aten.silu.default, [x(4, 6)]),
    (aten.gelu.default, [x(4, 6)]),
    (aten.relu.default, [x(4, 6)]),
    (aten.pow.Tensor_Scalar, [x(4, 6), 2]),
    (aten.masked_fill.Scalar, [x(4, 6), x(4, 6) > 0, 0]),
    (aten.where.self, [x(4, 6) > 0, x(4, 6), x(1, 6)]),
    (aten.frexp.Tensor, [x(4, 6)]),  # with two results
]


@pytest.mark.parametrize("operator", CONSTANTS, ids=lambda op: op.__name__)
def test_a_piece_of_a_constant_is_made_with_its_own_shape(operator: Any) -> None:
    rest = CONSTANTS[operator]
    whole = operator([4, 6], *rest)
    value = Value(shape=(4, 6), dtype=whole.dtype, grad=False, made_of="inputs")
    call = Call(target=operator, args=([4, 6], *rest), kwargs={}, operands=(), results=(value,))
    factors = factors_of(call, DEFAULT_RULES)
    assert factors is not None and len(factors.factors) == 2
    for factor in factors.factors:
        (place,) = factor.results
        assert place is not None and not factor.whole
        shape = [4, 6]
        shape[place.dim] //= 2
        for piece in whole.chunk(2, place.dim):
            assert torch.equal(operator(shape, *rest), piece)


@pytest.mark.parametrize("operator", [op for op in DEFAULT_RULES if op not in ELSEWHERE], ids=lambda op: op.__name__)
def test_rule_holds(operator: Any) -> None:
    assert operator in CASES, f"{operator} has a rule and no case here"
    proven = 0
    for case in CASES[operator]:
        args, kwargs = case()
        proven += check_rule(operator, DEFAULT_RULES[operator], args, kwargs, fixed=FIXED.get(operator, ()))
    assert (proven > 0) is (operator not in WHOLE), "a case proves at least one split"


@pytest.mark.parametrize(
    ("operator", "args"), POINTWISE, ids=lambda value: str(value) if not isinstance(value, list) else ""
)
def test_pointwise_operators_need_no_rule(operator: Any, args: list[Any]) -> None:
    assert check_rule(operator, None, args) > 0


def test_a_wrong_rule_is_found() -> None:
    with pytest.raises(PlanError, match="put together, the pieces do not give the result 0"):
        check_rule(aten.softmax.int, Rule("... d -> ... d"), [x(4, 6), -1])
    with pytest.raises(PlanError, match="is not linear in its operands"):
        check_rule(aten.linear.default, Rule("... i, o i -> ... o", linear=((0, 1),)), [x(4, 6), x(8, 6)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a b", "one '->' stands between"),
        ("a -> b", "'b' stands in a result and in no operand"),
        ("a ... -> a", "'...' stands first"),
        ("a& -> a", "'a&' is no factor"),
    ],
)
def test_a_malformed_rule_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as error:
        parse(text)
    assert reason in str(error.value)


def test_factors_of_views() -> None:
    import sympy

    batch, tokens = sympy.symbols("B T", positive=True, integer=True)
    (first, second, third) = of_view((batch, tokens, 64), (batch * tokens, 64))
    assert (first.size, second.size, third.size) == (batch, tokens, 64)
    assert second.results[0] is not None and second.results[0].outer == batch
    assert of_view((6,), (4,)) == ()
