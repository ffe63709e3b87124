"""What the proof of a schedule accepts and refuses, by hand and against a machine that runs the actions."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.passes.prove import prove
from meshwright.passes.schedules import ALGORITHMS, Edge, Pipeline, Row, Schedule, chain, of_orders, schedule
from meshwright.runtime.actions import forwards, parse
from tests.null.machine import runs_right
from tests.null.steps import steps

FIRST = "F0>s1  F1>s1  s1>B0  s1>B1"
SECOND = "s0>F0  s0>F1  B0>s0  B1>s0"

CASES: dict[str, tuple[list[str], list[Edge], str]] = {
    "own rank": (["F0>s0  F1  B0  B1"], [], "F0>s0 on pipeline rank 0 talks to its own rank"),
    "no such rank": (
        ["F0>s1  F1  B0  B1"],
        [],
        "F0>s1 on pipeline rank 0 talks to stage 1, but the last one is 0",
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
        [FIRST, "s0>[F1]  s0>F0  F1  B0>s0  B1>s0"],
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


# Four stages in V placement, one microbatch: stages 0 and 3 on rank 0, 1 and 2 on rank 1.
DOWN = "0F0>s1  s2>3F0  3I0>s2  s1>0I0  3W0  0W0"
UP = "s0>1F0  2F0>s3  s3>2B0  1B0>s0"

CHUNKS: dict[str, tuple[list[str], list[Edge], str]] = {
    "no stage": (
        [DOWN, UP.replace("2F0", "F0")],
        [],
        "F0>s3 on pipeline rank 1 does not say its stage, and the rank runs 1, 2",
    ),
    "no such stage": ([f"{DOWN}  4F0", UP], [], "4F0 on pipeline rank 0 is of stage 4, but the last one is 3"),
    "another rank's": (
        [f"{DOWN}  2F0", UP],
        [],
        "2F0 on pipeline rank 0 is of a stage on pipeline rank 1",
    ),
    "whole and in parts": (
        [DOWN, f"{UP}  1W0"],
        [],
        "1B0>s0 on pipeline rank 1 is a whole backward, and 1W0 is there too",
    ),
    "no weights": ([DOWN.replace("0W0", ""), UP], [], "pipeline rank 0 runs 0I0 but never 0W0"),
    "no inputs": ([DOWN.replace("s1>0I0", ""), UP], [], "pipeline rank 0 runs 0W0 but never 0I0"),
    "weights first": (
        ["0F0>s1  s2>3F0  3W0  3I0>s2  s1>0I0  0W0", UP],
        [],
        "3W0 on pipeline rank 0 is before 3I0, its other part",
    ),
    "before its source": (
        [DOWN, "2F0>s3  s0>1F0  s3>2B0  1B0>s0"],
        [],
        "2F0>s3 on pipeline rank 1 is before 1F0 on the same rank, whose result it takes",
    ),
    "gradient before its source": (
        [DOWN, "s0>1F0  2F0>s3  1B0>s0  s3>2B0"],
        [],
        "1B0>s0 on pipeline rank 1 is before 2B0 on the same rank, whose result it takes",
    ),
    "sent before": (
        [DOWN, "s0>1F0  [2F0]>s3  2F0  s3>2B0  1B0>s0"],
        [],
        "[2F0]>s3 on pipeline rank 1 sends before the result is made",
    ),
    "received after": (
        ["0F0>s1  3F0  s2>[3F0]  3I0>s2  s1>0I0  3W0  0W0", UP],
        [],
        "s2>[3F0] on pipeline rank 0 receives after it was needed",
    ),
    "received twice": (
        ["0F0>s1  s2>[3F0]  s2>3F0  3I0>s2  s1>0I0  3W0  0W0", UP],
        [],
        "s2>3F0 on pipeline rank 0 receives from stage 2 a second time",
    ),
    "sent twice": (
        [DOWN, "s0>1F0  2F0>s3  [2F0]>s3  s3>2B0  1B0>s0"],
        [],
        "[2F0]>s3 on pipeline rank 1 sends to stage 3 a second time",
    ),
    "a message of nothing": (
        [DOWN, UP.replace("2B0", "[2I0]  2B0")],
        [],
        "s3>[2I0] on pipeline rank 1 is of 2I0, which is not run there",
    ),
    "order within one exchange": (
        ["0F0>s2,s1  s2>3F0  3I0>s2  s1,s2>0I0  3W0  0W0", "s0>1F0  s0>2F0>s3  s3>2B0>s0  1B0>s0"],
        [(0, 2)],
        "send 0 from pipeline rank 0 to pipeline rank 1 is that of 2F0, but receive 0 there is that of 1F0",
    ),
}


@pytest.mark.parametrize(("rows", "skips", "message"), CHUNKS.values(), ids=CHUNKS)
def test_the_proof_refuses_what_chunks_do_wrong(rows: list[str], skips: list[Edge], message: str) -> None:
    edges = [*chain(4), *skips]
    with pytest.raises(PlanError) as error:
        prove(
            [parse(row, "stage") for row in rows],
            num_microbatches=1,
            edges=edges,
            placement=(0, 1, 1, 0),
            error=PlanError,
        )
    assert str(error.value) == f"the schedule is wrong: {message}"


def test_the_proof_accepts_chunks_and_split_backwards() -> None:
    rows = [parse(row, "stage") for row in (DOWN, UP)]
    assert prove(rows, num_microbatches=1, edges=chain(4), placement=(0, 1, 1, 0)) == (2, 2)


def test_a_stage_is_on_a_rank() -> None:
    with pytest.raises(InternalError, match="^the schedule is wrong: stage 1 is on pipeline rank 2, and there are 2$"):
        prove([(), ()], num_microbatches=1, edges=[], placement=(0, 2))


def test_gradients_may_be_added_in_any_order_where_that_is_said() -> None:
    rows = [parse("F0  F1  B1  B0", "stage")]
    assert prove(rows, num_microbatches=2, edges=[], ascending=False) == (2,)
    with pytest.raises(InternalError, match="B0 on pipeline rank 0 adds its gradients after those of B1"):
        prove(rows, num_microbatches=2, edges=[])


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
    rows = [parse(row, "stage") for row in ("F0>s1  F1>s1  s1>B0  s1>B1", "s0>F0  s0>F1  B0>s0  B1>s0")]
    with pytest.raises(InternalError) as error:
        prove(rows, num_microbatches=2, edges=[(0, 1)], peaks=(2, 1))
    assert str(error.value) == (
        "the schedule is wrong: pipeline rank 1 keeps 2 microbatches alive at once, more than the 1 declared"
    )


def test_a_step_has_microbatches() -> None:
    with pytest.raises(InternalError, match="^the schedule is wrong: a step has 0 microbatches, less than one$"):
        prove([()], num_microbatches=0, edges=[])


def accepted(step: Schedule, rows: Sequence[Row], placement: Sequence[int] | None = None) -> bool:
    number, edges = step.pipeline.num_microbatches, step.pipeline.edges
    try:
        prove(rows, num_microbatches=number, edges=edges, placement=placement or step.placement)
    except InternalError:
        return False
    return True


def right(step: Schedule, rows: Sequence[Row], placement: Sequence[int] | None = None) -> bool:
    return runs_right(rows, placement or step.placement, step.pipeline.num_microbatches, step.pipeline.edges)


@settings(deadline=None)
@given(steps(most=6))
def test_every_pipeline_has_proven_schedules(step: Schedule) -> None:
    number, edges = step.pipeline.num_microbatches, step.pipeline.edges
    prove(step.rows, num_microbatches=number, edges=edges, placement=step.placement, peaks=step.peaks)
    assert right(step, step.rows)


@settings(deadline=None)
@given(steps(most=5))
def test_the_forwards_of_every_schedule_are_a_step_of_their_own(step: Schedule) -> None:
    """As an evaluation runs them."""
    number, edges = step.pipeline.num_microbatches, step.pipeline.edges
    prove(
        list(map(forwards, step.rows)),
        num_microbatches=number,
        edges=edges,
        placement=step.placement,
        forward_only=True,
    )


def test_a_step_of_forwards_alone_has_no_backward() -> None:
    with pytest.raises(InternalError, match="B0 on pipeline rank 0 is a backward, in a step of forwards alone$"):
        prove([parse("F0  B0")], num_microbatches=1, edges=[], forward_only=True)


def drop(row: Row, i: int, j: int) -> Row:
    return row[:i] + row[i + 1 :]


def duplicate(row: Row, i: int, j: int) -> Row:
    return (*row[:j], row[i], *row[j:])


def changed(row: Row, i: int, **changes: Any) -> Row:
    """With another action at ``i``, where such an action can be written at all."""
    try:
        return (*row[:i], dataclasses.replace(row[i], **changes), *row[i + 1 :])
    except ValueError:
        return row


def rename(row: Row, i: int, j: int) -> Row:
    return changed(row, i, microbatch=row[i].microbatch + 1 + j)


def swap(row: Row, i: int, j: int) -> Row:
    found = list(row)
    found[i], found[j] = row[j], row[i]
    return tuple(found)


def turn(row: Row, i: int, j: int) -> Row:
    """Send to whom it should receive from, and the reverse."""
    return changed(row, i, sends=row[i].receives, receives=row[i].sends)


def hear(row: Row, i: int, j: int) -> Row:
    """Receive from another set of peers."""
    return changed(row, i, receives=row[j].receives)


def say(row: Row, i: int, j: int) -> Row:
    """Send to another set of peers."""
    return changed(row, i, sends=row[j].sends)


def turn_kind(row: Row, i: int, j: int) -> Row:
    """Run another kind."""
    return changed(row, i, kind=row[j].kind)


def backwards(row: Row, i: int, j: int) -> Row:
    """The same messages in the opposite order."""
    return changed(row, i, receives=row[i].receives[::-1], sends=row[i].sends[::-1])


def move(row: Row, i: int, j: int) -> Row:
    rest = drop(row, i, i)
    return (*rest[:j], row[i], *rest[j:])


@settings(max_examples=150, deadline=None)
@given(step=steps(most=3), data=st.data())
def test_the_proof_accepts_what_runs_right_and_nothing_else(step: Schedule, data: st.DataObject) -> None:
    rows = list(step.rows)
    mutations = st.sampled_from([drop, duplicate, rename, swap, turn, hear, say, turn_kind, backwards, move])
    for mutation in data.draw(st.lists(mutations, min_size=1, max_size=3)):
        rank = data.draw(st.integers(0, len(rows) - 1))
        if rows[rank]:
            places = st.integers(0, len(rows[rank]) - 1)
            rows[rank] = mutation(rows[rank], data.draw(places), data.draw(places))
    assert accepted(step, rows) == right(step, rows)


def single_mutations(step: Schedule) -> Iterator[tuple[str, list[Row]]]:
    """Every action of a schedule dropped, doubled, swapped with the next, of another microbatch, on another rank."""
    for rank, row in enumerate(step.rows):
        ways: dict[str, Callable[[int], Row]] = {
            "drop": lambda i, row=row: drop(row, i, i),  # type: ignore[misc]
            "duplicate": lambda i, row=row: duplicate(row, i, i),  # type: ignore[misc]
            "duplicate at the end": lambda i, row=row: duplicate(row, i, len(row)),  # type: ignore[misc]
            "swap": lambda i, row=row: swap(row, i, (i + 1) % len(row)),  # type: ignore[misc]
            "rename": lambda i, row=row: changed(row, i, microbatch=row[i].microbatch + 1),  # type: ignore[misc]
            "rename down": lambda i, row=row: changed(row, i, microbatch=max(0, row[i].microbatch - 1)),  # type: ignore[misc]
        }
        for index, (name, way) in itertools.product(range(len(row)), ways.items()):
            yield f"{name} {row[index].name}", [*step.rows[:rank], way(index), *step.rows[rank + 1 :]]
        for index, other in itertools.product(range(len(row)), range(len(step.rows))):
            if other != rank:
                rows = list(step.rows)
                rows[rank] = drop(row, index, index)
                rows[other] = (*rows[other][:index], row[index], *rows[other][index:])
                yield f"move {row[index].name}", rows


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_single_mutation_is_refused_or_harmless(name: str, num_ranks: int) -> None:
    """Refused by the proof if and only if the machine comes to a wrong end; only swaps can be harmless."""
    algorithm = ALGORITHMS[name]
    number = 2 * num_ranks if name == "dualpipe-v" else 2
    pipeline = Pipeline.of(num_ranks=num_ranks, num_chunks=algorithm.chunks or 2, num_microbatches=number)
    step = schedule(name, pipeline)
    harmless = []
    for what, rows in single_mutations(step):
        fine = tuple(rows) == step.rows or accepted(step, rows)
        assert fine == right(step, rows), what
        if fine and tuple(rows) != step.rows:
            harmless.append(what.split()[0])
    assert set(harmless) <= {"swap"}


@settings(max_examples=150, deadline=None)
@given(step=steps(most=4, names=("gpipe", "looped-bfs", "zb-h1", "zbv")), data=st.data())
def test_the_proof_knows_which_orders_run(step: Schedule, data: st.DataObject) -> None:
    """Computations of each rank in another order, with the messages of that order."""
    orders = [list(order) for order in step.orders]
    for _ in range(data.draw(st.integers(1, 4))):
        order = orders[data.draw(st.integers(0, len(orders) - 1))]
        i, j = (data.draw(st.integers(0, len(order) - 1)) for _ in range(2))
        order.insert(j, order.pop(i))
    own = of_orders("own", step.pipeline, orders)
    assert accepted(own, own.rows) == right(own, own.rows)
