"""Run a schedule on paper: when every computation begins and ends, what is idle, what is alive.

Messages are buffered and travel side by side: a computation begins when its rank is free and what it needs has arrived.
So the times are those of an executor that sends and receives beside the computation.
"""

import itertools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.compiler.errors import PlanError
from meshwright.passes.schedules.pipeline import Compute, Costs, Edge, Order, Placement, followed
from meshwright.runtime.actions import Kind


class Span(NamedTuple):
    """When a computation runs."""

    begin: float
    end: float
    compute: Compute


class Message(NamedTuple):
    """What travels between two ranks: when, from which computation, to which."""

    begin: float
    end: float
    source: Compute
    destination: Compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A step in time: what every rank runs, and the messages between ranks. Times and bytes are those of the costs.

    The bubble of a rank is all its idle time from the beginning of the step to its end, idle is that between its own
    first and last computation. "Zero bubble" is said of the latter; where the ranks wait for each other at the end of a
    step the former counts.
    """

    ranks: tuple[tuple[Span, ...], ...]
    messages: tuple[Message, ...]
    costs: Costs

    @property
    def begin(self) -> float:
        return min((spans[0].begin for spans in self.ranks if spans), default=0.0)

    @property
    def end(self) -> float:
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    @property
    def makespan(self) -> float:
        return self.end - self.begin

    @property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        return tuple(sum(span.end - span.begin for span in spans) for spans in self.ranks)

    @property
    def bubbles(self) -> tuple[float, ...]:
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def idle(self) -> tuple[float, ...]:
        spans = (spans[-1].end - spans[0].begin if spans else 0.0 for spans in self.ranks)
        return tuple(span - busy for span, busy in zip(spans, self.busy, strict=True))

    @property
    def bubble_share(self) -> float:
        """The part of all ranks' time from the beginning to the end of the step that is idle."""
        whole = self.makespan * len(self.ranks)
        return sum(self.bubbles) / whole if whole else 0.0

    def alive(self, rank: int) -> tuple[tuple[float, int, float], ...]:
        """(time, chunks alive from then on, their bytes) of a rank: a forward's results come to life when it begins."""
        changes: list[tuple[float, int, float]] = []
        for span in self.ranks[rank]:
            size = self.costs.activations[span.compute.stage]
            if span.compute.kind == "F":
                changes.append((span.begin, 1, size))
            elif span.compute.kind in "BW":
                changes.append((span.end, -1, -size))
        levels = [(self.begin, 0, 0.0)]
        for time, group in itertools.groupby(sorted(changes), key=lambda change: change[0]):
            some = list(group)
            _, chunks, size = levels[-1]
            if levels[-1][0] == time:
                levels.pop()
            levels.append((time, chunks + sum(c[1] for c in some), size + sum(c[2] for c in some)))
        return tuple(levels)

    @property
    def peaks(self) -> tuple[float, ...]:
        """The most bytes alive at once on each rank."""
        return tuple(max(size for _, _, size in self.alive(rank)) for rank in range(len(self.ranks)))


def simulate(orders: Sequence[Order], placement: Placement, edges: Collection[Edge], costs: Costs) -> Simulation:
    """The step in time. Raises PlanError for orders that come to no end because computations wait for each other."""
    needs = followed(edges)
    results: dict[Compute, Span] = {}  # forwards as they are, backwards of both sorts as B
    at = [0] * len(orders)
    spans: list[list[Span]] = [[] for _ in orders]
    messages: list[Message] = []
    waiting: dict[Compute, list[int]] = {}
    awake = deque(range(len(orders)))
    while awake:
        rank = awake.popleft()
        while at[rank] < len(orders[rank]):
            compute = orders[rank][at[rank]]
            missing = [need for need in _needs(compute, needs) if need not in results]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            begin = spans[rank][-1].end if spans[rank] else 0.0
            for made in (results[need] for need in _needs(compute, needs)):
                if placement[made.compute.stage] != rank:
                    messages.append(Message(made.end, made.end + costs.message, made.compute, compute))
                    begin = max(begin, messages[-1].end)
            spans[rank].append(Span(begin, begin + costs.time(compute), compute))
            at[rank] += 1
            if compute.kind != "W":
                result = compute._replace(kind="F" if compute.kind == "F" else "B")
                results[result] = spans[rank][-1]
                awake.extend(waiting.pop(result, ()))
    stuck = [str(order[at[rank]]) for rank, order in enumerate(orders) if at[rank] < len(order)]
    if stuck:
        raise PlanError(f"the schedule comes to no end: no rank can go on with {', '.join(stuck)}")
    return Simulation(ranks=tuple(map(tuple, spans)), messages=tuple(messages), costs=costs)


def _needs(compute: Compute, sources: Mapping[Kind, Mapping[int, tuple[int, ...]]]) -> list[Compute]:
    """What has to be there before a computation, its own forward apart: results of its edges, as F or as B."""
    kind: Kind = "F" if compute.kind == "F" else "B"
    return [Compute(kind, source, compute.microbatch) for source in sources[compute.kind].get(compute.stage, ())]
