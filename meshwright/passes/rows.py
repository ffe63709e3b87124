"""What may be chosen at each node on one axis: rows of types for its operands and results, from the operator's
factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from meshwright.compiler.graph import Function, Value, is_multiple, is_operator
from meshwright.compiler.types import I, P, R, Size, Type
from meshwright.passes.factors import Factor, Factors, Place, quotient
from meshwright.passes.rules import Call, Rules, factors_of
from meshwright.runtime.layout import largest_piece, suffices

PIECE = "piece"
"""Marks nodes in ``meta`` that compute with a piece: their types hold together, not one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run a node on an axis: the types of its operands and of its results.

    share: the part of the work that a rank does; the largest, where pieces differ. pieces: the name of the lines that
    compute with a piece. mean: the result is the mean of a piece, to be made a part of the whole mean. synchronized:
    the operator is told the axis. as_is: the operands are taken however they lie.
    """

    operands: tuple[Type, ...]
    results: tuple[Type, ...]
    share: float = 1.0
    pieces: str | None = None
    mean: bool = False
    synchronized: bool = False
    as_is: bool = False


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors among a node's arguments, in order, as often as they occur."""
    found: list[fx.Node] = []
    map_aggregate((node.args, dict(node.kwargs)), lambda a: found.append(a) if isinstance(a, fx.Node) else None)
    return tuple(found)


