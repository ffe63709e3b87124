"""The element of an operator's result, from the elements of its arguments: one row of the table for each operator."""

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from meshwright.compiler.masks.elements import Element, UnknownElement, choose, each, read_as
from meshwright.compiler.masks.following import Call, Rule, example_of
from meshwright.compiler.rewriting import aten, shape_of


def _filled(value: Callable[[Mapping[str, Any]], Any]) -> Rule:
    return lambda call: call.follow.element(value(call.given), ())


def _arange(call: Call) -> Element:
    start, step = (call.follow.element(call.given.get(*given), ()) for given in (("start", 0), ("step", 1)))
    return start + step * call.at[0]


def _same_but_ones(call: Call) -> Element:
    """A view that adds and removes dims of size 1 alone."""
    before, after = shape_of(call.given["self"].meta["val"]), shape_of(call.result)
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        raise UnknownElement("a view that merges or splits dims")
    rest = iter(index for index, size in zip(call.at, after, strict=True) if size != 1)
    return call.source(tuple(sympy.Integer(0) if size == 1 else next(rest) for size in before))


def _slice(call: Call) -> Element:
    start, step = call.given["start"] or 0, call.given["step"]
    if not isinstance(start, int) or start < 0 or not isinstance(step, int):
        raise UnknownElement("a slice from the end, or by sizes")
    return call.source(call.moved(start + step * call.along))


def _index(call: Call) -> Element:
    """Picked dims give the dims of the pickers: where they stood, if they are neighbours, else in front."""
    sizes = shape_of(call.given["self"].meta["val"])
    pickers = {dim: picker for dim, picker in enumerate(call.given["indices"]) if picker is not None}
    start = min(pickers) if max(pickers) - min(pickers) + 1 == len(pickers) else 0
    stop = start + len(call.at) - len(sizes) + len(pickers)
    picked = {dim: call.follow.broadcast(picker, call.at[start:stop]) for dim, picker in pickers.items()}
    if not all(isinstance(index, sympy.Expr) and index.is_nonnegative for index in picked.values()):
        raise UnknownElement("an index that may count from the end, or a mask")
    kept = iter(call.at[:start] + call.at[stop:])
    return call.source(tuple(picked[dim] if dim in picked else next(kept) for dim in range(len(sizes))))


def _only_value(call: Call, sources: list[fx.Node]) -> Element:
    """The one value that ``sources`` have at all places along the operator's dim."""
    places = [call.moved(sympy.Dummy(integer=True, nonnegative=True)) for _ in range(2)]
    alike = [source for source in sources if len(shape_of(source.meta["val"])) == len(call.at)]
    found = {read_as(call.follow.element(source, place), call.result.dtype) for source in alike for place in places}
    if len(found) != 1:
        raise UnknownElement("several values")
    return found.pop()


def _cumsum(call: Call) -> Element:
    return each(lambda value: value * (call.along + 1), _only_value(call, [call.given["self"]]))


def _diff(call: Call) -> Element:
    """Differences of neighbours, and of the first with what is put in front of it."""
    front = call.given["prepend"]
    is_plain = call.given["n"] == 1 and call.given["append"] is None and call.result.dtype != torch.bool
    if not is_plain or front is None or shape_of(front.meta["val"])[call.given["dim"]] != 1:
        raise UnknownElement("diff of another form")
    first = (call.source(call.moved(0)), call.follow.element(front, call.moved(0)))
    inside = (call.source(call.at), call.source(call.moved(call.along - 1)))
    differences = (each(lambda a, b: sympy.expand(a - b), *pair) for pair in (first, inside))
    return choose(sympy.Eq(call.along, 0), *differences)


def _triangle(keeps: Callable[[Any, Any], Boolean]) -> Rule:
    def rule(call: Call) -> Element:
        kept = keeps(call.at[-1] - call.at[-2], call.follow.element(call.given["diagonal"], ()))
        return choose(kept, call.operand("self"), read_as(sympy.Integer(0), call.result.dtype))

    return rule


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Rule:
    def rule(call: Call) -> Element:
        if call.result.dtype == torch.bool or call.given.get("alpha", 1) != 1:
            raise UnknownElement("arithmetic of another form")
        return each(lambda a, b: sympy.expand(combine(a, b)), call.operand("self"), call.operand("other"))

    return rule


