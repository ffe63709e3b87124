"""The type of a value on one mesh axis: how the value and its gradient lie over the ranks of that axis.

============  ============================================  ==============================================
type          the value                                     its gradient
============  ============================================  ==============================================
``S(d)``      split along tensor dim ``d``                  split likewise
``S(d/g)``    dim ``d`` seen as g equal blocks, each split  split likewise
``R``         the same everywhere (replicated)              partial: the true one is the sum over the axis
``I``         the same everywhere (invariant)               the same everywhere, already summed
``P``         partial: the true value is the sum            the same everywhere
============  ============================================  ==============================================
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy

from meshwright.compiler.errors import PlanError

Kind = Literal["S", "R", "I", "P"]
Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True, slots=True)
class Type:
    """One of ``S(dim)``, ``S(dim/groups)``, ``R``, ``I``, ``P``. ``dim`` and ``groups`` belong to ``S`` alone.

    ``groups`` is the number of equal blocks that the dim consists of, each of which is split on its own (1: the dim is
    split as it is). It may be a symbolic size for activations.
    """

    kind: Kind
    dim: int = -1
    groups: Size = 1

    def __post_init__(self) -> None:
        if (self.kind == "S") != (self.dim >= 0):
            raise ValueError(f"a dim belongs to a split type and to no other: {self.kind} with dim {self.dim}")

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim})" if self.groups == 1 else f"S({self.dim}/{self.groups})"

    @property
    def is_split(self) -> bool:
        return self.kind == "S"


R = Type("R")
I = Type("I")  # noqa: E741  the name of the type in the literature
P = Type("P")


def S(dim: int, groups: Size = 1) -> Type:
    """The type split along ``dim``, seen as ``groups`` equal blocks."""
    return Type("S", dim, groups)


Types = Mapping[str, Type]
"""A type per mesh axis. An axis that is absent has type ``I``: nothing happens on it."""

_TYPE = re.compile(r"^(?:(?P<plain>[RIP])|S\((?P<dim>\d+)(?:/(?P<groups>\w+))?\))$")


def parse_type(text: str) -> Type:
    """Read ``"R"``, ``"I"``, ``"P"``, ``"S(0)"`` or ``"S(0/3)"``. Raises PlanError for anything else."""
    match = _TYPE.match(text.replace(" ", ""))
    if match is None:
        raise PlanError(
            f"{text!r} is not a type: types are I, R, P, S(dim) and S(dim/groups), as in 'S(0)' or 'S(0/3)'"
        )
    if match["plain"]:
        return Type(match["plain"])  # type: ignore[arg-type]
    groups = match["groups"] or "1"
    return S(int(match["dim"]), int(groups) if groups.isdigit() else sympy.Symbol(groups, positive=True, integer=True))


@dataclass(frozen=True, slots=True)
class Held:
    """The type of a parameter on one axis: ``rest`` between steps, ``use`` in the forward.

    Where they differ the runtime converts: ``I -> R`` sums the gradient over the axis once per step, ``S(0) -> R``
    gathers the parameter and scatters its gradient (ZeRO-3).
    """

    rest: Type
    use: Type

    def __str__(self) -> str:
        return str(self.rest) if self.rest == self.use else f"{self.rest} -> {self.use}"
