"""Auto: the cut and the schedule of the shortest simulated step, within what may be kept alive."""

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import PlanError
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.passes.partition import Partition, cut_places, partition
from meshwright.passes.schedules import Pipeline, Schedule, fastest
from meshwright.passes.timing import Timing, costs, edges

MOST_CHUNKS = 4
"""Stages that are tried on a rank. More make the bubble smaller by ever less, and every one sends more messages."""


def choose(
    blocks: Blocks, mesh: Mesh, plan: Plan, timing: Timing, stages_per_rank: int | None = None
) -> tuple[Partition, Schedule]:
    """The cut of typed ``blocks`` into pp * v stages, v from 1 to 4, and the schedule with the shortest simulated step
    that keeps at most ``plan.max_activation_bytes`` alive on any rank.

    stages_per_rank: v, where it is given; ``plan.split`` gives it too. Raises PlanError where there are too few places
    to cut, and where no schedule keeps to the bytes, with the least of all.
    """
    num_ranks = mesh.size("pp")
    tried = [stages_per_rank] if stages_per_rank is not None else _chunks(blocks, num_ranks, plan)
    parts = {v: partition(blocks, num_ranks * v, plan.split, timing.seconds) for v in tried}
    pipelines = {
        v: Pipeline.of(
            num_ranks=num_ranks,
            num_microbatches=timing.num_microbatches,
            num_chunks=v,
            edges=edges(blocks, cut),
            costs=costs(cut, timing),
        )
        for v, cut in parts.items()
    }
    chosen = fastest(pipelines, plan.max_activation_bytes)
    return parts[chosen.pipeline.num_chunks], chosen


def _chunks(blocks: Blocks, num_ranks: int, plan: Plan) -> list[int]:
    """Numbers of stages on a rank to try."""
    if plan.split is not None:
        num_stages = len(plan.split) + 1
        if num_stages % num_ranks:
            raise PlanError(
                f"split names {len(plan.split)} modules, for {num_stages} stages: that is no multiple of pp={num_ranks}"
            )
        return [num_stages // num_ranks]
    most = 1 if num_ranks == 1 else min(MOST_CHUNKS, (cut_places(blocks) + 1) // num_ranks)
    return list(range(1, max(1, most) + 1))