def results(function: Function, node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that hold a node's results: itself, or the getitems that read it."""
    if node in function.values:
        return (node,)
    return tuple(sorted(node.users, key=lambda user: user.args[1] if isinstance(user.args[1], int) else 0))


def call_of(function: Function, node: fx.Node) -> Call:
    """A node with Values in place of nodes."""

    def value(argument: Any) -> Any:
        return function.values[argument] if isinstance(argument, fx.Node) else argument

    args, kwargs = map_aggregate((node.args, dict(node.kwargs)), value)
    return Call(
        target=node.target,
        args=args,
        kwargs=kwargs,
        operands=tuple(function.values[n] for n in operands(node)),
        results=_all_results(function, node),
    )


def _all_results(function: Function, node: fx.Node) -> tuple[Value, ...]:
    if not is_multiple(node):
        return (function.values[node],)
    return tuple(function.values[n] for n in results(function, node))


def factors_by_node(function: Function, rules: Rules) -> dict[fx.Node, Factors | None]:
    """The factors of every operator of a function; None where there is no rule."""
    return {
        node: factors_of(call_of(function, node), rules)
        for node in function.graph.nodes
        if PIECE not in node.meta and (is_operator(node) or node.target in rules)
    }


def divides(size: Size, pieces: int) -> bool:
    """Whether a dim can be cut in equal pieces; a symbolic one can, as far as compilation knows."""
    return not isinstance(size, int) or size % pieces == 0


def has_pieces(size: Size, pieces: int) -> bool:
    """Whether a dim can be cut in pieces, the last perhaps shorter; a symbolic one can, as far as compilation knows."""
    return not isinstance(size, int) or suffices(size, pieces)


def uneven(value: Value, type_: Type, pieces: int) -> int | None:
    """The size of the dim that ``type_`` cuts in pieces of different length; None where they are equal."""
    size = value.shape[type_.dim] if type_.is_split else None
    return size if isinstance(size, int) and size % pieces else None


def groups_of(factor: Factor, place: Place | None, type_: Type) -> Size | None:
    """With how many groups inside ``factor`` a tensor of type ``type_`` splits it; None if it does not split it."""
    if place is None or type_.dim != place.dim:
        return None
    inside = quotient(type_.groups, place.outer)
    if inside is None or (isinstance(inside, int) and isinstance(factor.size, int) and factor.size % inside):
        return None
    if isinstance(factor.size, int) and not isinstance(inside, int):
        return None
    return None if inside == factor.size else inside


def candidates(
    function: Function, factors: Mapping[fx.Node, Factors | None], seeds: Mapping[fx.Node, set[Type]], pieces: int
) -> dict[fx.Node, set[Type]]:
    """The split types that each value can have: a fixpoint that carries ``seeds`` through all factors, both ways."""
    found: dict[fx.Node, set[Type]] = {node: set() for node in function.values}
    for node, types in seeds.items():
        found[node] |= types
    nodes = [(node, f) for node, f in factors.items() if f is not None]
    changed = True
    while changed:
        changed = False
        for order in (nodes, nodes[::-1]):
            for node, here in order:
                tensors = (*operands(node), *results(function, node))
                values = tuple(function.values[tensor] for tensor in tensors)
                for factor in here.factors:
                    if not factor.whole:
                        changed |= _carry(factor, tensors, values, found, pieces)
    return found


def _carry(
    factor: Factor,
    tensors: tuple[fx.Node, ...],
    values: tuple[Value, ...],
    found: dict[fx.Node, set[Type]],
    pieces: int,
) -> bool:
    places = (*factor.operands, *factor.results)
    groups = {
        inside
        for tensor, place in zip(tensors, places, strict=True)
        for type_ in found[tensor]
        if (inside := groups_of(factor, place, type_)) is not None
    }
    changed = False
    for inside in groups:
        if not is_cuttable(factor, inside, pieces, values):
            continue
        for tensor, place in zip(tensors, places, strict=True):
            if place is not None and (type_ := place.split(inside)) not in found[tensor]:
                found[tensor].add(type_)
                changed = True
    return changed


def is_cuttable(factor: Factor, groups: Size, pieces: int, values: tuple[Value, ...]) -> bool:
    """Whether there are equal pieces; or other ones, where the factor is a dim of its own wherever it stands, so that
    no size has to be written and no dim is cut inside of a piece of another.
    """
    block = quotient(factor.size, groups)
    if block is None or divides(block, pieces):
        return block is not None
    places = (*factor.operands, *factor.results)
    alone = all(
        place is None or value.shape[place.dim] == factor.size for place, value in zip(places, values, strict=True)
    )
    given = any(place is not None for place in factor.operands)
    return groups == 1 and alone and given and not (factor.equal or factor.mean) and has_pieces(factor.size, pieces)


def rows_of(
    function: Function,
    node: fx.Node,
    factors: Factors | None,
    found: Mapping[fx.Node, set[Type]],
    replicable: set[fx.Node],
    pieces: int,
) -> tuple[Row, ...]:
    """All rows of one operator. ``replicable``: data that may be computed as R, whole on every rank; what has no rule
    may always be, since parameters are R where the batch is split.
    """
    tensors, outcomes = operands(node), results(function, node)
    values = function.values
    every = tuple(values[n] for n in (*tensors, *outcomes))
    rows = [Row(operands=(I,) * len(tensors), results=(I,) * len(outcomes))]
    whole = [_whole(values[n]) for n in tensors]
    derived = bool(outcomes) and values[outcomes[0]].made_of == "parameters" and values[outcomes[0]].grad
    if derived or factors is None or (outcomes and outcomes[0] in replicable):
        rows.append(Row(operands=tuple(whole), results=tuple(_whole(values[n]) for n in outcomes)))
    if outcomes and not any(values[n].grad for n in outcomes):
        # Without a gradient what R gives is as good as what I gives: a detach, an argmax.
        rows.append(Row(operands=tuple(whole), results=(I,) * len(outcomes)))
    if factors is None:
        return tuple(dict.fromkeys(rows))
    for factor in factors.factors:
        if factor.whole:
            continue
        places = (*factor.operands, *factor.results)
        groups = {
            inside
            for tensor, place in zip((*tensors, *outcomes), places, strict=True)
            for type_ in found[tensor]
            if (inside := groups_of(factor, place, type_)) is not None and is_cuttable(factor, inside, pieces, every)
        }
        share = largest_piece(factor.size, pieces) / factor.size if isinstance(factor.size, int) else 1 / pieces
        for inside in sorted(groups, key=str):
            reduced = I if factor.invariant else P
            rows.append(
                Row(
                    operands=tuple(
                        whole[i] if place is None else place.split(inside) for i, place in enumerate(factor.operands)
                    ),
                    results=tuple(reduced if place is None else place.split(inside) for place in factor.results),
                    share=share,
                    pieces=factor.pieces,
                    mean=factor.mean,
                    synchronized=factor.synchronized,
                )
            )
    for group in factors.linear:
        rows.append(
            Row(
                operands=tuple(P if i in group else whole[i] for i in range(len(tensors))),
                results=(P,) * len(outcomes),
            )
        )
    return tuple(dict.fromkeys(rows))


def _whole(value: Value) -> Type:
    """How a value stands beside split ones: without gradient R and I are the same, written I."""
    return R if value.grad else I
