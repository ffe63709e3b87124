"""Simulated steps against the formulas of the papers, and steps as text, picture and trace."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from meshwright.compiler.errors import PlanError
from meshwright.passes.prove import prove
from meshwright.passes.schedules import ALGORITHMS, Costs, Pipeline, Schedule, chain, fastest, of_orders, schedule
from meshwright.passes.schedules.drawing import svg
from meshwright.passes.schedules.pipeline import Compute
from meshwright.passes.schedules.simulate import Simulation
from meshwright.passes.schedules.timeline import text, trace
from tests.null.steps import steps

Times = tuple[float, float, float]
"""Of F, I and W, of a whole rank and one microbatch."""

EVEN, TIMES = (2.0, 2.0, 2.0), ((2.0, 2.0, 2.0), (2.0, 3.0, 1.0), (4.0, 4.0, 2.0))


def simulated(name: str, p: int, m: int, times: Times = EVEN, v: int | None = None, message: float = 0.0) -> Simulation:
    num_chunks = v or ALGORITHMS[name].chunks or 2
    forward, inputs, weights = times
    costs = Costs.even(p, num_chunks, forward=forward, inputs=inputs, weights=weights, message=message)
    return schedule(name, Pipeline.of(num_ranks=p, num_microbatches=m, num_chunks=num_chunks, costs=costs)).simulation()


def bubble(step: Simulation, m: int, times: Times = EVEN) -> float:
    return step.makespan - m * sum(times)


# schedule, chunks, (p, v, F, I, W) -> bubble of the step
FORMULAS: list[tuple[str, int, Callable[[int, int, float, float, float], float]]] = [
    ("gpipe", 1, lambda p, v, f, i, w: (p - 1) * (f + i + w)),
    ("1f1b", 1, lambda p, v, f, i, w: (p - 1) * (f + i + w)),
    ("interleaved", 2, lambda p, v, f, i, w: (p - 1) * (f + i + w) / v),
    ("interleaved", 3, lambda p, v, f, i, w: (p - 1) * (f + i + w) / v),
    ("looped-bfs", 2, lambda p, v, f, i, w: (p - 1) * (f + i + w) / v),
    ("looped-bfs", 3, lambda p, v, f, i, w: (p - 1) * (f + i + w) / v),
    ("zb-h1", 1, lambda p, v, f, i, w: (p - 1) * (f + i - w)),
    ("interleaved-zb", 2, lambda p, v, f, i, w: (p - 1) * (f + i - w) / v),
    ("interleaved-zb", 3, lambda p, v, f, i, w: (p - 1) * (f + i - w) / v),
    ("zb-h2", 1, lambda p, v, f, i, w: (p - 1) * max(f, f + i - 2 * w)),
]


@pytest.mark.parametrize(("name", "v", "formula"), FORMULAS, ids=[f"{name}-{v}" for name, v, _ in FORMULAS])
def test_bubbles_are_those_of_the_papers(name: str, v: int, formula: Callable[..., float]) -> None:
    for p, times, rounds in itertools.product((4, 8), TIMES, (2, 3)):
        m = rounds * p
        assert bubble(simulated(name, p, m, times, v), m, times) == pytest.approx(formula(p, v, *times)), (p, times)


# schedule, chunks, (p, v, m, rank) -> chunks alive at once
PEAKS: list[tuple[str, int, Callable[[int, int, int, int], int]]] = [
    ("gpipe", 1, lambda p, v, m, r: m),
    ("1f1b", 1, lambda p, v, m, r: min(m, p - r)),
    ("interleaved", 2, lambda p, v, m, r: (v - 1) * p + 2 * (p - 1 - r) + 1),
    ("interleaved", 3, lambda p, v, m, r: (v - 1) * p + 2 * (p - 1 - r) + 1),
    ("looped-bfs", 2, lambda p, v, m, r: v * m),
    ("zb-h1", 1, lambda p, v, m, r: p),
    ("zb-h2", 1, lambda p, v, m, r: 2 * p - 1),
    ("interleaved-zb", 3, lambda p, v, m, r: v * p),
    ("zbv", 2, lambda p, v, m, r: v * p),
    ("dualpipe-v", 2, lambda p, v, m, r: v * p + 1),
    ("v-half", 2, lambda p, v, m, r: v * ((p + 2) // 2)),
    ("v-min", 2, lambda p, v, m, r: v * ((p + 4) // 3)),
]


@pytest.mark.parametrize(("name", "v", "formula"), PEAKS, ids=[f"{name}-{v}" for name, v, _ in PEAKS])
def test_peaks_are_those_of_the_papers(name: str, v: int, formula: Callable[..., int]) -> None:
    for p in (4, 8):
        m = 2 * p
        step = simulated(name, p, m, v=v)
        alive = [max(chunks for _, chunks, _ in step.alive(rank)) for rank in range(p)]
        if name == "v-min":
            alive = [max(alive)] * p  # some ranks need less
        else:
            assert step.peaks == pytest.approx([chunks / v for chunks in alive])
        assert alive == [formula(p, v, m, rank) for rank in range(p)]


@pytest.mark.parametrize("p", [4, 8])
def test_zero_bubble_is_zero_within_ranks(p: int) -> None:
    """If F, I and W take the same time; the step of ZB-V has a bubble of (p - 1) F / 2 all the same."""
    for m in (2 * p, 3 * p):
        assert simulated("zb-h2", p, m).idle == pytest.approx([0.0] * p)
        assert simulated("zbv", p, m).idle == pytest.approx([0.0] * p)
        assert bubble(simulated("zbv", p, m), m) == pytest.approx((p - 1) * EVEN[0] / 2)
    assert simulated("zb-h2", p, 3 * p, (2.0, 3.0, 1.0)).idle[0] == pytest.approx((p - 1) * 3.0)


def test_with_a_synchronization_zbv_is_interleaved_zero_bubble() -> None:
    for name in ("zbv", "interleaved-zb"):
        assert round(simulated(name, 4, 8).bubble_share, 3) == 0.059


@pytest.mark.parametrize("p", [4, 8])
def test_dual_pipe_v_when_balanced(p: int) -> None:
    """(p - 1) F of a chunk. The paper's (p - 1) (F&B + B - 3 W) is twice that: there both results of a pair leave at
    its end, here the forward's leaves before the backward.
    """
    m = 2 * p
    assert bubble(simulated("dualpipe-v", p, m), m) == pytest.approx((p - 1) * EVEN[0] / 2)


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize(("name", "part"), [("v-half", 1 / 2), ("v-min", 2 / 3)])
def test_less_memory_costs_no_more_time_than_the_paper_says(name: str, part: float, p: int) -> None:
    m = 3 * p
    assert bubble(simulated(name, p, m), m) <= part * p * sum(EVEN)


@pytest.mark.parametrize("p", [2, 3, 5, 6, 7, 12])
@pytest.mark.parametrize("name", ["v-half", "v-min"])
def test_blocks_are_found_for_any_number_of_ranks(name: str, p: int) -> None:
    step = schedule(name, Pipeline.of(num_ranks=p, num_chunks=2, num_microbatches=p + 1))
    prove(step.rows, num_microbatches=p + 1, edges=chain(2 * p), placement=step.placement, peaks=step.peaks)


@settings(deadline=None)
@given(steps())
def test_a_computation_begins_as_soon_as_its_rank_and_what_it_takes_are_there(step: Schedule) -> None:
    times = step.simulation()
    costs = step.pipeline.costs
    made = {
        ("F" if c.kind == "F" else "B", c.stage, c.microbatch): end
        for s in times.ranks
        for _, end, c in s
        if c.kind != "W"
    }
    for rank, spans in enumerate(times.ranks):
        assert tuple(span.compute for span in spans) == step.orders[rank]
        free = 0.0
        for begin, end, (kind, stage, microbatch) in spans:
            arrivals = [free]
            for source, destination, *gradient in step.pipeline.edges:
                other = source if kind == "F" else destination
                if (
                    kind != "W"
                    and stage == (destination if kind == "F" else source)
                    and (kind == "F" or gradient != [False])
                ):
                    away = costs.message if step.placement[other] != rank else 0.0
                    arrivals.append(made["F" if kind == "F" else "B", other, microbatch] + away)
            assert begin == max(arrivals)
            free = end
    drawn = svg(times, step.name) + text(times) + trace(times)
    assert "nan" not in drawn.lower()


def test_messages_take_time_between_ranks_alone() -> None:
    assert bubble(simulated("1f1b", 2, 1, message=0.5), 1) == pytest.approx(6.0 + 1.0)
    step = simulated("zbv", 2, 1, message=0.5)
    assert [(str(m.source), str(m.destination), m.end - m.begin) for m in step.messages] == [
        ("0F0", "1F0", 0.5), ("2F0", "3F0", 0.5), ("3I0", "2I0", 0.5), ("1I0", "0I0", 0.5)
    ]  # fmt: skip


def test_stages_have_costs_of_their_own() -> None:
    costs = Costs(forward=(1, 3), inputs=(1, 1), weights=(1, 1), activations=(5, 7))
    step = schedule("1f1b", Pipeline.of(num_ranks=2, num_microbatches=2, costs=costs)).simulation()
    assert (step.makespan, step.busy, step.peaks) == (13.0, (6.0, 10.0), (10.0, 7.0))
    with pytest.raises(ValueError, match="costs of 1, 2 stages"):
        Costs(forward=(1, 3), inputs=(1,), weights=(1, 1), activations=(5, 7))
    with pytest.raises(ValueError, match="a cost is negative"):
        Costs(forward=(1,), inputs=(1,), weights=(-1,), activations=(5,))
    with pytest.raises(ValueError, match="costs of 2 stages for a pipeline of 3"):
        Pipeline.of(3, 1, costs=costs)


@pytest.mark.parametrize(
    ("name", "p", "v", "m", "message"),
    [
        (
            "zbv",
            2,
            3,
            4,
            "schedule='zbv' runs 2 of the stages on every rank, not 3\n"
            "  use stages_per_rank=None, or a schedule of 3: interleaved, looped-bfs, interleaved-zb",
        ),
        (
            "1f1b",
            2,
            2,
            4,
            "schedule='1f1b' runs 1 of the stages on every rank, not 2\n"
            "  use stages_per_rank=None, or a schedule of 2: interleaved, looped-bfs, interleaved-zb, zbv, dualpipe-v, "
            "v-half, v-min",
        ),
        (
            "interleaved",
            2,
            1,
            4,
            "schedule='interleaved' runs 2 or more of the stages on every rank, not 1\n"
            "  use stages_per_rank=None, or a schedule of 1: gpipe, 1f1b, zb-h1, zb-h2",
        ),
        (
            "dualpipe-v",
            4,
            2,
            5,
            "schedule='dualpipe-v' is not defined for 5 microbatches over pp=4: they are fewer than the stages\n"
            "  use microbatches=8, or another schedule",
        ),
        (
            "interleaved",
            4,
            2,
            9,
            "schedule='interleaved' is not defined for 9 microbatches over pp=4: they make no equal rounds of at least "
            "4\n  use microbatches=8 or 10, or another schedule",
        ),
    ],
)
def test_what_a_schedule_is_not_defined_for_is_refused(name: str, p: int, v: int, m: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        schedule(name, Pipeline.of(num_ranks=p, num_chunks=v, num_microbatches=m))
    assert str(error.value) == message


def pipelines(p: int, m: int, **costs: float) -> dict[int, Pipeline]:
    return {
        v: Pipeline.of(num_ranks=p, num_chunks=v, num_microbatches=m, costs=Costs.even(p, v, **costs))
        for v in (1, 2, 3)
    }


def test_the_fastest_within_the_memory() -> None:
    def chosen(most: float | None, **costs: float) -> tuple[str, int]:
        step = fastest(pipelines(4, 8, **costs), most)
        return step.name, step.pipeline.num_chunks

    assert chosen(None) == ("interleaved-zb", 3)
    assert chosen(None, message=1.0) == ("zb-h2", 1)
    assert chosen(4.0, message=0.25) == ("zbv", 2)
    assert chosen(3.0) == ("v-half", 2)
    assert chosen(2.0) == ("v-min", 2)
    with pytest.raises(PlanError) as error:
        fastest(pipelines(4, 8, activations=1e9), 1.5e9)
    assert str(error.value) == (
        "no schedule keeps at most 1.5e+09 bytes of activations alive on every pipeline rank: 'v-min' needs the least, "
        "2e+09\n  use more microbatches or more pipeline ranks"
    )


def own(rows: Sequence[str], **shape: Any) -> Schedule:
    orders = [[Compute(word[1], int(word[0]), int(word[2])) for word in row.split()] for row in rows]  # type: ignore[arg-type]
    return of_orders("own", Pipeline.of(num_microbatches=1, **shape), orders)


def test_a_schedule_of_the_user_s_own() -> None:
    step = own(["0F0 3F0 3I0 0B0 3W0", "1F0 2F0 2B0 1B0"], num_ranks=2, num_chunks=2)
    assert step.placement == (0, 1, 1, 0)
    assert prove(step.rows, num_microbatches=1, edges=chain(4), placement=step.placement) == (2, 2)
    with pytest.raises(PlanError, match="^schedule 'own' is of 1 ranks, the pipeline of 2$"):
        own(["0F0 0B0"], num_ranks=2)
    stuck = own(["1F0 0F0 1B0 0B0"], num_ranks=1, num_chunks=2)
    with pytest.raises(PlanError, match="^the schedule comes to no end: no rank can go on with 1F0$"):
        stuck.simulation()


def test_a_step_as_text() -> None:
    assert text(simulated("1f1b", 2, 2, (1.0, 1.0, 1.0))) == (
        "rank 0  F0 F1 .  .  B0 -- .  B1 --  peak 2\n"
        "rank 1  .  F0 B0 -- F1 B1 -- .  .   peak 1\n"
        "makespan 9, bubble 33.3%, idle within ranks 16.7%\n"
    )
    assert text(simulated("zbv", 2, 2)) == (
        "rank 0  0F0 0F1 .   3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 .   0I1 0W1  peak 1.5\n"
        "rank 1  .   1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 2I1 2W1 1I1 1W1 .    peak 2\n"
        "makespan 14, bubble 14.3%, idle within ranks 7.1%\n"
    )
    assert text(simulated("1f1b", 2, 1, message=0.5), column=2.0).startswith("rank 0  F0 .  ")


def test_a_step_as_a_picture() -> None:
    """Well-formed, and every computation where and as long as it is."""
    step = simulated("zbv", 3, 5, TIMES[1])
    root = ElementTree.fromstring(svg(step, "<zbv & more>"))
    space = "{http://www.w3.org/2000/svg}"
    assert "<zbv & more>" in [element.text for element in root.iter(f"{space}text")]
    drawn = {}
    for rectangle in root.iter(f"{space}rect"):
        for title in rectangle.iter(f"{space}title"):
            assert title.text is not None
            drawn[title.text.split(":")[0]] = [float(rectangle.attrib[key]) for key in ("x", "y", "width")]
    expected = {str(span.compute): (rank, span) for rank, spans in enumerate(step.ranks) for span in spans}
    assert drawn.keys() == expected.keys()
    scale = (max(x + width for x, _, width in drawn.values()) - drawn["0F0"][0]) / step.makespan
    for name, (rank, span) in expected.items():
        x, y, width = drawn[name]
        assert x == pytest.approx(drawn["0F0"][0] + span.begin * scale, abs=0.02)
        assert width == pytest.approx((span.end - span.begin) * scale, abs=0.02)
        assert y == drawn["0F0"][1] + rank * (drawn["1F0"][1] - drawn["0F0"][1])
        assert x + width <= float(root.attrib["width"])


def test_a_step_as_a_trace() -> None:
    step = simulated("1f1b", 2, 2, message=0.5)
    events = json.loads(trace(step))["traceEvents"]
    slices = {(e["tid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert len(slices) == 8
    assert slices[1, "F0"] == {
        "ph": "X", "name": "F0", "cat": "forward", "pid": 0, "tid": 1, "ts": 2.5e6, "dur": 2e6
    }  # fmt: skip
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0", "rank 1"]
    levels = [(e["ts"], e["args"]["activations"]) for e in events if e["ph"] == "C" and e["tid"] == 0]
    assert levels[:3] == [(0.0, 1.0), (2e6, 2.0), (13e6, 1.0)]
    begun, ended = ([e for e in events if e["ph"] == phase] for phase in "sf")
    assert [e["id"] for e in begun] == [e["id"] for e in ended] == list(range(4))
    for event in (*begun, *ended):
        assert any(e["tid"] == event["tid"] and e["ts"] < event["ts"] < e["ts"] + e["dur"] for e in slices.values())
