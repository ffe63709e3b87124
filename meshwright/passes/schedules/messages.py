"""From orders of computations to the actions of every rank: who sends what to whom, and when.

Messages follow from the edges between stages and from the ranks that have the stages, the same way for all schedules.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from meshwright.compiler.errors import PlanError
from meshwright.passes.schedules.pipeline import Costs, Edge, Order, Placement, has_gradient
from meshwright.passes.schedules.simulate import simulate
from meshwright.runtime.actions import Action, Kind, stage_of, stages_on

Row = tuple[Action, ...]


def with_messages(orders: Sequence[Order], placement: Placement, edges: Collection[Edge]) -> tuple[Row, ...]:
    """The actions of every rank, with peers as stages; stages are named where a rank has more than one.

    A forward receives from all stages on other ranks with an edge to its own and sends to all that its own has an edge
    to; a backward (for the inputs) does the reverse over the edges with gradient. Several edges between two stages are
    one message. A receive is posted as early as its message can come: before what its rank computes while the sender
    sends, in a step where all computations take the same time. So messages travel beside computations, and all of them
    have one place in time at both ends, which never waits in a circle, even where nothing is buffered. Orders that wait
    in a circle themselves are left to the proof.
    """
    together = _together(orders, placement, edges)
    even = (1.0,) * len(placement)
    costs = Costs(forward=even, inputs=even, weights=even, activations=even)
    try:
        ranks = simulate(orders, placement, edges, costs).ranks
    except PlanError:
        return together
    ends = sorted((span.end, rank, index) for rank, spans in enumerate(ranks) for index, span in enumerate(spans))
    own = [stages_on(placement, rank) for rank in range(len(orders))]
    consumers = {
        (stage_of(action, own[rank]), action.kind == "F", action.microbatch): action
        for rank, row in enumerate(together)
        for action in row
        if action.receives
    }
    found: list[list[Action]] = [[] for _ in together]
    for _, rank, index in ends:
        action = together[rank][index]
        _append(found[rank], replace(action, receives=()))
        for stage in action.sends:
            consumer = consumers[stage, action.kind == "F", action.microbatch]
            source = stage_of(action, own[rank])
            _append(found[placement[stage]], replace(consumer, receives=(source,), sends=(), runs=False))
    return tuple(map(tuple, found))


def _together(orders: Sequence[Order], placement: Placement, edges: Collection[Edge]) -> tuple[Row, ...]:
    down = sorted({edge[:2] for edge in edges if placement[edge[0]] != placement[edge[1]]})
    up = sorted({(edge[1], edge[0]) for edge in edges if has_gradient(edge) and edge[:2] in down})
    travels: Mapping[Kind, list[tuple[int, int]]] = {"F": down, "B": up, "I": up, "W": []}
    several = len(placement) > len(orders)
    return tuple(
        tuple(
            Action(
                kind=kind,
                microbatch=microbatch,
                stage=stage if several else None,
                receives=tuple(source for source, destination in travels[kind] if destination == stage),
                sends=tuple(destination for source, destination in travels[kind] if source == stage),
            )
            for kind, stage, microbatch in order
        )
        for order in orders
    )


def _append(row: list[Action], action: Action) -> None:
    """Receives of one computation that follow each other are one; so are receives and the computation after them."""
    before = row[-1] if row else None
    if before is not None and not before.runs and before.name == action.name:
        action = replace(action, receives=row.pop().receives + action.receives)
    row.append(action)