def _compared(relation: Callable[[Any, Any], Boolean]) -> Rule:
    def rule(call: Call) -> Element:
        dtype = torch.result_type(example_of(call.given["self"]), example_of(call.given["other"]))
        number = torch.int64 if dtype == torch.bool else dtype
        return each(relation, call.operand("self", number), call.operand("other", number))

    return rule


def _logical(combine: Callable[..., Boolean]) -> Rule:
    def rule(call: Call) -> Element:
        if call.result.dtype != torch.bool:
            raise UnknownElement("logic on the bits of numbers")
        return combine(*(call.operand(name) for name in ("self", "other") if name in call.given))

    return rule


RULES: Mapping[Any, Rule] = {
    operator_: rule
    for rule, operators in (
        (_arange, (aten.arange.default, aten.arange.start, aten.arange.start_step)),
        (_filled(lambda given: 1), (aten.ones.default, aten.ones_like.default, aten.new_ones.default)),
        (_filled(lambda given: 0), (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)),
        (_filled(lambda given: given["fill_value"]), (aten.full.default, aten.full_like.default,
                                                      aten.new_full.default)),
        (_filled(lambda given: given["s"]), (aten.scalar_tensor.default,)),
        (_same_but_ones, (aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
                          aten.view.default, aten.reshape.default)),
        (lambda call: call.operand("self"), (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)),
        # A cast: every element is read in the dtype of its value.
        (lambda call: call.source(call.at), (
            aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
            aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default,
            aten.detach.default, aten.detach_.default)),
        (_slice, (aten.slice.Tensor,)),
        (_index, (aten.index.Tensor,)),
        (lambda call: _only_value(call, call.given["tensors"]), (aten.cat.default,)),
        (_cumsum, (aten.cumsum.default,)),
        (_diff, (aten.diff.default,)),
        (_triangle(sympy.Le), (aten.tril.default,)),
        (_triangle(sympy.Ge), (aten.triu.default,)),
        (lambda call: choose(call.operand("condition", torch.bool), call.operand("self"), call.operand("other")),
         (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)),
        (lambda call: choose(call.operand("mask", torch.bool), call.operand("value"), call.operand("self")),
         (aten.masked_fill.Scalar, aten.masked_fill.Tensor)),
        (_arithmetic(lambda a, b: a + b), (aten.add.Tensor, aten.add.Scalar)),
        (_arithmetic(lambda a, b: a - b), (aten.sub.Tensor, aten.sub.Scalar)),
        (_arithmetic(lambda a, b: b - a), (aten.rsub.Tensor, aten.rsub.Scalar)),
        (_arithmetic(lambda a, b: a * b), (aten.mul.Tensor, aten.mul.Scalar)),
        (_compared(sympy.Eq), (aten.eq.Tensor, aten.eq.Scalar)),
        (_compared(sympy.Ne), (aten.ne.Tensor, aten.ne.Scalar)),
        (_compared(sympy.Le), (aten.le.Tensor, aten.le.Scalar)),
        (_compared(sympy.Lt), (aten.lt.Tensor, aten.lt.Scalar)),
        (_compared(sympy.Ge), (aten.ge.Tensor, aten.ge.Scalar)),
        (_compared(sympy.Gt), (aten.gt.Tensor, aten.gt.Scalar)),
        (_logical(sympy.And), (aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.logical_and.default)),
        (_logical(sympy.Or), (aten.bitwise_or.Tensor, aten.__or__.Tensor, aten.logical_or.default)),
        (_logical(sympy.Xor), (aten.bitwise_xor.Tensor, aten.__xor__.Tensor, aten.logical_xor.default)),
        (_logical(sympy.Not), (aten.bitwise_not.default, aten.logical_not.default)),
    )
    for operator_ in operators
}  # fmt: skip
