"""What the generators of schedules make; test_prove.py shows that any pipeline gets a schedule that can be proven."""

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.compiler.plan import SCHEDULES
from meshwright.passes.prove import prove
from meshwright.passes.schedules import ALGORITHMS, Edge, Pipeline, Row, schedule
from meshwright.passes.schedules.pipeline import chain
from meshwright.runtime.actions import render, to_ranks


def rows(name: str, stages: int, microbatches: int, edges: Collection[Edge]) -> tuple[Row, ...]:
    return schedule(name, Pipeline.of(num_ranks=stages, num_microbatches=microbatches, edges=edges)).rows


def peaks(name: str, stages: int, microbatches: int, edges: Collection[Edge]) -> tuple[int, ...]:
    return ALGORITHMS[name].peaks(Pipeline.of(num_ranks=stages, num_microbatches=microbatches, edges=edges))


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "edges", "text"),
    [
        ("gpipe", 2, 2, [(0, 1)], ["F0>s1  F1>s1  s1>B0  s1>B1", "s0>[F0]  s0>[F1]  F0  F1  B0>s0  B1>s0"]),
        ("1f1b", 1, 2, [], ["F0  B0  F1  B1"]),
        ("1f1b", 3, 1, chain(3), ["F0>s1  s1>B0", "s0>F0>s2  s2>B0>s0", "s1>F0  B0>s1"]),
        (
            "1f1b",
            3,
            2,
            [*chain(3), (0, 2, False), (0, 1, False)],
            ["F0>s1,s2  F1>s1,s2  s1>B0  s1>B1", "s0>[F0]  s0>[F1]  F0>s2  F1>s2  s2>B0>s0  s2>B1>s0"]
            + ["s0>[F0]  s0>[F1]  s1>[F0]  s1>[F1]  F0  B0>s1  F1  B1>s1"],
        ),
    ],
)
def test_schedule_text(name: str, stages: int, microbatches: int, edges: list[Edge], text: list[str]) -> None:
    assert [render(row, "stage") for row in rows(name, stages, microbatches, edges)] == text


def test_sends_ascend_and_receives_come_in_the_order_of_time() -> None:
    first, *_, last = rows("gpipe", 6, 1, [(a, b) for b in range(5, 0, -1) for a in range(b)])
    assert render(first, "stage") == "F0>s1,s2,s3,s4,s5  s5,s4,s3,s2,s1>B0"
    assert render(last, "stage") == "s0,s1,s2,s3,s4>F0  B0>s0,s1,s2,s3,s4"


def test_ranks_of_a_mesh() -> None:
    first, second = rows("1f1b", 2, 4, [(0, 1)])
    assert render(to_ranks(first, [0, 2])) == "F0>2  F1>2  2>B0  F2>2  2>B1  F3>2  2>B2  2>B3"
    assert render(to_ranks(second, {0: 4, 1: 6})) == (
        "4>[F0]  4>[F1]  F0  B0>4  F1  4>[F2]  B1>4  F2  4>[F3]  B2>4  F3  B3>4"
    )


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(1, 24))
def test_a_chain_has_the_peaks_of_the_literature(num_stages: int, num_microbatches: int) -> None:
    def shown(name: str) -> tuple[int, ...]:
        edges = chain(num_stages)
        declared = peaks(name, num_stages, num_microbatches, edges)
        made = rows(name, num_stages, num_microbatches, edges)
        assert prove(made, num_microbatches=num_microbatches, edges=edges, peaks=declared) == declared
        return declared

    assert shown("gpipe") == (num_microbatches,) * num_stages
    assert shown("1f1b") == tuple(min(num_microbatches, num_stages - stage) for stage in range(num_stages))


def test_a_long_skip_does_not_change_1f1b() -> None:
    assert peaks("1f1b", 5, 9, [*chain(5), (0, 4)]) == (5, 4, 3, 2, 1)


@pytest.mark.parametrize(
    ("name", "microbatches", "message"),
    [
        ("gpipe", 0, "a step of 0 microbatches: the least is 1\n  set microbatches=1 or more"),
    ],
)
def test_a_wrong_request_is_refused(name: str, microbatches: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        rows(name, 2, microbatches, [(0, 1)])
    assert str(error.value) == message


@pytest.mark.parametrize("edge", [(1, 0), (1, 1), (0, 2), (-1, 1)])
def test_an_edge_leads_to_a_later_stage(edge: Edge) -> None:
    with pytest.raises(InternalError) as error:
        rows("gpipe", 2, 1, [edge])
    assert str(error.value) == f"the edge {edge} does not lead to a later one of the 2 stages"


def test_the_plan_offers_what_can_be_generated() -> None:
    assert SCHEDULES == tuple(ALGORITHMS)
