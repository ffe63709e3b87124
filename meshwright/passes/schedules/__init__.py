"""Pipeline schedules: in which order every rank runs the forwards and backwards of a step, and whom it talks to.

An algorithm gives each rank's order of computations; the messages follow from the edges between stages, the same way
for all of them. Nothing here is trusted: ``meshwright.passes.prove`` checks the result without knowing its origin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.passes.schedules.messages import Row, with_messages
from meshwright.passes.schedules.pipeline import Compute, Costs, Edge, Order, Pipeline, Placement, chain
from meshwright.passes.schedules.simulate import Simulation, simulate
from meshwright.passes.schedules.table import ALGORITHMS, Algorithm, algorithm

__all__ = [
    "ALGORITHMS",
    "EQUAL",
    "Algorithm",
    "Compute",
    "Costs",
    "Edge",
    "Order",
    "Pipeline",
    "Placement",
    "Row",
    "Schedule",
    "Simulation",
    "algorithm",
    "chain",
    "fastest",
    "of_orders",
    "schedule",
    "simulate",
]


EQUAL = 1.01
"""Steps whose times differ by less are equally fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A step of a pipeline.

    placement: the rank of every stage. orders: what every rank computes. rows: the same as actions, peers as stages.
    peaks: the bound on chunks alive at once that is declared for every rank; None where nothing is.
    """

    name: str
    pipeline: Pipeline
    placement: Placement
    orders: tuple[Order, ...]
    rows: tuple[Row, ...]
    peaks: tuple[int, ...] | None

    def simulation(self) -> Simulation:
        """The step in time, by the pipeline's costs."""
        return simulate(self.orders, self.placement, self.pipeline.edges, self.pipeline.costs)


def schedule(name: str, pipeline: Pipeline) -> Schedule:
    """The schedule of this name for a pipeline.

    Edges may skip stages, and there may be fewer microbatches than stages. Raises PlanError for what the schedule is
    not defined for (see ``algorithm``), InternalError for an edge that does not lead to a later stage.
    """
    found = algorithm(name, pipeline)
    for edge in pipeline.edges:
        if not 0 <= edge[0] < edge[1] < pipeline.num_stages:
            raise InternalError(f"the edge {edge} does not lead to a later one of the {pipeline.num_stages} stages")
    placement = found.placement(pipeline.num_ranks, pipeline.num_chunks)
    orders = found.orders(pipeline)
    return Schedule(
        name=name,
        pipeline=pipeline,
        placement=placement,
        orders=orders,
        rows=with_messages(orders, placement, pipeline.edges),
        peaks=found.peaks(pipeline),
    )


def of_orders(name: str, pipeline: Pipeline, orders: Sequence[Sequence[Compute]]) -> Schedule:
    """A user's own schedule, from what every rank computes; a stage is on the rank that computes it.

    Raises PlanError for what is no lists of Compute, and for orders of other ranks or stages than the pipeline's. All
    else is left to the proof.
    """
    try:
        right = all(isinstance(compute, Compute) for order in orders for compute in order)
    except TypeError:
        right = False
    if not right:
        raise PlanError(
            f"schedule {name!r} gives {orders!r:.80}\n  it takes a list for each rank, of what the rank computes: "
            "Compute(kind, stage, microbatch)"
        )
    if len(orders) != pipeline.num_ranks:
        raise PlanError(f"schedule {name!r} is of {len(orders)} ranks, the pipeline of {pipeline.num_ranks}")
    rank_of: dict[int, int] = {}
    for rank, order in enumerate(orders):
        for compute in order:
            if rank_of.setdefault(compute.stage, rank) != rank:
                raise PlanError(
                    f"schedule {name!r}: {compute} on pipeline rank {rank} is of a stage that pipeline rank "
                    f"{rank_of[compute.stage]} runs too"
                )
    if sorted(rank_of) != list(range(pipeline.num_stages)):
        raise PlanError(
            f"schedule {name!r} runs the stages {', '.join(map(str, sorted(rank_of)))}, the pipeline has "
            f"{pipeline.num_stages}, from 0 on"
        )
    placement = tuple(rank_of[stage] for stage in range(pipeline.num_stages))
    own = tuple(map(tuple, orders))
    rows = with_messages(own, placement, pipeline.edges)
    return Schedule(name=name, pipeline=pipeline, placement=placement, orders=own, rows=rows, peaks=None)


def fastest(pipelines: Mapping[int, Pipeline], most_bytes: float | None = None) -> Schedule:
    """The schedule of the shortest simulated step that keeps at most ``most_bytes`` of activations alive on any rank.

    pipelines: the same step cut into so many chunks a rank, with its costs; schedules of other numbers of chunks are
    not tried. Among those that are as fast within 1 %, which no costs are as exact as, the one with the lowest peak,
    then the simplest. Raises PlanError where none keeps to it.
    """
    tried: list[tuple[float, float, str, Pipeline]] = []  # without messages, half of the work
    for num_chunks, pipeline in sorted(pipelines.items()):
        for name, candidate in ALGORITHMS.items():
            if not candidate.runs(num_chunks) or candidate.undefined(pipeline):
                continue
            placement = candidate.placement(pipeline.num_ranks, num_chunks)
            step = simulate(candidate.orders(pipeline), placement, pipeline.edges, pipeline.costs)
            tried.append((step.makespan, max(step.peaks), name, pipeline))
    fitting = [one for one in tried if most_bytes is None or one[1] <= most_bytes]
    if not fitting:
        _, needed, least, _ = min(tried, key=lambda one: one[1])
        raise PlanError(
            f"no schedule keeps at most {most_bytes:g} bytes of activations alive on every pipeline rank: "
            f"{least!r} needs the least, {needed:g}\n  use more microbatches or more pipeline ranks"
        )
    shortest = min(one[0] for one in fitting)
    _, _, name, pipeline = min((one for one in fitting if one[0] <= EQUAL * shortest), key=lambda one: one[1])
    return schedule(name, pipeline)
