"""The schedule that a step is fastest with, and its cut."""

from typing import Any

import pytest
import torch

from meshwright import Mesh, Plan, PlanError
from meshwright.passes.auto import choose
from meshwright.passes.partition import Partition, partition
from meshwright.passes.prove import prove
from meshwright.passes.schedules import ALGORITHMS, EQUAL, Pipeline, Schedule, schedule
from meshwright.passes.timing import costs, edges
from tests.null.passes import timed_blocks
from tests.null.test_measured import layers

X = torch.randn(48, 16)


def chosen(count: int, pp: int, **choices: Any) -> tuple[Partition, Schedule]:
    plan = Plan(schedule="auto", **choices)
    blocks, timing = timed_blocks(layers(count), (X,), plan, pp=pp)
    pipeline = choose(blocks, Mesh(pp=pp), plan, timing)
    parts = partition(blocks, pipeline.num_stages, plan.split, timing.seconds)
    step = pipeline.make(
        Pipeline.of(
            pp,
            pipeline.num_microbatches,
            pipeline.num_chunks,
            edges=edges(blocks, parts),
            costs=costs(parts, timing),
        )
    )
    prove(
        step.rows,
        num_microbatches=step.pipeline.num_microbatches,
        edges=step.pipeline.edges,
        placement=step.placement,
        peaks=step.peaks,
        ascending=True,
        error=PlanError,
    )
    return parts, step


def test_a_large_balanced_model_gets_a_zero_bubble_schedule() -> None:
    _, step = chosen(16, 4, microbatches=16)
    assert step.pipeline.num_chunks > 1 and {c.kind for order in step.orders for c in order} >= {"F", "I", "W"}
    _, other = chosen(16, 4, microbatches=16, stages_per_rank=1)
    long, short = other.simulation(), step.simulation()
    assert other.name.startswith("zb-h") and max(short.peaks) < max(long.peaks)
    assert short.makespan < EQUAL * long.makespan
    assert max(short.makespan, long.makespan) < 0.95 * schedule("1f1b", other.pipeline).simulation().makespan


def test_a_tight_limit_gets_a_schedule_that_keeps_less() -> None:
    _, free = chosen(16, 4, microbatches=16)
    most = 0.6 * max(free.simulation().peaks)
    _, step = chosen(16, 4, microbatches=16, max_activation_bytes=most)
    assert max(step.simulation().peaks) <= most
    assert (step.name, step.placement[-1]) == ("v-min", 0)


def test_one_rank_gets_the_simplest() -> None:
    _, step = chosen(4, 1, microbatches=1)
    assert (step.name, step.pipeline.num_chunks) == ("gpipe", 1)


def test_no_more_stages_are_tried_than_there_are_places_to_cut() -> None:
    parts, step = chosen(1, 2, microbatches=2, split=("head",))
    assert (len(parts.costs), step.pipeline.num_chunks) == (2, 1)


def test_a_split_says_how_many_stages_a_rank_has() -> None:
    _, step = chosen(4, 2, microbatches=4, split=("h.1", "h.2", "h.3"))
    assert step.pipeline.num_chunks == 2
    with pytest.raises(PlanError) as error:
        chosen(4, 2, microbatches=4, split=("h.1", "h.2"))
    assert str(error.value) == "split names 2 modules, for 3 stages: that is no multiple of pp=2"


def test_where_nothing_fits_the_least_is_said() -> None:
    with pytest.raises(PlanError) as error:
        chosen(16, 4, microbatches=16, max_activation_bytes=10.0)
    first, last = str(error.value).split("\n")
    assert first.startswith(
        "no schedule keeps at most 10 bytes of activations alive on every pipeline rank: 'v-min' needs"
    )
    assert last == "  use more microbatches or more pipeline ranks"


def test_a_limit_is_a_number_of_bytes() -> None:
    with pytest.raises(PlanError, match=r"^max_activation_bytes=0: a number of bytes, or None$"):
        Plan(schedule="auto", max_activation_bytes=0)


def test_a_limit_is_kept_by_auto_alone() -> None:
    with pytest.raises(PlanError) as error:
        Plan(schedule="zbv", max_activation_bytes=1e9)
    assert str(error.value) == (
        "max_activation_bytes=1000000000.0 with schedule='zbv': only schedule='auto' chooses by it"
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_schedule_is_proven_for_the_costs_of_a_model(name: str) -> None:
    """Uneven ones: an embedding without a gradient for its input, layers, a head of another size."""
    plan = Plan(microbatches=8)
    blocks, timing = timed_blocks(layers(11), (X,), plan, pp=4)
    num_chunks = ALGORITHMS[name].chunks or 3
    parts = partition(blocks, 4 * num_chunks, None, timing.seconds)
    found = costs(parts, timing)
    assert len({round(time, 9) for time in found.inputs}) > 1 and len(set(found.activations)) > 1
    step = schedule(name, Pipeline.of(4, 8, num_chunks, edges=edges(blocks, parts), costs=found))
    prove(
        step.rows,
        num_microbatches=8,
        edges=step.pipeline.edges,
        placement=step.placement,
        peaks=step.peaks,
        ascending=True,
        error=PlanError,
    )
