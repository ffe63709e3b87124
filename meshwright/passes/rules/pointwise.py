"""Operators that work element by element."""

from dataclasses import replace
from typing import Any

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import Call, RuleFunction, Rules, same_shape
from meshwright.runtime.buffers import store

aten = torch.ops.aten


def is_pointwise(target: Any) -> bool:
    """Whether torch tags an operator as pointwise."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def pointwise(call: Call) -> Factors:
    """Every dim of the results, with the operands that are not broadcast along it."""
    count, shape = len(call.results), call.results[0].shape
    ndim = len(shape)
    operands = [value for value in call.operands if value is not None]
    factors = []
    for dim, size in enumerate(shape):
        places, alike = [], True
        for value in operands:
            here = dim - (ndim - len(value.shape))
            places.append(Place(here) if here >= 0 and value.shape[here] == size else None)
            alike = alike and (here < 0 or value.shape[here] in (1, size))  # else equal for some batches only
        whole = size == 1 or not alike
        factors.append(Factor(size=size, operands=tuple(places), results=(Place(dim),) * count, whole=whole))
    return Factors(factors=tuple(factors), linear=_linear(call))


def along_whole(position: int, name: str = "dim") -> RuleFunction:
    """Element by element, but along the dim that the argument at ``position`` names, which stays whole."""

    def rule(call: Call) -> Factors:
        factors = pointwise(call).factors
        dim = call.argument(position, name, -1) % len(factors)
        return Factors(factors=tuple(replace(f, whole=f.whole or i == dim) for i, f in enumerate(factors)))

    return rule


_LINEAR: dict[Any, tuple[tuple[int, ...], ...]] = {
    aten.neg.default: ((0,),),
    aten.to.dtype: ((0,),),
    aten.add.Tensor: ((0, 1),),
    aten.sub.Tensor: ((0, 1),),
    aten.mul.Tensor: ((0,), (1,)),
    aten.mul.Scalar: ((0,),),
    aten.div.Tensor: ((0,),),
    aten.div.Scalar: ((0,),),
}
"""Pointwise operators that are linear, in which operands (together)."""


def _linear(call: Call) -> tuple[frozenset[int], ...]:
    count = sum(value is not None for value in call.operands)
    groups = _LINEAR.get(call.target, ())
    if call.target in (aten.add.Tensor, aten.sub.Tensor) and count < 2:
        return ()  # x + 1 is affine
    if call.target is aten.to.dtype and not call.results[0].dtype.is_floating_point:
        return ()
    if call.target is aten.masked_fill.Scalar and call.args[2] == 0:
        groups = ((0,),)
    return tuple(frozenset(group) for group in groups if all(position < count for position in group))


POINTWISE: Rules = {
    # pointwise, though torch does not tag them
    aten.to.dtype: pointwise,
    aten.where.Scalar: pointwise,
    aten.where.ScalarSelf: pointwise,
    aten.where.ScalarOther: pointwise,
    aten.floor_divide.default: pointwise,
    aten.floor_divide.Scalar: pointwise,
    aten.rsub.Tensor: pointwise,
    aten.hardswish.default: pointwise,
    aten.log_sigmoid.default: pointwise,
    aten._prelu_kernel.default: pointwise,
    aten.masked_fill.Tensor: pointwise,
    aten.complex.default: pointwise,
    aten.polar.default: pointwise,
    aten.detach.default: same_shape,
    store: pointwise,
    aten.real.default: same_shape,
    aten.imag.default: same_shape,
    aten.conj.default: same_shape,
}
"""Those that torch does not tag as pointwise; the others need no line."""
