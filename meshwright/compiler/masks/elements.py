"""The element of a tensor as an exact expression of its indices: a number, a truth value, or one of two numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean

Indices: TypeAlias = tuple[sympy.Expr, ...]
Element: TypeAlias = "sympy.Expr | Boolean | Choice"


class UnknownElement(Exception):
    """The element depends on data, on an operator that is not in the table, or on arithmetic that may round or wrap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A number that is ``yes`` where ``condition`` holds, else ``no``."""

    condition: Boolean
    yes: Element
    no: Element


def is_truth(found: Element) -> bool:
    """Whether the element is a truth value."""
    return isinstance(found, Boolean) and not isinstance(found, sympy.Expr)  # a sympy.Symbol is both


def number(value: float) -> sympy.Expr:
    """A plain number as an exact one."""
    return sympy.Rational(value) if math.isfinite(value) else sympy.sympify(value)


def choose(condition: Boolean, yes: Element, no: Element) -> Element:
    """``yes`` where ``condition`` holds, else ``no``."""
    if yes == no or condition in (sympy.true, sympy.false):
        return no if condition == sympy.false else yes
    if is_truth(yes) and is_truth(no):
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return Choice(condition=condition, yes=yes, no=no)


def each(function: Callable[..., Element], *elements: Element) -> Element:
    """``function`` of the elements, for either number of every choice among them."""
    for i, choice in enumerate(elements):
        if isinstance(choice, Choice):
            yes, no = (each(function, *elements[:i], one, *elements[i + 1 :]) for one in (choice.yes, choice.no))
            return choose(choice.condition, yes, no)
    return function(*elements)


def read_as(found: Element, dtype: torch.dtype) -> Element:
    """The element as one of ``dtype``. Raises UnknownElement where the dtype might not hold its exact value."""
    if isinstance(found, Choice):
        return each(lambda one: read_as(one, dtype), found)
    if is_truth(found):
        return found if dtype == torch.bool else choose(found, sympy.Integer(1), sympy.Integer(0))
    if dtype == torch.bool:
        return sympy.Ne(found, 0)
    if not (_holds(dtype, found) if found.is_number else dtype == torch.int64 and _is_small(found)):
        raise UnknownElement(f"{found} in {dtype}")
    return found


def _holds(dtype: torch.dtype, exact: sympy.Expr) -> bool:
    if dtype.is_floating_point and exact is not sympy.nan:
        return bool(number(torch.tensor(float(exact), dtype=dtype).item()) == exact)
    if not exact.is_Integer or dtype.is_complex:
        return False
    return bool(torch.iinfo(dtype).min <= exact <= torch.iinfo(dtype).max)


def _is_small(expression: sympy.Expr) -> bool:
    """Whether an expression is linear, and int64 holds it up to lengths of 2**31."""
    terms = sympy.expand(expression).as_coefficients_dict().items()
    return all((term == 1 or term.is_Symbol) and by.is_Integer and abs(by) < 2**20 for term, by in terms)


def constant(tensor: torch.Tensor) -> Element:
    """The element of a constant that has one value everywhere."""
    if tensor.is_meta or tensor.numel() == 0 or not torch.equal(tensor, tensor.flatten()[:1].expand_as(tensor)):
        raise UnknownElement("a constant of several values")
    value = tensor.flatten()[0].item()
    return read_as(sympy.S(value) if isinstance(value, bool) else number(value), tensor.dtype)
