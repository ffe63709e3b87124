"""A tensor's element followed back through the graph, operator by operator, to where it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from meshwright.compiler.masks.elements import Element, Indices, UnknownElement, constant, number, read_as
from meshwright.compiler.masks.in_place import is_written
from meshwright.compiler.rewriting import arguments_of, shape_of

Rule = Callable[["Call"], Element]
"""The element of an operator's result, from the elements of its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """Follows elements by ``rules``, and remembers what it found. constants: the values of tensors that code made."""

    rules: Mapping[Any, Rule]
    constants: Mapping[fx.Node, torch.Tensor]
    known: dict[tuple[fx.Node, Indices], Element]

    def element(self, node: Any, at: Indices) -> Element:
        """The element of ``node``, a value of the graph or a plain number, at ``at``. Raises UnknownElement."""
        if isinstance(node, (int, float)):
            return sympy.S(node) if isinstance(node, bool) else number(node)
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.SymInt):
            return value.node.expr
        if not isinstance(value, torch.Tensor) or is_written(node, reads=self.rules):
            raise UnknownElement(f"{node}")
        if node in self.constants:
            return constant(self.constants[node])
        if node.target not in self.rules:
            raise UnknownElement(f"{node.target}")
        if (node, at) not in self.known:
            call = Call(follow=self, given=arguments_of(node), at=at, result=value)
            self.known[node, at] = read_as(self.rules[node.target](call), value.dtype)
        return self.known[node, at]

    def broadcast(self, argument: Any, at: Indices) -> Element:
        """The element of an operand that is broadcast to the result that ``at`` indexes."""
        sizes = shape_of(example_of(argument)) if isinstance(example_of(argument), torch.Tensor) else ()
        own = zip(sizes, at[len(at) - len(sizes) :], strict=True)
        return self.element(argument, tuple(sympy.Integer(0) if size == 1 else index for size, index in own))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operator, its arguments by the names of its schema, and the place in its result that is asked for."""

    follow: Follower
    given: Mapping[str, Any]
    at: Indices
    result: torch.Tensor

    def operand(self, name: str, dtype: torch.dtype | None = None) -> Element:
        return read_as(self.follow.broadcast(self.given[name], self.at), dtype or self.result.dtype)

    def source(self, at: Indices) -> Element:
        return self.follow.element(self.given["self"], at)

    def moved(self, index: Any) -> Indices:
        """The place with another index along the operator's ``dim``."""
        dim = self.given["dim"] % len(self.at)
        return (*self.at[:dim], sympy.sympify(index), *self.at[dim + 1 :])

    @property
    def along(self) -> sympy.Expr:
        return self.at[self.given["dim"]]


def example_of(argument: Any) -> Any:
    """The fake tensor of a value; a size stands for any whole number."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return 0 if isinstance(value, torch.SymInt) else value
