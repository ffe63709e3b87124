"""Causal masks proven causal: the element of a mask, followed back to where it comes from, as an expression of its
indices.

Transformers builds a mask of (B, 1, T, T) from dozens of operators under export, where eager code passes
``is_causal=True``. If the element at (..., query, key) is provably ``key <= query``, the flag does the same for free.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from meshwright.compiler.rewriting import aten, shape_of

Indices: TypeAlias = tuple[sympy.Expr, ...]
Element: TypeAlias = sympy.Expr | Boolean


class _UnknownElement(Exception):
    """The element depends on data, or on an operator that is not in the table."""


def is_causal(mask: fx.Node, constants: Mapping[fx.Node, torch.Tensor]) -> bool:
    """Whether every element of the boolean ``mask`` (..., T, T) is True exactly where key <= query.

    Exact: False whenever the proof does not go through. Queries and keys have to be equally many, as torch aligns the
    causal mask at the first query and key. constants: tensors that the model's code made, with their values.
    """
    value = mask.meta["val"]
    sizes = shape_of(value)
    if value.dtype != torch.bool or len(sizes) < 2 or sizes[-1] != sizes[-2]:
        return False
    indices = tuple(sympy.Symbol(f"i{dim}", integer=True, nonnegative=True) for dim in range(len(sizes)))
    try:
        found = _Follower(constants).element(mask, indices)
    except _UnknownElement:
        return False
    return _is_at_most(found, indices[-1], indices[-2])


def _is_at_most(found: Element, key: sympy.Expr, query: sympy.Expr) -> bool:
    """Whether a condition on integers says key <= query."""
    if isinstance(found, (sympy.Le, sympy.Ge, sympy.Lt, sympy.Gt)):
        low, high = (found.lhs, found.rhs) if isinstance(found, (sympy.Le, sympy.Lt)) else (found.rhs, found.lhs)
        slack = 1 if isinstance(found, (sympy.Lt, sympy.Gt)) else 0
        return bool(sympy.expand(high - low - (query - key)) == slack)
    return False


class _Follower:
    def __init__(self, constants: Mapping[fx.Node, torch.Tensor]):
        self.constants = constants

    def element(self, node: Any, at: Indices) -> Element:
        """The element of ``node`` at ``at``. Raises _UnknownElement."""
        if isinstance(node, bool):
            return sympy.true if node else sympy.false
        if isinstance(node, int):
            return sympy.Integer(node)
        if not isinstance(node, fx.Node):
            raise _UnknownElement(f"{node!r}")
        if node in self.constants:
            return self._constant(self.constants[node])
        rule = _RULES.get(node.target)
        if rule is None:
            raise _UnknownElement(str(node.target))
        return rule(self, node, at)

    def _constant(self, tensor: torch.Tensor) -> Element:
        if tensor.numel() != 1 or tensor.is_floating_point():
            raise _UnknownElement("a constant of several elements")
        return self.element(tensor.item(), ())

    def broadcast(self, argument: Any, at: Indices) -> Element:
        """The element of an operand that is broadcast to the result that ``at`` indexes."""
        if not isinstance(argument, fx.Node):
            return self.element(argument, ())
        sizes = shape_of(argument.meta["val"])
        own = at[len(at) - len(sizes) :]
        return self.element(argument, tuple(sympy.Integer(0) if s == 1 else i for s, i in zip(sizes, own, strict=True)))


def _arange(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    start = node.args[0] if node.target is not aten.arange.default else 0
    step = node.args[2] if len(node.args) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        raise _UnknownElement("arange from a symbolic start")
    return start + step * at[0]


def _filled(value: int | None) -> "_Rule":
    def rule(follow: _Follower, node: fx.Node, at: Indices) -> Element:
        filled = node.args[1] if value is None else value
        is_bool = node.meta["val"].dtype == torch.bool
        return follow.element(bool(filled) if is_bool else filled, ())

    return rule


def _unsqueeze(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    dim = node.args[1] % len(at)  # type: ignore[operator]
    return follow.element(node.args[0], (*at[:dim], *at[dim + 1 :]))  # type: ignore[index, operator]


def _same_but_ones(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    """A view that adds and removes dims of size 1 alone."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    before, after = shape_of(source.meta["val"]), shape_of(node.meta["val"])
    if [s for s in before if s != 1] != [s for s in after if s != 1]:
        raise _UnknownElement("a view that merges or splits dims")
    rest = [i for i, s in zip(at, after, strict=True) if s != 1]
    return follow.element(source, tuple(sympy.Integer(0) if s == 1 else rest.pop(0) for s in before))


