"""What the generators of schedules make; test_prove.py shows that any pipeline gets a schedule that can be proven."""

import warnings
from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meshwright import Mesh, compile_parallel
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
        ("gpipe", 2, 2, [(0, 1)], ["F0>s1  F1>s1  s1>B0  s1>B1", "s0>F0  s0>F1  B0>s0  B1>s0"]),
        ("1f1b", 1, 2, [], ["F0  B0  F1  B1"]),
        ("1f1b", 3, 1, chain(3), ["F0>s1  s1>B0", "s0>F0>s2  s2>B0>s0", "s1>F0  B0>s1"]),
        (
            "1f1b",
            3,
            2,
            [*chain(3), (0, 2, False), (0, 1, False)],
            ["F0>s1,s2  F1>s1,s2  s1>B0  s1>B1", "s0>F0>s2  s0>F1>s2  s2>B0>s0  s2>B1>s0"]
            + ["s0,s1>F0  B0>s1  s0,s1>F1  B1>s1"],
        ),
    ],
)
def test_schedule_text(name: str, stages: int, microbatches: int, edges: list[Edge], text: list[str]) -> None:
    assert [render(row, "stage") for row in rows(name, stages, microbatches, edges)] == text


def test_peers_ascend() -> None:
    first, *_, last = rows("gpipe", 6, 1, [(a, b) for b in range(5, 0, -1) for a in range(b)])
    assert render(first, "stage") == "F0>s1,s2,s3,s4,s5  s1,s2,s3,s4,s5>B0"
    assert render(last, "stage") == "s0,s1,s2,s3,s4>F0  B0>s0,s1,s2,s3,s4"


def test_ranks_of_a_mesh() -> None:
    first, second = rows("1f1b", 2, 4, [(0, 1)])
    assert render(to_ranks(first, [0, 2])) == "F0>2  F1>2  2>B0  F2>2  2>B1  F3>2  2>B2  2>B3"
    assert render(to_ranks(second, {0: 4, 1: 6})) == "4>F0  B0>4  4>F1  B1>4  4>F2  B2>4  4>F3  B3>4"


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


def test_a_long_skip_holds_1f1b_back_where_it_must() -> None:
    assert peaks("1f1b", 5, 9, chain(5)) == (5, 4, 3, 2, 1)
    assert peaks("1f1b", 5, 9, [*chain(5), (0, 2)]) == (5, 4, 3, 2, 1)
    assert peaks("1f1b", 5, 9, [*chain(5), (0, 4, False)]) == (5, 4, 3, 2, 1)
    assert peaks("1f1b", 5, 9, [*chain(5), (0, 4)]) == (5, 4, 3, 3, 3)
    with pytest.raises(InternalError, match="where nothing is buffered, "):
        prove(plain_1f1b(4, 4, [*chain(4), (0, 3)]), num_microbatches=4, edges=[*chain(4), (0, 3)])


def plain_1f1b(num_stages: int, num_microbatches: int, edges: list[Edge]) -> list[Row]:
    """The order for a chain with the messages of other edges."""
    order = rows("1f1b", num_stages, num_microbatches, chain(num_stages))
    talk = rows("gpipe", num_stages, num_microbatches, edges)
    by_name = [{(action.kind, action.microbatch): action for action in row} for row in talk]
    return [tuple(by_name[stage][a.kind, a.microbatch] for a in row) for stage, row in enumerate(order)]


@pytest.mark.parametrize(
    ("name", "microbatches", "message"),
    [
        ("none", 2, f"unknown schedule 'none': the schedules are {', '.join(ALGORITHMS)}"),
        (
            "ZB-V",
            2,
            "unknown schedule 'ZB-V': the schedules are gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, "
            "interleaved-zb, zbv, dualpipe-v, v-half, v-min\n  did you mean 'zbv'?",
        ),
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
    assert set(SCHEDULES) <= set(ALGORITHMS)


class Skip(nn.Module):
    """Four layers, the input of the first used after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return (x * first).pow(2).mean()  # type: ignore[no-any-return]


def test_a_skip_that_holds_the_schedule_back_is_told() -> None:
    def told(pp: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = compile_parallel(Skip(), Mesh(pp=pp), example_inputs=(torch.randn(8, 8),))
        assert [str(one.message) for one in caught] == list(program.lowered.warnings)
        return list(program.lowered.warnings)

    (line,) = told(4)
    assert "goes from stage 0 to stage 3 and its gradient back: schedule='1f1b' waits for it" in line
    assert told(2) == []
