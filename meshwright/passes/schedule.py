"""Pipeline schedules: in which order every stage runs the forwards and backwards of a step, and whom it talks to.

A generator gives each stage's order of computations; the messages follow from the edges between stages, the same way
for all generators. Nothing here is trusted: ``meshwright.passes.prove`` checks the result without knowing its origin.
"""

import difflib
from collections.abc import Callable, Collection, Mapping

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.runtime.actions import Action, Kind

Edge = tuple[int, int] | tuple[int, int, bool]
"""(source stage, destination stage), or with False as a third where no gradient comes back."""

Order = tuple[tuple[Kind, int], ...]
"""What one stage computes in a step: kinds and microbatches."""

Generator = Callable[[int, int, Collection[Edge]], tuple[Order, ...]]
"""(stages, microbatches, edges) -> the order of every stage."""


def gpipe(num_stages: int, num_microbatches: int, edges: Collection[Edge]) -> tuple[Order, ...]:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965). A stage keeps all alive."""
    return (_order(num_microbatches, num_microbatches),) * num_stages


def one_forward_one_backward(num_stages: int, num_microbatches: int, edges: Collection[Edge]) -> tuple[Order, ...]:
    """1F1B: a few forwards ahead, then forward and backward in turn (Narayanan et al., PipeDream, arXiv 1806.03377).

    Stage s keeps at most num_stages - s microbatches alive, more only where ``forwards_ahead`` says so.
    """
    return tuple(_order(ahead, num_microbatches) for ahead in forwards_ahead(num_stages, edges))


GENERATORS: Mapping[str, Generator] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
}

PEAKS: Mapping[str, Callable[[int, int, Collection[Edge]], tuple[int, ...]]] = {
    "gpipe": lambda num_stages, num_microbatches, edges: (num_microbatches,) * num_stages,
    "1f1b": lambda num_stages, num_microbatches, edges: tuple(
        min(num_microbatches, ahead + 1) for ahead in forwards_ahead(num_stages, edges)
    ),
}
"""The bound that each schedule declares: microbatches alive at once on each stage."""


def schedule(
    name: str, num_stages: int, num_microbatches: int, edges: Collection[Edge]
) -> tuple[tuple[Action, ...], ...]:
    """The actions of a step, one list per stage, with peers as stage numbers.

    A forward receives from all stages with an edge to its own and sends to all that its own has an edge to; a backward
    does the reverse over the edges with gradient. Several edges between two stages are one message. Edges may skip
    stages, and there may be fewer microbatches than stages.

    Raises PlanError for an unknown name or less than one microbatch, InternalError for an edge that does not lead to a
    later stage.
    """
    if name not in GENERATORS:
        near = difflib.get_close_matches(name.lower(), GENERATORS, n=1)
        hint = f"\n  did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"unknown schedule {name!r}: the schedules are {', '.join(GENERATORS)}{hint}")
    if num_microbatches < 1:
        raise PlanError(f"a step of {num_microbatches} microbatches: the least is 1\n  set microbatches=1 or more")
    for edge in edges:
        if not 0 <= edge[0] < edge[1] < num_stages:
            raise InternalError(f"the edge {edge} does not lead to a later one of the {num_stages} stages")
    down = {(edge[0], edge[1]) for edge in edges}
    up = {(edge[1], edge[0]) for edge in edges if _has_gradient(edge)}
    messages: dict[Kind, set[tuple[int, int]]] = {"F": down, "B": up}
    return tuple(
        tuple(
            Action(
                kind=kind,
                microbatch=microbatch,
                receives=tuple(sorted(source for source, destination in messages[kind] if destination == stage)),
                sends=tuple(sorted(destination for source, destination in messages[kind] if source == stage)),
            )
            for kind, microbatch in order
        )
        for stage, order in enumerate(GENERATORS[name](num_stages, num_microbatches, edges))
    )


def forwards_ahead(num_stages: int, edges: Collection[Edge]) -> tuple[int, ...]:
    """How many forwards each stage of 1F1B runs before it takes forward and backward in turn.

    In a chain stage s runs num_stages - 1 - s, also when values without gradient skip stages. Where nothing is
    buffered, a skip with gradient allows a lead of two: further ahead, its source waits to be rid of a forward's result
    while its destination waits to be rid of a gradient. So a longer skip holds its destination back, and no stage on
    the way may run fewer than one that it feeds. The price is time: GPipe has no such wait and is faster there.
    """
    skips = any(_has_gradient(edge) and edge[1] - edge[0] > 1 for edge in edges)
    lead = 2 if skips else num_stages
    ahead = [num_stages - 1 - stage for stage in range(num_stages)]
    before: list[int] = []
    while before != ahead:
        before = list(ahead)
        for source, destination, *_ in edges:
            ahead[destination] = max(ahead[destination], ahead[source] - lead)
            ahead[source] = max(ahead[source], ahead[destination])
    return tuple(ahead)


def _order(ahead: int, num_microbatches: int) -> Order:
    """``ahead`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    order: list[tuple[Kind, int]] = [("F", microbatch) for microbatch in range(min(ahead, num_microbatches))]
    for microbatch in range(num_microbatches):
        if microbatch + ahead < num_microbatches:
            order.append(("F", microbatch + ahead))
        order.append(("B", microbatch))
    return tuple(order)


def _has_gradient(edge: Edge) -> bool:
    return len(edge) == 2 or edge[2]