def _slice(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    dim, start, _, step = (*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :])  # type: ignore[misc]
    if not isinstance(start, (int, type(None))) or (start or 0) < 0 or step != 1:
        raise _UnknownElement("a slice from the end")
    moved = list(at)
    moved[dim] = moved[dim] + (start or 0)  # type: ignore[index]
    return follow.element(node.args[0], tuple(moved))


def _cast(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if before != after and (before == torch.bool or after in (torch.bool, torch.uint8, torch.int8)):
        raise _UnknownElement("a cast that changes values")
    return follow.element(node.args[0], at)


def _two(combine: Callable[[Any, Any], Any]) -> "_Rule":
    def rule(follow: _Follower, node: fx.Node, at: Indices) -> Element:
        if node.kwargs.get("alpha", 1) != 1:
            raise _UnknownElement("alpha")
        return combine(*(follow.broadcast(argument, at) for argument in node.args[:2]))

    return rule


def _diff(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    """Differences of neighbours with one value put in front, where all of them are the same number."""
    source, order, dim, front, *rest = (*node.args, *(1, -1, None, None)[len(node.args) - 1 :])  # type: ignore[misc]
    dim %= len(at)  # type: ignore[operator]
    if order != 1 or rest != [None] or not isinstance(front, fx.Node) or shape_of(front.meta["val"])[dim] != 1:  # type: ignore[index]
        raise _UnknownElement("diff of another form")

    def moved(index: Any) -> Indices:
        return (*at[:dim], sympy.sympify(index), *at[dim + 1 :])  # type: ignore[index, operator]

    inside = sympy.simplify(follow.element(source, at) - follow.element(source, moved(at[dim] - 1)))  # type: ignore[index]
    first = sympy.simplify(follow.element(source, moved(0)) - follow.element(front, moved(0)))
    if not inside.is_number or inside != first:
        raise _UnknownElement("differences that are not all the same")
    return inside


def _cumsum(follow: _Follower, node: fx.Node, at: Indices) -> Element:
    """The running sum of nothing."""
    if follow.element(node.args[0], at) not in (sympy.false, sympy.Integer(0)):
        raise _UnknownElement("a running sum")
    return sympy.Integer(0)


_Rule = Callable[[_Follower, fx.Node, Indices], Element]

_RULES: Mapping[Any, _Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.ones.default: _filled(1),
    aten.zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_zeros.default: _filled(0),
    aten.full.default: _filled(None),
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _same_but_ones,
    aten.reshape.default: _same_but_ones,
    aten.squeeze.dim: _same_but_ones,
    aten.expand.default: lambda follow, node, at: follow.broadcast(node.args[0], at),
    aten.slice.Tensor: _slice,
    aten.to.dtype: _cast,
    aten.detach.default: _cast,
    aten.diff.default: _diff,
    aten.cumsum.default: _cumsum,
    aten.eq.Tensor: _two(sympy.Eq),
    aten.eq.Scalar: _two(sympy.Eq),
    aten.ne.Tensor: _two(sympy.Ne),
    aten.ne.Scalar: _two(sympy.Ne),
    aten.add.Tensor: _two(lambda a, b: a + b),
    aten.sub.Tensor: _two(lambda a, b: a - b),
    aten.le.Tensor: _two(sympy.Le),
    aten.lt.Tensor: _two(sympy.Lt),
    aten.ge.Tensor: _two(sympy.Ge),
    aten.gt.Tensor: _two(sympy.Gt),
    aten.bitwise_and.Tensor: _two(sympy.And),
    aten.bitwise_or.Tensor: _two(sympy.Or),
    aten.logical_and.default: _two(sympy.And),
    aten.logical_or.default: _two(sympy.Or),
}
