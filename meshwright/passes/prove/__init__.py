"""The proof of a pipeline schedule, before any process waits on another.

It takes the actions as they are, from a generator, a user or the text in a bundle, and what they should do: how many
microbatches, and which edges between stages. It shares no code with the generators.

The model of time is the executor's, made as strict as a backend can be. Nothing is buffered: a message passes only
while both ends wait for it. A rank alternates between exchanges and actions (``meshwright.runtime.actions.fuse``): the
sends of the action before and the receives of the action after start together, and the rank goes on when all of them
have passed. So everything that a rank says and hears goes through one queue. A queue per pair of ranks, shared by both
directions or not, and sends that are waited for later only remove waiting: what is free of circles here is free of
them there.

Two things hold by the form of an action and need no check: a send follows its producer and a receive precedes its
consumer, because they are part of the action; and one list is one stage on one pipeline rank, run by all ranks of the
stage's other axes, which therefore issue the same collectives in the same order.
"""

import collections
import graphlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.compiler.errors import InternalError, MeshwrightError
from meshwright.passes.schedule import Edge
from meshwright.runtime.actions import Action, Kind, fuse, render

Message = tuple[int, int, Kind, int]
"""Sender, receiver, kind and microbatch of the action whose data it carries."""

Place = tuple[int, int]
"""A pipeline rank and an index: of an action, or of an exchange."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be proven. ``rows``: the actions per pipeline rank, peers as positions in ``rows``."""

    rows: tuple[tuple[Action, ...], ...]
    num_microbatches: int
    edges: Collection[Edge]
    peaks: Sequence[int] | None


def prove(
    rows: Sequence[Sequence[Action]],
    *,
    num_microbatches: int,
    edges: Collection[Edge],
    peaks: Sequence[int] | None = None,
    error: type[MeshwrightError] = InternalError,
) -> tuple[int, ...]:
    """Prove the schedule of a step and return how many microbatches are alive at once on each pipeline rank.

    rows: the actions of each stage, one stage per pipeline rank, peers as stages. edges: (source, destination) or
    (source, destination, has gradient). peaks: the bound on microbatches alive that the schedule declares per rank.
    Raises ``error`` (a bug of ours, unless the schedule came from outside) with the first failure: pipeline rank,
    action and the other party.
    """
    case = Case(rows=tuple(map(tuple, rows)), num_microbatches=num_microbatches, edges=edges, peaks=peaks)
    for check in CHECKS:
        for reason in check(case):
            raise error(f"the schedule is wrong: {reason}")
    return tuple(map(_peak, case.rows))


def placement(case: Case) -> Iterator[str]:
    """Every edge and every peer is another one of the stages."""
    stages = range(len(case.rows))
    for edge in case.edges:
        if edge[0] not in stages or edge[1] not in stages or edge[0] == edge[1]:
            yield f"the edge {edge} does not join two of the {len(stages)} stages"
    for rank, action, _ in _actions(case):
        for peer in (*action.receives, *action.sends):
            if peer == rank:
                yield f"{_at(rank, action)} talks to its own rank"
            if peer not in stages:
                yield f"{_at(rank, action)} talks to pipeline rank {peer}, but the last one is {stages[-1]}"


def coverage(case: Case) -> Iterator[str]:
    """Every rank runs one forward and one backward of every microbatch, and nothing else."""
    if case.num_microbatches < 1:
        yield f"a step has {case.num_microbatches} microbatches, less than one"
    for rank, row in enumerate(case.rows):
        count = collections.Counter((action.kind, action.microbatch) for action in row)
        for action in row:
            if action.microbatch >= case.num_microbatches:
                yield f"{_at(rank, action)} is of a microbatch beyond the last, {case.num_microbatches - 1}"
            if count[action.kind, action.microbatch] > 1:
                yield f"{_at(rank, action)} is not the only {action.kind}{action.microbatch} there"
        for microbatch in range(case.num_microbatches):
            for kind in ("F", "B"):
                if not count[kind, microbatch]:
                    yield f"pipeline rank {rank} never runs {kind}{microbatch}"


def local_order(case: Case) -> Iterator[str]:
    """Forward before backward, and backwards in ascending order, so that sums of gradients compare bit for bit."""
    for rank, row in enumerate(case.rows):
        forwards: set[int] = set()
        latest: Action | None = None
        for action in row:
            if action.kind == "F":
                forwards.add(action.microbatch)
                continue
            if action.microbatch not in forwards:
                yield f"{_at(rank, action)} is before the forward F{action.microbatch}"
            if latest is not None and latest.microbatch > action.microbatch:
                yield f"{_at(rank, action)} adds its gradients after those of {render([latest], 'stage')}"
            latest = action


