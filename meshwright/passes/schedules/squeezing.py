"""Take idle time out of an order without using more memory than it may."""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence

from meshwright.passes.schedules.pipeline import Compute, Costs, Edge, Order, Placement, followed
from meshwright.runtime.actions import Kind

CHANGE: Mapping[Kind, int] = {"F": 1, "I": 0, "B": -1, "W": -1}
"""What a computation changes in the number of chunks that are alive."""


NUM_QUEUES = 6
"""Kinds and stages of a rank of two chunks; only the first of each may run."""


def squeeze(
    orders: Sequence[Order], placement: Placement, edges: Collection[Edge], costs: Costs, most: int
) -> tuple[Order, ...]:
    """The same computations, with later ones brought forward on ranks that would wait.

    A rank that is free takes the first computation of its order that can run, but a backward for the inputs before one
    for the weights: others wait for it. Forwards are brought forward only as far as the rank never has more than
    ``most`` chunks alive, also not with what they overtake; computations of a kind and stage keep their order. The
    first computation of an order is always allowed, so no rank waits for one that could not go on.
    """
    needs = followed(edges)
    rests = [list(order) for order in orders]
    taken: list[list[Compute]] = [[] for _ in orders]
    alive = [0] * len(orders)
    free = [0.0] * len(orders)
    results: dict[Compute, float] = {}  # when a forward and a gradient of inputs are there, the latter as B
    now = 0.0
    moments: list[float] = []

    def can_run(compute: Compute) -> bool:
        kind, stage, microbatch = compute
        own = {"F": None, "B": "F", "I": "F", "W": "B"}[kind]
        if own is not None and results.get(Compute(own, stage, microbatch), now + 1) > now:  # type: ignore[arg-type]
            return False
        for source in needs[kind].get(stage, ()):
            there = results.get(Compute("F" if kind == "F" else "B", source, microbatch))
            if there is None:
                return False
            if there + (costs.message if placement[source] != placement[stage] else 0.0) > now:
                return False
        return True

    while any(rests):
        for rank, rest in enumerate(rests):
            index = _choice(rest, alive[rank], most, can_run) if free[rank] <= now else None
            if index is None:
                continue
            compute = rest.pop(index)
            taken[rank].append(compute)
            alive[rank] += CHANGE[compute.kind]
            free[rank] = now + costs.time(compute)
            if compute.kind != "W":
                results[Compute("F" if compute.kind == "F" else "B", *compute[1:])] = free[rank]
            for moment in (free[rank], free[rank] + costs.message):
                heapq.heappush(moments, moment)
        now = heapq.heappop(moments)
    return tuple(map(tuple, taken))


def _choice(rest: Sequence[Compute], alive: int, most: int, can_run: Callable[[Compute], bool]) -> int | None:
    """The index of what a rank runs next, or None where it waits."""
    weights: int | None = None
    passed: set[tuple[Kind, int]] = set()
    highest = alive
    for index, compute in enumerate(rest):
        queue = (compute.kind, compute.stage)
        if queue not in passed and can_run(compute):
            if compute.kind == "W":
                weights = index if weights is None else weights
            elif compute.kind == "I" or (weights is None and (index == 0 or highest < most)):
                return index
        passed.add(queue)
        if len(passed) == NUM_QUEUES:
            break
        alive += CHANGE[compute.kind]
        highest = max(highest, alive)
    return weights
