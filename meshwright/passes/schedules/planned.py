"""What a plan asks of the pipeline: which schedule, and how many stages every pipeline rank runs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshwright.compiler.errors import PlanError
from meshwright.compiler.plan import AUTO, Plan
from meshwright.passes.schedules import ALGORITHMS, Pipeline, Schedule, algorithm, of_orders, schedule
from meshwright.passes.schedules.torch_csv import read


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The pipeline of a plan before the model is cut. make: the schedule, once edges between stages are known."""

    num_ranks: int
    num_microbatches: int
    num_chunks: int
    make: Callable[[Pipeline], Schedule]

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks


def planned(plan: Plan, num_ranks: int) -> Planned | None:
    """What the plan asks of ``num_ranks`` pipeline ranks; None where it leaves that to ``passes.auto``.

    Raises PlanError for a schedule that does not exist for so many ranks, stages per rank and microbatches.
    """
    number, chosen = plan.num_microbatches(num_ranks), plan.schedule
    if chosen == AUTO:
        return None
    if not isinstance(chosen, (str, os.PathLike)):
        return Planned(
            num_ranks=num_ranks,
            num_microbatches=number,
            num_chunks=plan.stages_per_rank or 1,
            make=lambda pipeline: of_orders(plan.schedule_name, pipeline, chosen(pipeline)),
        )
    name = os.fspath(chosen)
    if name.endswith(".csv"):
        return _from_file(plan, name, num_ranks, number)
    num_chunks = plan.stages_per_rank or ALGORITHMS[name].chunks or 2
    algorithm(name, Pipeline.of(num_ranks, number, num_chunks))
    return named(name, num_ranks, number, num_chunks)


def named(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> Planned:
    """The schedule of this name."""
    return Planned(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_chunks=num_chunks,
        make=lambda pipeline: schedule(name, pipeline),
    )


def _from_file(plan: Plan, path: str, num_ranks: int, number: int) -> Planned:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise PlanError(f"cannot read the schedule {path}: {error.strerror}") from error
    found = read(text, name=path).pipeline
    for what, has, asked, way in (
        ("ranks", found.num_ranks, num_ranks, f"a mesh with pp={found.num_ranks}"),
        ("microbatches", found.num_microbatches, number, f"microbatches={found.num_microbatches}"),
        ("stages on every rank", found.num_chunks, plan.stages_per_rank or found.num_chunks, "stages_per_rank=None"),
    ):
        if has != asked:
            raise PlanError(f"the schedule {path} is of {has} {what}, the plan asks for {asked}\n  use {way}")
    return Planned(
        num_ranks=num_ranks,
        num_microbatches=number,
        num_chunks=found.num_chunks,
        make=lambda pipeline: read(text, edges=pipeline.edges, costs=pipeline.costs, name=path),
    )