def matching(case: Case) -> Iterator[str]:
    """Sends and receives are one to one, and are those of the edges."""
    needed: set[Message] = set()
    for microbatch in range(case.num_microbatches):
        for source, destination, *gradient in case.edges:
            needed.add((source, destination, "F", microbatch))
            if gradient != [False]:
                needed.add((destination, source, "B", microbatch))
    sent, received = set(_sent(case)), set(_received(case))
    action_of = {(rank, action.kind, action.microbatch): action for rank, action, _ in _actions(case)}
    for message in sorted((sent | received | needed) - (sent & received & needed)):
        source, destination, kind, microbatch = message
        sender, receiver = (_at(rank, action_of[rank, kind, microbatch]) for rank in (source, destination))
        if message not in sent and message not in received:
            yield f"{sender} does not send to {receiver}, though an edge between them needs it"
        elif message not in received:
            yield f"{sender} sends to {receiver}, which does not receive from it"
        elif message not in sent:
            yield f"{receiver} receives from {sender}, which does not send to it"
        else:
            yield f"{sender} sends to {receiver}, though no edge between them needs it"


def message_order(case: Case) -> Iterator[str]:
    """The k-th send from one rank to another is the other's k-th receive from it: backends match messages by order."""
    sends, receives = _by_pair(_sent(case)), _by_pair(_received(case))
    for (source, destination), messages in sends.items():
        for k, (sent, received) in enumerate(zip(messages, receives[source, destination], strict=True)):
            if sent != received:
                yield (
                    f"send {k} from pipeline rank {source} to pipeline rank {destination} is that of "
                    f"{sent[2]}{sent[3]}, but receive {k} there is that of {received[2]}{received[3]}"
                )


def data_order(case: Case) -> Iterator[str]:
    """Data and each rank's own order make no circle, however much is buffered."""
    waits: dict[Place, list[Place]] = {
        (rank, index): [(rank, index - 1)] if index else [] for rank, _, index in _actions(case)
    }
    sent = _sent(case)
    for message, receiver in _received(case).items():
        waits[receiver].append(sent[message])
    for circle in _circle(waits):
        places = (_at(rank, case.rows[rank][index]) for rank, index in circle)
        yield "actions wait for each other in a circle:\n  " + " waits for\n  ".join(places)


def rendezvous(case: Case) -> Iterator[str]:
    """No rank waits in a circle where nothing is buffered. A node is the end of an exchange; see the model above."""
    waits: dict[Place, list[Place]] = {
        (rank, index): [(rank, index - 1)] if index else []
        for rank, row in enumerate(case.rows)
        for index in range(len(row) + 1)
    }
    sent = _sent(case)
    for message, (receiver, before) in _received(case).items():
        sender, produced = sent[message]
        ends = (sender, produced + 1), (receiver, before)
        for (rank, index), (other, begun) in (ends, ends[::-1]):
            if begun:
                waits[rank, index].append((other, begun - 1))
    for circle in _circle(waits):
        places = (_between(case.rows[rank], rank, index) for rank, index in circle)
        yield "where nothing is buffered, ranks wait for each other in a circle:\n  " + " waits for\n  ".join(places)


def memory(case: Case) -> Iterator[str]:
    """No rank keeps more microbatches alive than the schedule declares."""
    peaks = map(_peak, case.rows)
    for rank, (peak, bound) in enumerate(zip(peaks, case.peaks, strict=True) if case.peaks is not None else ()):
        if peak > bound:
            yield f"pipeline rank {rank} keeps {peak} microbatches alive at once, more than the {bound} declared"


CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    placement,
    coverage,
    local_order,
    matching,
    message_order,
    data_order,
    rendezvous,
    memory,
)
"""In this order: each relies on what those before it have shown."""


def _actions(case: Case) -> Iterator[tuple[int, Action, int]]:
    """(pipeline rank, action, index in its row)"""
    for rank, row in enumerate(case.rows):
        for index, action in enumerate(row):
            yield rank, action, index


def _sent(case: Case) -> dict[Message, Place]:
    """Every message that is sent, in each rank's order, and the action that does it."""
    return {
        (rank, peer, action.kind, action.microbatch): (rank, index)
        for rank, action, index in _actions(case)
        for peer in action.sends
    }


def _received(case: Case) -> dict[Message, Place]:
    """Every message that is received, in each rank's order, and the action that does it."""
    return {
        (peer, rank, action.kind, action.microbatch): (rank, index)
        for rank, action, index in _actions(case)
        for peer in action.receives
    }


def _by_pair(messages: dict[Message, Place]) -> dict[tuple[int, int], list[Message]]:
    pairs: dict[tuple[int, int], list[Message]] = {}
    for message in messages:
        pairs.setdefault(message[:2], []).append(message)
    return pairs


def _circle(waits: Mapping[Place, Collection[Place]]) -> Iterator[list[Place]]:
    """One circle of places, each of which waits for the next, if there is one."""
    try:
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as found:
        yield found.args[1][::-1]


def _peak(row: Sequence[Action]) -> int:
    """Microbatches alive at once: forwards whose backward has not been run."""
    alive = itertools.accumulate(1 if action.kind == "F" else -1 for action in row)
    return max(alive, default=0)


def _at(rank: int, action: Action) -> str:
    return f"{render([action], 'stage')} on pipeline rank {rank}"


def _between(row: Sequence[Action], rank: int, index: int) -> str:
    """The exchange of a rank before the action at ``index``."""
    names = [render([action], "stage") if action else None for action in fuse(row)[index]]
    return f"pipeline rank {rank} between {names[0] or 'the start'} and {names[1] or 'the end'}"
