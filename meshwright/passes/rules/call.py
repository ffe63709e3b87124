"""One call of an operator, and what most rules are made of."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from meshwright.compiler.graph import Value
from meshwright.passes.factors import Factor, Factors, Place, Rule

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call: the operator, its arguments (a tensor among them is a Value) and its results.

    ``operands`` are the tensors among the arguments in order, None for an optional one that is absent.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value | None, ...]
    results: tuple[Value, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def shapes(self) -> tuple[tuple[Any, ...] | None, ...]:
        return tuple(None if value is None else value.shape for value in self.operands)


RuleFunction = Callable[[Call], Factors | None]
"""A rule of the shapes; None where it does not know such a call, which then runs whole."""
Rules = Mapping[Any, Rule | RuleFunction]
ALONE = (frozenset({0}),)
"""Linear in the first operand."""


def same(call: Call, *dims_whole: int, mean: tuple[int, ...] = (), summed: tuple[int, ...] = ()) -> list[Factor]:
    """One factor per dim of the first operand, which the first result has at the same place unless it is reduced."""
    (first, *_), (result, *_) = call.operands, call.results
    assert first is not None
    ndim, kept, factors = len(first.shape), 0, []
    reduced = {*mean, *summed}
    keepdim = len(result.shape) == ndim
    for dim, size in enumerate(first.shape):
        place = None if dim in reduced else Place(dim if keepdim else kept)
        kept += dim not in reduced
        factors.append(
            Factor(
                size=size,
                operands=(Place(dim),),
                results=(place,) * len(call.results),
                whole=dim in dims_whole or size == 1,
                mean=dim in mean,
            )
        )
    return factors


def in_common(call: Call, dims: Iterable[int], linear: tuple[frozenset[int], ...] = ()) -> Factors:
    """All operands and results have ``dims`` at the same place and alike; everything else stays whole."""
    values = [value for value in (*call.operands, *call.results) if value is not None]
    count = len(values) - len(call.results)
    factors = []
    for dim in dims:
        size = values[0].shape[dim]
        alike = all(dim < len(value.shape) and value.shape[dim] == size for value in values)
        places = (Place(dim),) * len(values)
        factors.append(Factor(size=size, operands=places[:count], results=places[count:], whole=size == 1 or not alike))
    return Factors(factors=tuple(factors), linear=linear)


def dim_of(call: Call, position: int = 1, name: str = "dim", default: int = -1) -> int:
    """The dim that an argument names, from the front; the last one where it says none."""
    first = call.operands[0]
    assert first is not None
    dim: int | None = call.argument(position, name, default)
    return (default if dim is None else dim) % max(len(first.shape), 1)


def first_of(call: Call) -> Value:
    """The first operand, which the operator cannot do without."""
    value = call.operands[0]
    assert value is not None
    return value


def same_shape(call: Call) -> Factors:
    """The result is like the first operand, and linear in it."""
    return Factors(factors=tuple(same(call)), linear=ALONE)


def along_whole_dim(call: Call) -> Factors:
    """The dim that ``dim`` names stays whole."""
    return Factors(factors=tuple(same(call, dim_of(call))))


def linear_along_whole_dim(call: Call) -> Factors:
    """The same for what is linear."""
    return Factors(factors=tuple(same(call, dim_of(call))), linear=ALONE)
