"""The proof of a pipeline schedule, before any process waits on another.

It takes the actions as they are, from an algorithm, a user or the text in a bundle, and what they should do: how many
microbatches, which stages on which rank, and which edges between stages. It shares no code with the algorithms.

The model of time is the executor's, made as strict as a backend can be. Nothing is buffered: a message passes only
while both ends wait for it. A rank alternates between exchanges and actions (``meshwright.runtime.actions.fuse``): the
sends of the action before and the receives of the action after start together, and the rank goes on when all of them
have passed. So everything that a rank says and hears goes through one queue. A queue per pair of ranks, shared by both
directions or not, and messages that are waited for later only remove waiting: what is free of circles here is free of
them there.

Some things hold by the form of a schedule and need no check. One list is run by all ranks that differ from its pipeline
rank in other axes alone. It names no collectives: a stage gathers its parameters before its first action and reduces
its gradients once, after its last backward, so the members of a group issue the same collectives in the same order.
Parameters that stages share are reduced after all actions, in the order of their names.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from meshwright.compiler.errors import InternalError, MeshwrightError
from meshwright.passes.prove.case import Case
from meshwright.passes.prove.circles import data_order, rendezvous
from meshwright.passes.prove.computations import coverage, local_order, memory, peak, placed
from meshwright.passes.prove.messages import matching, message_order
from meshwright.passes.schedules.pipeline import Edge, Placement
from meshwright.runtime.actions import Action

CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    placed,
    coverage,
    local_order,
    matching,
    message_order,
    data_order,
    rendezvous,
    memory,
)
"""In this order: each relies on what those before it have shown."""


def prove(
    rows: Sequence[Sequence[Action]],
    *,
    num_microbatches: int,
    edges: Collection[Edge],
    placement: Placement | None = None,
    peaks: Sequence[int] | None = None,
    ascending: bool = True,
    forward_only: bool = False,
    error: type[MeshwrightError] = InternalError,
) -> tuple[int, ...]:
    """Prove the schedule of a step and return how many chunks are alive at once on each pipeline rank.

    A chunk is a stage's part of a microbatch, alive from its forward to its whole backward or that for the weights.

    rows: the actions of each pipeline rank, peers as stages. edges: (source, destination) or (source, destination, has
    gradient). placement: the pipeline rank of every stage; None for stage s on rank s. peaks: the bound that the
    schedule declares per rank. ascending: whether every stage has to add up its gradients in the order of the
    microbatches, which makes results comparable bit for bit. forward_only: the step has no backwards, as the forwards
    of a row alone in an evaluation. Raises ``error`` (a bug of ours, unless the schedule came
    from outside) with the first failure: pipeline rank, action and the other party.
    """
    case = Case(
        rows=tuple(map(tuple, rows)),
        placement=tuple(range(len(rows)) if placement is None else placement),
        num_microbatches=num_microbatches,
        edges=edges,
        peaks=peaks,
        ascending=ascending,
        forward_only=forward_only,
    )
    for check in CHECKS:
        for reason in check(case):
            raise error(f"the schedule is wrong: {reason}")
    return tuple(map(peak, case.rows))
