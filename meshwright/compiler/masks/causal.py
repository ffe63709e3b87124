"""Causal masks proven causal.

Transformers builds a mask of (B, 1, T, T) from dozens of operators under export, where eager code passes
``is_causal=True``. If the element at (..., query, key) is provably ``key <= query``, the flag does the same for free.
"""

import math
from collections.abc import Mapping

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import fx

from meshwright.compiler.masks.elements import Element, Indices, UnknownElement, each, is_truth, number
from meshwright.compiler.masks.following import Follower
from meshwright.compiler.masks.rules import RULES
from meshwright.compiler.rewriting import shape_of


def is_causal(mask: fx.Node, constants: Mapping[fx.Node, torch.Tensor] | None = None) -> bool:
    """Whether ``mask`` (..., T, T) lets a query see a key exactly where key <= query.

    Boolean masks are True there; additive ones are 0 there and -inf or their dtype's lowest number elsewhere. False
    whenever the proof does not go through. Queries and keys have to be equally many, as torch aligns ``is_causal`` at
    the first query and key. constants: tensors that the model's code made, with their values.
    """
    dtype, sizes = mask.meta["val"].dtype, shape_of(mask.meta["val"])
    if len(sizes) < 2 or sizes[-1] != sizes[-2] or sizes[-1] == 1:  # a single element would be broadcast
        return False
    at = tuple(sympy.Symbol(f"i{dim}", integer=True, nonnegative=True) for dim in range(len(sizes)))
    try:
        found = element(mask, at, constants)
        if dtype.is_floating_point:
            seen = {sympy.S.Zero: sympy.true, -sympy.oo: sympy.false, number(torch.finfo(dtype).min): sympy.false}
            found = each(lambda bias: seen.get(bias, bias), found)
    except UnknownElement:
        return False
    return is_truth(found) and _is_at_most(found, at[-1], at[-2])


def element(node: fx.Node, at: Indices, constants: Mapping[fx.Node, torch.Tensor] | None = None) -> Element:
    """The element of ``node`` at the nonnegative integers ``at``, exact for every length. Raises UnknownElement."""
    return Follower(rules=RULES, constants=constants or {}, known={}).element(node, at)


def _is_at_most(condition: Boolean, key: sympy.Expr, query: sympy.Expr) -> bool:
    """Whether ``condition`` is key <= query for all integers. If it depends on their distance alone, it changes only
    where one of its comparisons does: to try the places around those is to try all."""
    distance = sympy.Symbol("distance", integer=True)
    sides = {c: sympy.expand((c.lhs - c.rhs).subs(query, key + distance)) for c in condition.atoms(Relational)}
    if any(side.free_symbols != {distance} for side in sides.values()):
        return False
    condition = condition.xreplace({comparison: comparison.func(side, 0) for comparison, side in sides.items()})
    turns = {0, *(math.floor(-side.coeff(distance, 0) / side.coeff(distance)) for side in sides.values())}
    places = {turn + step for turn in turns for step in (-1, 0, 1)}
    return all((condition.subs(distance, place) == sympy.true) == (place >= 0) for place in places)
