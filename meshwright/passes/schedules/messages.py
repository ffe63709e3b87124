"""From orders of computations to the actions of every rank: who sends what to whom, and when.

Messages follow from the edges between stages and from the ranks that have the stages, the same way for all schedules.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from meshwright.compiler.errors import PlanError
from meshwright.passes.schedules.pipeline import Costs, Edge, Order, Placement, has_gradient
from meshwright.passes.schedules.simulate import simulate
from meshwright.runtime.actions import Action, Kind, fuse

Row = tuple[Action, ...]

Message = tuple[int, int, bool, int]
"""Sending stage, receiving stage, whether a forward's result, microbatch."""


def with_messages(orders: Sequence[Order], placement: Placement, edges: Collection[Edge]) -> tuple[Row, ...]:
    """The actions of every rank, with peers as stages; stages are named where a rank has more than one.

    A forward receives from all stages on other ranks with an edge to its own and sends to all that its own has an edge
    to; a backward (for the inputs) does the reverse over the edges with gradient. Several edges between two stages are
    one message. A receive stands with its computation if the step comes to its end that way even where nothing is
    buffered, else where its sender sends: then all messages have one place in time at both ends, which never waits in a
    circle. Orders that wait in a circle themselves are left to the proof.
    """
    together = _together(orders, placement, edges)
    if _in_order(together, placement) and _comes_to_an_end(together, placement):
        return together
    return _apart(together, orders, placement, edges) or together


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


def _in_order(rows: Sequence[Row], placement: Placement) -> bool:
    """Whether every two ranks send and receive what is between them in the same order."""
    ways: dict[tuple[int, int], tuple[list[Message], list[Message]]] = {}
    for rank, row in enumerate(rows):
        for action in row:
            for sent, message in _messages(action, rank):
                way = ways.setdefault((placement[message[0]], placement[message[1]]), ([], []))
                way[0 if sent else 1].append(message)
    return all(sent == received for sent, received in ways.values())


def _comes_to_an_end(rows: Sequence[Row], placement: Placement) -> bool:
    """Whether all ranks get through if a message passes only while both ends wait for it."""
    exchanges = [
        [
            {m for sent, m in _messages(before, rank) if sent} | {m for sent, m in _messages(after, rank) if not sent}
            for before, after in fuse(row)
        ]
        for rank, row in enumerate(rows)
    ]
    at = [0] * len(rows)
    awake = deque(range(len(rows)))
    while awake:
        rank = awake.popleft()
        while at[rank] < len(exchanges[rank]):
            own = exchanges[rank][at[rank]]
            for message in list(own):
                peer = placement[message[1] if placement[message[0]] == rank else message[0]]
                if at[peer] < len(exchanges[peer]) and message in exchanges[peer][at[peer]]:
                    own.remove(message)
                    exchanges[peer][at[peer]].remove(message)
                    awake.append(peer)
            if own:
                break
            at[rank] += 1
    return all(at[rank] == len(exchanges[rank]) for rank in range(len(rows)))


def _messages(action: Action | None, rank: int) -> Iterator[tuple[bool, Message]]:
    """The messages of an action, with True for those that it sends."""
    if action is not None:
        own, forward = _stage(action, rank), action.kind == "F"
        yield from ((True, (own, peer, forward, action.microbatch)) for peer in action.sends)
        yield from ((False, (peer, own, forward, action.microbatch)) for peer in action.receives)


def _apart(
    rows: Sequence[Row], orders: Sequence[Order], placement: Placement, edges: Collection[Edge]
) -> tuple[Row, ...] | None:
    """Every receive where its sender sends, in a step where all computations take the same time."""
    even = (1.0,) * len(placement)
    costs = Costs(forward=even, inputs=even, weights=even, activations=even)
    try:
        ranks = simulate(orders, placement, edges, costs).ranks
    except PlanError:
        return None
    ends = sorted((span.end, rank, index) for rank, spans in enumerate(ranks) for index, span in enumerate(spans))
    consumers = {
        (_stage(action, rank), action.kind == "F", action.microbatch): action
        for rank, row in enumerate(rows)
        for action in row
        if action.receives
    }
    found: list[list[Action]] = [[] for _ in rows]
    for _, rank, index in ends:
        action = rows[rank][index]
        _append(found[rank], replace(action, receives=()))
        for stage in action.sends:
            consumer = consumers[stage, action.kind == "F", action.microbatch]
            _append(found[placement[stage]], replace(consumer, receives=(_stage(action, rank),), sends=(), runs=False))
    return tuple(map(tuple, found))


def _append(row: list[Action], action: Action) -> None:
    """Receives of one computation that follow each other are one; so are receives and the computation after them."""
    before = row[-1] if row else None
    if before is not None and not before.runs and before.name == action.name:
        action = replace(action, receives=row.pop().receives + action.receives)
    row.append(action)


def _stage(action: Action, rank: int) -> int:
    return rank if action.stage is None else action.stage
