"""No action and no rank waits for itself, over others."""

import graphlib
from collections.abc import Collection, Iterator, Mapping

from meshwright.passes.prove.case import Case, Place
from meshwright.passes.prove.messages import receives, sends
from meshwright.runtime.actions import fuse, render


def data_order(case: Case) -> Iterator[str]:
    """Data and each rank's own order make no circle, however much is buffered."""
    waits: dict[Place, list[Place]] = {
        (rank, index): [(rank, index - 1)] if index else [] for rank, _, index in case.actions()
    }
    sent = dict(sends(case))
    for message, receiver in receives(case):
        waits[receiver].append(sent[message])
    for circle in _circle(waits):
        yield "actions wait for each other in a circle:\n  " + " waits for\n  ".join(map(case.at_place, circle))


def rendezvous(case: Case) -> Iterator[str]:
    """No rank waits in a circle where nothing is buffered. A node is the end of an exchange; see the model of the
    proof.
    """
    waits: dict[Place, list[Place]] = {
        (rank, index): [(rank, index - 1)] if index else []
        for rank, row in enumerate(case.rows)
        for index in range(len(row) + 1)
    }
    sent = dict(sends(case))
    for message, (receiver, before) in receives(case):
        sender, produced = sent[message]
        ends = (sender, produced + 1), (receiver, before)
        for (rank, index), (other, begun) in (ends, ends[::-1]):
            if begun:
                waits[rank, index].append((other, begun - 1))
    for circle in _circle(waits):
        places = (_between(case, place) for place in circle)
        yield "where nothing is buffered, ranks wait for each other in a circle:\n  " + " waits for\n  ".join(places)


def _circle(waits: Mapping[Place, Collection[Place]]) -> Iterator[list[Place]]:
    """One circle of places, each of which waits for the next, if there is one."""
    try:
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as found:
        yield found.args[1][::-1]


def _between(case: Case, place: Place) -> str:
    """The exchange of a rank before the action at an index."""
    rank, index = place
    names = [render([action], "stage") if action else None for action in fuse(case.rows[rank])[index]]
    return f"pipeline rank {rank} between {names[0] or 'the start'} and {names[1] or 'the end'}"
