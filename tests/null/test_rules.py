"""Every operator rule, proven by brute force; a rule without a case fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Value
from meshwright.passes.factors import Rule, of_view, parse
from meshwright.passes.rules import DEFAULT_RULES, RANDOM_RULES, Call, factors_of
from meshwright.runtime import batch_norm, store
from meshwright.testing import check_rule

aten = torch.ops.aten


def _x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


WHOLE = {aten.max.default, aten.min.default, aten.all.default, aten.any.default, aten.prod.default}
"""Of these a rule promises nothing but that they are known: they take everything whole."""

FIXED = {
    F.cross_entropy: (2,),
    aten.batch_norm.default: (3, 4),
    batch_norm: (1, 2),
    aten.soft_margin_loss.default: (1,),
    aten.binary_cross_entropy.default: (1, 2),
    aten.binary_cross_entropy_with_logits.default: (1, 2),
}
"""Operands that torch has no gradient for."""

CASES: dict[Any, list[Callable[[], tuple[list[Any], dict[str, Any]]]]] = {
    aten.to.dtype: [lambda: ([_x(4, 6), torch.float64], {})],
    aten.linear.default: [lambda: ([_x(2, 4, 6), _x(8, 6)], {}), lambda: ([_x(4, 6), _x(8, 6)], {})],
    aten.matmul.default: [
        lambda: ([_x(2, 4, 6), _x(6, 8)], {}),
        lambda: ([_x(2, 4, 6), _x(2, 6, 8)], {}),
        lambda: ([_x(6), _x(6, 4)], {}),
        lambda: ([_x(4, 6), _x(6)], {}),
    ],
    aten.mm.default: [lambda: ([_x(4, 6), _x(6, 8)], {})],
    aten.bmm.default: [lambda: ([_x(2, 4, 6), _x(2, 6, 8)], {})],
    aten.embedding.default: [lambda: ([_x(10, 6), _ids(10, 4, 6)], {}), lambda: ([_x(10, 6), _ids(10, 4, 6), 3], {})],
    aten.layer_norm.default: [lambda: ([_x(4, 6, 8), [8], _x(8), _x(8)], {}), lambda: ([_x(4, 6, 8), [6, 8]], {})],
    aten.rms_norm.default: [lambda: ([_x(4, 6, 8), [8], _x(8)], {})],
    aten.softmax.int: [lambda: ([_x(4, 6, 8), -1], {}), lambda: ([_x(4, 6, 8), 1], {})],
    aten.log_softmax.int: [lambda: ([_x(4, 6, 8), -1], {})],
    aten.scaled_dot_product_attention.default: [
        lambda: ([_x(2, 4, 6, 8), _x(2, 4, 6, 8), _x(2, 4, 6, 8)], {"is_causal": True}),
        lambda: ([_x(2, 4, 6, 8), _x(2, 2, 6, 8), _x(2, 2, 6, 8)], {"is_causal": True, "enable_gqa": True}),
        lambda: ([_x(2, 4, 6, 8), _x(2, 4, 6, 8), _x(2, 4, 6, 8), _x(2, 1, 6, 6)], {}),
        lambda: ([_x(2, 4, 6, 8), _x(2, 4, 6, 8), _x(2, 4, 6, 8), _x(6, 6)], {"scale": 0.3}),
    ],
    F.cross_entropy: [
        lambda: ([_x(8, 10), _ids(10, 8)], {"reduction": "sum"}),
        lambda: ([_x(8, 10), _ids(10, 8), _x(10).abs()], {"reduction": "sum", "label_smoothing": 0.1}),
        lambda: ([_x(8, 10), _x(8, 10).softmax(-1)], {"reduction": "sum"}),
        lambda: ([_x(8, 10), _x(8, 10).softmax(-1), _x(10).abs()], {"reduction": "sum", "label_smoothing": 0.1}),
    ],
    aten.sum.default: [lambda: ([_x(4, 6)], {})],
    aten.sum.dim_IntList: [lambda: ([_x(4, 6, 8), [1]], {}), lambda: ([_x(4, 6, 8), [0, -1], True], {})],
    aten.mean.default: [lambda: ([_x(4, 6)], {})],
    aten.mean.dim: [lambda: ([_x(4, 6, 8), [-1], True], {})],
    aten.amax.default: [lambda: ([_x(4, 6, 8), [1]], {})],
    aten.cumsum.default: [lambda: ([_x(4, 6), 1], {})],
    aten.view.default: [
        lambda: ([_x(4, 6, 8), [24, 8]], {}),
        lambda: ([_x(4, 12), [4, 2, 6]], {}),
        lambda: ([_x(4, 12), [4, 6, 2]], {}),
    ],
    aten.reshape.default: [lambda: ([_x(4, 6, 8), [4, 48]], {})],
    aten.flatten.using_ints: [lambda: ([_x(4, 6, 8), 1, 2], {})],
    aten.unflatten.int: [lambda: ([_x(4, 12), 1, [-1, 3]], {})],
    aten.unsqueeze.default: [lambda: ([_x(4, 6), 1], {})],
    aten.squeeze.dim: [lambda: ([_x(4, 1, 6), 1], {})],
    aten.squeeze.default: [lambda: ([_x(4, 1, 6)], {})],
    aten.expand.default: [lambda: ([_x(4, 1, 6), [4, 2, 6]], {})],
    aten.transpose.int: [lambda: ([_x(4, 6, 8), 1, 2], {})],
    aten.permute.default: [lambda: ([_x(4, 6, 8), [2, 0, 1]], {})],
    aten.slice.Tensor: [lambda: ([_x(4, 6), 1, 2, 5], {})],
    aten.select.int: [lambda: ([_x(4, 6), 1, 2], {})],
    aten.split.Tensor: [lambda: ([_x(4, 12), 6, 1], {}), lambda: ([_x(4, 12), 4, 1], {})],
    aten.chunk.default: [lambda: ([_x(4, 12), 3, 1], {})],
    aten.cat.default: [lambda: ([[_x(4, 6), _x(4, 6)], 1], {}), lambda: ([[_x(4, 6), _x(2, 6)], 0], {})],
    aten.pad.default: [lambda: ([_x(4, 6), [0, 2]], {}), lambda: ([_x(4, 6), [1, 0], "constant", 3.0], {})],
    aten.where.Scalar: [lambda: ([_x(4, 6) > 0, 1.0, 2.0], {})],
    aten.where.ScalarSelf: [lambda: ([_x(4, 6) > 0, 1.0, _x(4, 6)], {})],
    aten.where.ScalarOther: [lambda: ([_x(4, 6) > 0, _x(4, 6), 2.0], {})],
    aten.floor_divide.default: [lambda: ([_ids(9, 4, 6), _ids(3, 6) + 1], {})],
    aten.floor_divide.Scalar: [lambda: ([_ids(9, 4, 6), 2], {})],
    aten.real.default: [lambda: ([torch.complex(_x(4, 6), _x(4, 6))], {})],
    aten.imag.default: [lambda: ([torch.complex(_x(4, 6), _x(4, 6))], {})],
    aten.conj.default: [lambda: ([torch.complex(_x(4, 6), _x(4, 6))], {})],
    aten.mv.default: [lambda: ([_x(4, 6), _x(6)], {})],
    aten.dot.default: [lambda: ([_x(6), _x(6) + 1], {})],
    aten.baddbmm.default: [
        lambda: ([_x(2, 4, 8), _x(2, 4, 6), _x(2, 6, 8)], {"beta": 0.5}),
        lambda: ([_x(2, 1, 8), _x(2, 4, 6), _x(2, 6, 8)], {}),
    ],
    aten.einsum.default: [
        lambda: (["bhqd,bhkd->bhqk", [_x(2, 4, 6, 8), _x(2, 4, 2, 8)]], {}),
        lambda: (["ij, jk -> ik", [_x(4, 6), _x(6, 8)]], {}),
    ],
    aten.conv1d.default: [
        lambda: ([_x(2, 4, 9), _x(6, 4, 3), _x(6), [2], [1]], {}),
        lambda: ([_x(2, 4, 9), _x(6, 4, 3)], {}),
        lambda: ([_x(2, 4, 9), _x(4, 1, 3), _x(4), [1], [2], [1], 4], {}),
    ],
    aten.conv2d.default: [
        lambda: ([_x(2, 4, 5, 6), _x(6, 4, 2, 3), _x(6)], {}),
        lambda: ([_x(2, 4, 5, 6), _x(6, 4, 2, 3)], {}),
    ],
    aten.conv3d.default: [lambda: ([_x(2, 4, 3, 5, 4), _x(6, 4, 2, 3, 2)], {})],
    aten.conv_transpose1d.default: [
        lambda: ([_x(2, 4, 9), _x(4, 6, 3), _x(6)], {}),
        lambda: ([_x(2, 4, 9), _x(4, 6, 3)], {}),
    ],
    aten.conv_transpose2d.input: [lambda: ([_x(2, 4, 5, 6), _x(4, 6, 2, 3), None, [2, 1]], {})],
    aten.conv_transpose3d.input: [lambda: ([_x(2, 4, 3, 2, 3), _x(4, 6, 2, 3, 2)], {})],
    aten.avg_pool1d.default: [lambda: ([_x(2, 4, 8), [2]], {})],
    aten.avg_pool2d.default: [lambda: ([_x(2, 4, 8, 6), [2, 3]], {})],
    aten.avg_pool3d.default: [lambda: ([_x(2, 4, 4, 6, 4), [2, 3, 2]], {})],
    aten.max_pool1d.default: [lambda: ([_x(2, 4, 8), [2]], {})],
    aten.max_pool2d.default: [lambda: ([_x(2, 4, 8, 6), [2, 3]], {})],
    aten.max_pool3d.default: [lambda: ([_x(2, 4, 4, 6, 4), [2, 3, 2]], {})],
    aten.adaptive_avg_pool1d.default: [lambda: ([_x(2, 4, 8), [1]], {})],
    aten.adaptive_avg_pool2d.default: [lambda: ([_x(2, 4, 8, 6), [2, 1]], {})],
    aten.adaptive_avg_pool3d.default: [lambda: ([_x(2, 4, 4, 6, 4), [2, 1, 1]], {})],
    aten.group_norm.default: [lambda: ([_x(4, 6, 5), 3, _x(6), _x(6)], {})],
    aten.instance_norm.default: [lambda: ([_x(4, 6, 5), _x(6), _x(6), None, None, True, 0.1, 1e-5, False], {})],
    aten.batch_norm.default: [
        lambda: ([_x(4, 6, 5), _x(6), _x(6), None, None, True, 0.1, 1e-5, False], {}),
        lambda: ([_x(4, 6), _x(6), _x(6), _x(6), _x(6).abs(), False, 0.1, 1e-5, False], {}),
    ],
    batch_norm: [
        lambda: ([_x(4, 6, 5), _x(6), _x(6).abs(), _x(6), _x(6), True], {"momentum": 0.1, "eps": 1e-5}),
        lambda: ([_x(4, 6, 5), None, None, _x(6), None, True], {"eps": 1e-5}),
    ],
    aten._weight_norm_interface.default: [
        lambda: ([_x(4, 6, 8), _x(1, 1, 8), 2], {}),
        lambda: ([_x(4, 6), _x(4, 1)], {}),
    ],
    aten.gather.default: [lambda: ([_x(4, 6), 1, _ids(6, 4, 2)], {}), lambda: ([_x(8, 6), 0, _ids(8, 4, 6)], {})],
    aten.scatter.src: [lambda: ([_x(4, 6), 1, _ids(6, 4, 1), _x(4, 1)], {})],
    aten.scatter.value: [lambda: ([_x(4, 6), 1, _ids(6, 4, 2), 3.0], {})],
    aten.scatter_add.default: [lambda: ([_x(4, 6), 1, _ids(6, 4, 2), _x(4, 2)], {})],
    aten.index_select.default: [lambda: ([_x(4, 6, 2), 1, _ids(6, 4)], {})],
    aten.index.Tensor: [
        lambda: ([_x(4, 6, 8), [None, _ids(6, 2)]], {}),
        lambda: ([_x(4, 6, 8), [_ids(4, 2, 1), _ids(6, 4)]], {}),
        lambda: ([_x(4, 6, 8), [_ids(4, 2), None, _ids(8, 2)]], {}),
    ],
    aten.one_hot.default: [lambda: ([_ids(5, 4, 6), 5], {})],
    aten.mse_loss.default: [
        lambda: ([_x(4, 6), _x(4, 6) + 1, 0], {}),
        lambda: ([_x(4, 6), _x(4, 6) + 1, 1], {}),
        lambda: ([_x(4, 6), _x(4, 6) + 1, 2], {}),
    ],
    aten.l1_loss.default: [lambda: ([_x(4, 6), _x(4, 6) + 1], {})],
    aten.smooth_l1_loss.default: [lambda: ([_x(4, 6), _x(4, 6) + 1], {})],
    aten.huber_loss.default: [lambda: ([_x(4, 6), _x(4, 6) + 1, 2], {})],
    aten.soft_margin_loss.default: [lambda: ([_x(4, 6), _x(4, 6).sign()], {})],
    aten.binary_cross_entropy.default: [lambda: ([_x(4, 6).sigmoid(), _x(4, 6).sigmoid(), _x(6).abs()], {})],
    aten.binary_cross_entropy_with_logits.default: [
        lambda: ([_x(4, 6), _x(4, 6).sigmoid(), None, _x(6).abs()], {}),
        lambda: ([_x(4, 6), _x(4, 6).sigmoid()], {}),
    ],
    aten.kl_div.default: [lambda: ([_x(4, 6), _x(4, 6).softmax(-1), 2], {})],
    **{op: [lambda: ([_x(4, 6)], {})] for op in WHOLE},
    aten.amin.default: [lambda: ([_x(4, 6, 8), [1]], {})],
    **{
        op: [lambda: ([_x(4, 6, 8), 1], {})]
        for op in (
            aten.all.dim,
            aten.any.dim,
            aten.prod.dim_int,
            aten.argmax.default,
            aten.argmin.default,
            aten.max.dim,
            aten.min.dim,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.sort.default,
            aten.argsort.default,
        )
    },
    **{op: [lambda: ([_x(4, 6, 8), [1]], {})] for op in (aten.logsumexp.default, aten.var.dim, aten.std.dim)},
    **{
        op: [lambda: ([_x(4, 6, 8), [1]], {"correction": 1, "keepdim": True})]
        for op in (aten.var.correction, aten.std.correction)
    },
    aten.linalg_vector_norm.default: [lambda: ([_x(4, 6, 8), 2, [-1], True], {}), lambda: ([_x(4, 6)], {})],
    aten.norm.ScalarOpt_dim: [lambda: ([_x(4, 6, 8), 2.0, [1]], {})],
    aten.topk.default: [lambda: ([_x(4, 6, 8), 3, 1], {}), lambda: ([_x(4, 6), 3], {})],
    **{op: [lambda: ([_x(4, 6)], {})] for op in (aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default)},
    **{
        op: [lambda: ([_x(4, 6), 5, 0], {})]
        for op in (aten.fft_irfft.default, aten.fft_hfft.default, aten.fft_ihfft.default)
    },
    aten.split_with_sizes.default: [lambda: ([_x(4, 12), [4, 8], 1], {})],
    aten.stack.default: [lambda: ([[_x(4, 6), _x(4, 6)], 1], {}), lambda: ([[_x(4, 6), _x(4, 6)], -1], {})],
    aten.roll.default: [lambda: ([_x(4, 6, 8), [2], [1]], {})],
    aten.flip.default: [lambda: ([_x(4, 6, 8), [1]], {})],
    aten.tril.default: [lambda: ([_x(4, 6, 6)], {})],
    aten.triu.default: [lambda: ([_x(4, 6, 6), 1], {})],
    aten.slice_scatter.default: [lambda: ([_x(4, 6), _x(4, 3), 1, 2, 5], {})],
    aten.select_scatter.default: [lambda: ([_x(4, 6, 8), _x(4, 8), 1, 2], {}), lambda: ([_x(4, 6), _x(6), 0, 1], {})],
    aten.view_as_complex.default: [lambda: ([_x(4, 6, 2)], {})],
    aten.view_as_real.default: [lambda: ([torch.complex(_x(4, 6), _x(4, 6))], {})],
    aten.full_like.default: [lambda: ([_x(4, 6), 3.0], {})],
    aten.detach.default: [lambda: ([_x(4, 6)], {})],
    aten.zeros_like.default: [lambda: ([_x(4, 6)], {})],
    aten.ones_like.default: [lambda: ([_x(4, 6)], {})],
}
CONSTANTS: dict[Any, list[Any]] = {aten.zeros.default: [], aten.ones.default: [], aten.full.default: [2.5]}
"""Without an operand, and their arguments behind the shape."""
ELSEWHERE = {*CONSTANTS, *RANDOM_RULES, store}
"""Proven below, in test_random.py, and in gloo/test_written.py."""

POINTWISE: list[tuple[Any, list[Any]]] = [
    (aten.add.Tensor, [_x(2, 4, 6), _x(4, 6)]),
    (aten.sub.Tensor, [_x(4, 6), _x(4, 1)]),
    (aten.mul.Tensor, [_x(4, 6), _x(6)]),
    (aten.div.Tensor, [_x(4, 6), _x(4, 6)]),
    (aten.neg.default, [_x(4, 6)]),
    (aten.silu.default, [_x(4, 6)]),
    (aten.gelu.default, [_x(4, 6)]),
    (aten.relu.default, [_x(4, 6)]),
    (aten.pow.Tensor_Scalar, [_x(4, 6), 2]),
    (aten.masked_fill.Scalar, [_x(4, 6), _x(4, 6) > 0, 0]),
    (aten.where.self, [_x(4, 6) > 0, _x(4, 6), _x(1, 6)]),
    (aten.frexp.Tensor, [_x(4, 6)]),  # with two results
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
        check_rule(aten.softmax.int, Rule("... d -> ... d"), [_x(4, 6), -1])
    with pytest.raises(PlanError, match="is not linear in its operands"):
        check_rule(aten.linear.default, Rule("... i, o i -> ... o", linear=((0, 1),)), [_x(4, 6), _x(8, 6)])


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
