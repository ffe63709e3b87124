"""Auto: the number of stages and the schedule of the shortest simulated step, within what may be kept alive."""

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import PlanError
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.passes.partition import cut_places, partition
from meshwright.passes.schedules import Pipeline, fastest
from meshwright.passes.schedules.planned import Planned, named
from meshwright.passes.timing import Timing, costs, edges

MOST_CHUNKS = 4
"""Stages that are tried on a rank. More make the bubble smaller by ever less, and every one sends more messages."""


def choose(blocks: Blocks, mesh: Mesh, plan: Plan, timing: Timing) -> Planned:
    """How many stages the typed ``blocks`` are cut into on each of pp ranks, and the schedule with the shortest
    simulated step that keeps at most ``plan.max_activation_bytes`` alive on any rank.

    Tried are 1 to 4 stages on a rank, or the plan's ``stages_per_rank``; its ``split`` gives the number too. Raises
    PlanError where there are too few places to cut, and where no schedule keeps to the bytes, with the least of all.
    """
    num_ranks = mesh.size("pp")
    pipelines = {}
    for num_chunks in _chunks(blocks, num_ranks, plan):
        parts = partition(blocks, num_ranks * num_chunks, plan.split, timing.seconds)
        pipelines[num_chunks] = Pipeline.of(
            num_ranks,
            timing.num_microbatches,
            num_chunks,
            edges=edges(blocks, parts),
            costs=costs(parts, timing),
        )
    chosen = fastest(pipelines, plan.max_activation_bytes)
    return named(chosen.name, num_ranks, timing.num_microbatches, chosen.pipeline.num_chunks)


def _chunks(blocks: Blocks, num_ranks: int, plan: Plan) -> list[int]:
    """Numbers of stages on a rank to try."""
    if plan.stages_per_rank is not None:
        return [plan.stages_per_rank]
    if plan.split is not None:
        num_stages = len(plan.split) + 1
        if num_stages % num_ranks:
            raise PlanError(
                f"split names {len(plan.split)} modules, for {num_stages} stages: that is no multiple of pp={num_ranks}"
            )
        return [num_stages // num_ranks]
    most = 1 if num_ranks == 1 else min(MOST_CHUNKS, (cut_places(blocks) + 1) // num_ranks)
    return list(range(1, max(1, most) + 1))
