"""What the proof of a schedule accepts and refuses, by hand and against a machine that runs the actions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.passes.prove import prove
from meshwright.passes.schedule import GENERATORS, PEAKS, Edge, schedule
from meshwright.runtime.actions import Action, parse

Row = tuple[Action, ...]

FIRST = "F0>s1  F1>s1  s1>B0  s1>B1"
SECOND = "s0>F0  s0>F1  B0>s0  B1>s0"

CASES: dict[str, tuple[list[str], list[Edge], str]] = {
    "own rank": (["F0>s0  F1  B0  B1"], [], "F0>s0 on pipeline rank 0 talks to its own rank"),
    "no such rank": (
        ["F0>s1  F1  B0  B1"],
        [],
        "F0>s1 on pipeline rank 0 talks to pipeline rank 1, but the last one is 0",
    ),
    "no such edge": ([FIRST, SECOND], [(0, 2)], "the edge (0, 2) does not join two of the 2 stages"),
    "missing": (["F0>s1  F1>s1  s1>B0", SECOND], [(0, 1)], "pipeline rank 0 never runs B1"),
    "doubled": (
        ["F0>s1  F1>s1  s1>B0  s1>B0  s1>B1", SECOND],
        [(0, 1)],
        "s1>B0 on pipeline rank 0 is not the only B0 there",
    ),
    "renamed": (
        ["F0>s1  F2>s1  s1>B0  s1>B1", SECOND],
        [(0, 1)],
        "F2>s1 on pipeline rank 0 is of a microbatch beyond the last, 1",
    ),
    "backward first": (
        ["F0>s1  s1>B1  F1>s1  s1>B0", SECOND],
        [(0, 1)],
        "s1>B1 on pipeline rank 0 is before the forward F1",
    ),
    "descending": (
        ["F0>s1  F1>s1  s1>B1  s1>B0", SECOND],
        [(0, 1)],
        "s1>B0 on pipeline rank 0 adds its gradients after those of s1>B1",
    ),
    "no receive": (
        [FIRST, "s0>F0  F1  B0>s0  B1>s0"],
        [(0, 1)],
        "F1>s1 on pipeline rank 0 sends to F1 on pipeline rank 1, which does not receive from it",
    ),
    "no send": (
        ["F0>s1  F1  s1>B0  s1>B1", SECOND],
        [(0, 1)],
        "s0>F1 on pipeline rank 1 receives from F1 on pipeline rank 0, which does not send to it",
    ),
    "no message": (
        ["F0  F1>s1  s1>B0  s1>B1", "F0  s0>F1  B0>s0  B1>s0"],
        [(0, 1)],
        "F0 on pipeline rank 0 does not send to F0 on pipeline rank 1, though an edge between them needs it",
    ),
    "no gradient": (
        [FIRST, SECOND],
        [(0, 1, False)],
        "B0>s0 on pipeline rank 1 sends to s1>B0 on pipeline rank 0, though no edge between them needs it",
    ),
    "message order": (
        [FIRST, "s0>F1  s0>F0  B0>s0  B1>s0"],
        [(0, 1)],
        "send 0 from pipeline rank 0 to pipeline rank 1 is that of F0, but receive 0 there is that of F1",
    ),
    "circle of data": (
        ["F0>s1  s1>B0  F1>s1  s1>B1", SECOND],
        [(0, 1)],
        (
            "actions wait for each other in a circle:\n"
            "  s1>B0 on pipeline rank 0 waits for\n"
            "  B0>s0 on pipeline rank 1 waits for\n"
            "  s0>F1 on pipeline rank 1 waits for\n"
            "  F1>s1 on pipeline rank 0 waits for\n"
            "  s1>B0 on pipeline rank 0"
        ),
    ),
}


@pytest.mark.parametrize(("rows", "edges", "message"), CASES.values(), ids=CASES)
def test_the_proof_refuses(rows: list[str], edges: list[Edge], message: str) -> None:
    with pytest.raises(PlanError) as error:
        prove([parse(row, "stage") for row in rows], num_microbatches=2, edges=edges, error=PlanError)
    assert str(error.value) == f"the schedule is wrong: {message}"


def test_the_proof_refuses_a_deadlock_where_nothing_is_buffered() -> None:
    rows = ["F0>s1  F1>s1  F2>s1  F3>s1  s1>B0  s1>B1  s1>B2  s1>B3"]
    rows += ["s0>F0  B0>s0  s0>F1  B1>s0  s0>F2  B2>s0  s0>F3  B3>s0"]
    with pytest.raises(InternalError) as error:
        prove([parse(row, "stage") for row in rows], num_microbatches=4, edges=[(0, 1)])
    assert str(error.value) == (
        "the schedule is wrong: where nothing is buffered, ranks wait for each other in a circle:\n"
        "  pipeline rank 0 between F3>s1 and s1>B0 waits for\n"
        "  pipeline rank 1 between s0>F2 and B2>s0 waits for\n"
        "  pipeline rank 1 between B1>s0 and s0>F2 waits for\n"
        "  pipeline rank 0 between F3>s1 and s1>B0"
    )


def test_sends_and_receives_can_wait_in_one_circle() -> None:
    """Rank 1 waits to hear from rank 0, that from rank 2, and rank 2 to be rid of its gradient for rank 1."""
    rows = ["F0>s1,s2  s2>B0  F1>s1,s2  s2>B1  F2>s1,s2  s2>B2"]
    rows += ["s0>F0>s2  s0>F1>s2  s0>F2>s2  s2>B0  s2>B1  s2>B2"]
    rows += ["s0,s1>F0  B0>s0,s1  s0,s1>F1  B1>s0,s1  s0,s1>F2  B2>s0,s1"]
    edges: list[Edge] = [(0, 1, False), (0, 2), (1, 2)]
    with pytest.raises(InternalError) as error:
        prove([parse(row, "stage") for row in rows], num_microbatches=3, edges=edges)
    assert str(error.value) == (
        "the schedule is wrong: where nothing is buffered, ranks wait for each other in a circle:\n"
        "  pipeline rank 0 between F1>s1,s2 and s2>B1 waits for\n"
        "  pipeline rank 2 between s0,s1>F1 and B1>s0,s1 waits for\n"
        "  pipeline rank 2 between B0>s0,s1 and s0,s1>F1 waits for\n"
        "  pipeline rank 1 between s0>F1>s2 and s0>F2>s2 waits for\n"
        "  pipeline rank 0 between s2>B1 and F2>s1,s2 waits for\n"
        "  pipeline rank 0 between F1>s1,s2 and s2>B1"
    )


def test_the_proof_refuses_more_memory_than_declared() -> None:
    with pytest.raises(InternalError) as error:
        prove(schedule("gpipe", 2, 3, [(0, 1)]), num_microbatches=3, edges=[(0, 1)], peaks=(3, 1))
    assert str(error.value) == (
        "the schedule is wrong: pipeline rank 1 keeps 3 microbatches alive at once, more than the 1 declared"
    )


def test_a_step_has_microbatches() -> None:
    with pytest.raises(InternalError, match="^the schedule is wrong: a step has 0 microbatches, less than one$"):
        prove([()], num_microbatches=0, edges=[])


def runs_right(rows: Sequence[Row], num_microbatches: int, edges: Sequence[Edge]) -> bool:
    """Run the actions with unbuffered messages matched by order alone; True if all of it comes to a right end."""
    down = {edge[:2] for edge in edges}
    up = {(edge[1], edge[0]) for edge in edges if edge[2:] != (False,)}
    done: list[list[str]] = [[] for _ in rows]
    to_send = [dict[int, str]() for _ in rows]
    heard = [dict[int, str]() for _ in rows]
    at = [0 for _ in rows]

    def listens(rank: int) -> set[int]:
        return (set(rows[rank][at[rank]].receives) if at[rank] < len(rows[rank]) else set()) - set(heard[rank])

    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(rows):
            for peer in list(to_send[rank]):
                if peer < len(rows) and peer != rank and rank in listens(peer):
                    heard[peer][rank] = to_send[rank].pop(peer)
                    progress = True
            if to_send[rank] or listens(rank) or at[rank] == len(row):
                continue
            action = row[at[rank]]
            name = f"{action.kind}{action.microbatch}"
            sources = {a for a, b in (down if action.kind == "F" else up) if b == rank}
            if heard[rank] != dict.fromkeys(sources, name) or name in done[rank]:
                return False
            done[rank].append(name)
            heard[rank] = {}
            to_send[rank] = dict.fromkeys(action.sends, name)
            at[rank] += 1
            progress = True
    if any(to_send) or at != [len(row) for row in rows]:
        return False
    steps = range(num_microbatches)
    return all(
        sorted(names) == sorted([f"F{m}" for m in steps] + [f"B{m}" for m in steps])
        and [name for name in names if name[0] == "B"] == [f"B{m}" for m in steps]
        and all(names.index(f"F{m}") < names.index(f"B{m}") for m in steps)
        for names in done
    )


def accepted(rows: Sequence[Row], num_microbatches: int, edges: Sequence[Edge]) -> bool:
    try:
        prove(rows, num_microbatches=num_microbatches, edges=edges)
    except InternalError:
        return False
    return True


@st.composite
def pipelines(draw: st.DrawFn, most: int = 8) -> tuple[str, int, int, list[Edge]]:
    """A schedule's name, stages, microbatches and any edges, with and without gradient."""
    num_stages = draw(st.integers(1, most))
    pairs = [(a, b) for b in range(num_stages) for a in range(b)]
    skips = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    edges: list[Edge] = [(a, b, draw(st.booleans())) for a, b in skips]
    if draw(st.booleans()):
        edges += [(stage, stage + 1) for stage in range(num_stages - 1)]
    return draw(st.sampled_from(sorted(GENERATORS))), num_stages, draw(st.integers(1, 2 * most)), edges


@settings(deadline=None)
@given(pipelines())
def test_every_pipeline_has_a_proven_schedule(pipeline: tuple[str, int, int, list[Edge]]) -> None:
    name, _, num_microbatches, edges = pipeline
    rows = schedule(*pipeline)
    prove(rows, num_microbatches=num_microbatches, edges=edges, peaks=PEAKS[name](*pipeline[1:]))
    assert runs_right(rows, num_microbatches, edges)


def drop(row: Row, i: int, j: int) -> Row:
    return row[:i] + row[i + 1 :]


def duplicate(row: Row, i: int, j: int) -> Row:
    return (*row[:j], row[i], *row[j:])


def rename(row: Row, i: int, j: int) -> Row:
    return (*row[:i], dataclasses.replace(row[i], microbatch=row[i].microbatch + 1 + j), *row[i + 1 :])


def swap(row: Row, i: int, j: int) -> Row:
    changed = list(row)
    changed[i], changed[j] = row[j], row[i]
    return tuple(changed)


def turn(row: Row, i: int, j: int) -> Row:
    """Send to whom it should receive from, and the reverse."""
    return (*row[:i], dataclasses.replace(row[i], sends=row[i].receives, receives=row[i].sends), *row[i + 1 :])


def hear(row: Row, i: int, j: int) -> Row:
    """Receive from another set of peers."""
    return (*row[:i], dataclasses.replace(row[i], receives=row[j].receives), *row[i + 1 :])


def say(row: Row, i: int, j: int) -> Row:
    """Send to another set of peers."""
    return (*row[:i], dataclasses.replace(row[i], sends=row[j].sends), *row[i + 1 :])


def move(row: Row, i: int, j: int) -> Row:
    rest = drop(row, i, i)
    return (*rest[:j], row[i], *rest[j:])


@pytest.mark.parametrize("mutation", [drop, duplicate, rename])
@settings(deadline=None)
@given(pipeline=pipelines(most=4), data=st.data())
def test_a_missing_doubled_or_renamed_action_is_refused(mutation: Any, pipeline: Any, data: st.DataObject) -> None:
    rows = list(schedule(*pipeline))
    rank = data.draw(st.integers(0, len(rows) - 1))
    places = st.integers(0, len(rows[rank]) - 1)
    rows[rank] = mutation(rows[rank], data.draw(places), data.draw(places))
    assert not accepted(rows, *pipeline[2:])


@settings(max_examples=500, deadline=None)
@given(pipeline=pipelines(most=4), data=st.data())
def test_the_proof_accepts_what_runs_right_and_nothing_else(pipeline: Any, data: st.DataObject) -> None:
    rows = list(schedule(*pipeline))
    mutations = st.sampled_from([drop, duplicate, rename, swap, turn, hear, say, move])
    for mutation in data.draw(st.lists(mutations, min_size=1, max_size=3)):
        rank = data.draw(st.integers(0, len(rows) - 1))
        if rows[rank]:
            places = st.integers(0, len(rows[rank]) - 1)
            rows[rank] = mutation(rows[rank], data.draw(places), data.draw(places))
    assert accepted(rows, *pipeline[2:]) == runs_right(rows, *pipeline[2:])


@settings(max_examples=500, deadline=None)
@given(pipeline=pipelines(most=5), data=st.data())
def test_the_proof_knows_which_orders_run(pipeline: Any, data: st.DataObject) -> None:
    """Any order on each stage with the right messages, sometimes with two forwards of a stage swapped."""
    rows: list[Row] = []
    swapped = data.draw(st.integers(0, 4 * pipeline[1]))
    for row in schedule("gpipe", *pipeline[1:]):
        forwards, backwards = list(row[: len(row) // 2]), list(row[len(row) // 2 :])
        if len(rows) == swapped and len(forwards) > 1:
            later = data.draw(st.integers(1, len(forwards) - 1))
            forwards[later - 1 : later + 1] = forwards[later], forwards[later - 1]
        ahead = data.draw(st.lists(st.integers(0, len(forwards)), min_size=len(backwards), max_size=len(backwards)))
        order: list[Action] = []
        for microbatch, more in enumerate(ahead):
            while forwards and len(order) < 2 * microbatch + 1 + more:
                order.append(forwards.pop(0))
            order.append(backwards[microbatch])
        rows.append(tuple(order))
    assert accepted(rows, *pipeline[2:]) == runs_right(rows, *pipeline[2:])
