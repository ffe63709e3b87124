"""Schedules in torch's CSV: torch's own as a second opinion on ours, and ours on theirs."""

import csv
import io
import re
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as theirs
from torch.distributed.pipelining.stage import _PipelineStageBase

from meshwright.compiler.errors import PlanError
from meshwright.passes.prove import prove
from meshwright.passes.schedules import ALGORITHMS, Pipeline, Schedule, chain, schedule
from meshwright.passes.schedules.torch_csv import read, write

# (chunks, microbatches, ranks) of torch's own tests of its schedules; the larger ones were tried by hand
TRIPLES = [
    (2, 2, 2), (2, 4, 4), (2, 8, 2), (2, 8, 4), (4, 4, 4), (4, 8, 4), (3, 2, 2), (3, 8, 2), (3, 12, 4), (4, 6, 3),
    (2, 3, 4), (2, 10, 4), (2, 15, 4),
]  # fmt: skip


class Stage(_PipelineStageBase):
    """As much of a stage as torch's schedules ask for."""

    def __init__(self, num_ranks: int, num_stages: int) -> None:
        self.num_stages, self.group_size, self.group_rank, self.group = num_stages, num_ranks, 0, None
        self.submod = None  # type: ignore[assignment]

    def _create_grad_recv_info(self, *args: Any) -> Any: ...

    def _prepare_forward_infra(self, *args: Any) -> Any: ...

    def _prepare_backward_infra(self, *args: Any) -> Any: ...


def text_of(rows: dict[int, list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([["" if a is None else str(a) for a in rows[rank]] for rank in sorted(rows)])
    return file.getvalue()


def proven(step: Schedule, ascending: bool = True) -> None:
    prove(
        step.rows,
        num_microbatches=step.pipeline.num_microbatches,
        edges=step.pipeline.edges,
        placement=step.placement,
        ascending=ascending,
        error=PlanError,
    )


CLASSES: dict[str, Any] = {
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "looped-bfs": theirs.ScheduleLoopedBFS,
    "interleaved-zb": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
    "dualpipe-v": theirs.ScheduleDualPipeV,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_proof_accepts_torch_s_own(name: str) -> None:
    """Of both kinds; looped BFS adds its gradients in descending order."""
    shown = 0
    for num_chunks, num_microbatches, num_ranks in TRIPLES:
        stages = [Stage(num_ranks, num_chunks * num_ranks) for _ in range(num_chunks)]
        try:
            made = CLASSES[name](stages, num_microbatches)
        except ValueError:
            continue
        for rows in (made.pipeline_order, made.pipeline_order_with_comms):
            step = read(text_of(rows), name=name)
            assert (step.pipeline.num_ranks, step.pipeline.num_chunks) == (num_ranks, num_chunks)
            proven(step, ascending=name != "looped-bfs")
        shown += 1
    assert shown >= 3


def refused(text: str, **options: Any) -> str:
    with pytest.raises(PlanError) as error:
        proven(read(text, **options))
    return str(error.value)


@pytest.mark.parametrize("name", ["zbv", "dualpipe-v"])
def test_receives_deferred_past_each_other_are_refused(name: str) -> None:
    """torch runs these and trains on wrong gradients."""
    made = CLASSES[name]([Stage(4, 8), Stage(4, 8)], 8, defer_pp_recv=True)
    assert "receive" in refused(text_of(made.pipeline_order_with_comms)).split("\n")[0]


def test_torch_s_list_of_plain_1f1b_is_refused() -> None:
    """The last rank has F1 to Fm there, and nothing asks for the first."""
    made = theirs.Schedule1F1B(Stage(2, 2), 4)
    order = made._get_pipeline_order()
    assert order is not None
    assert refused(text_of(order)) == ("the schedule is wrong: pipeline rank 0 never runs F4")


def rows_of(text: str) -> dict[int, list[Any]]:
    return {
        rank: [theirs._Action.from_str(cell) for cell in row] for rank, row in enumerate(csv.reader(io.StringIO(text)))
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_torch_accepts_ours(name: str) -> None:
    """Its validator the computations, its simulator the messages; and we read what we have written."""
    for num_ranks, num_microbatches in ((1, 3), (2, 4), (3, 9), (4, 8)):
        num_chunks = ALGORITHMS[name].chunks or 2
        pipeline = Pipeline.of(num_ranks=num_ranks, num_chunks=num_chunks, num_microbatches=num_microbatches)
        step = schedule(name, pipeline)
        rows = rows_of(write(step))
        where = theirs._validate_schedule(rows, num_ranks, pipeline.num_stages, num_microbatches)
        assert [where[stage] for stage in range(pipeline.num_stages)] == list(step.placement)
        with_messages = rows_of(write(step, messages=True))
        for rank, row in with_messages.items():
            reduced = [action.stage_index for action in row if action.computation_type == theirs.REDUCE_GRAD]
            assert sorted(reduced) == [stage for stage, own in enumerate(step.placement) if own == rank]
            row[:] = [action for action in row if action.computation_type != theirs.REDUCE_GRAD]  # not simulated
        theirs._simulate_comms_compute(with_messages, list(step.placement).__getitem__, pipeline.num_stages)
        for messages in (False, True):
            again = read(write(step, messages=messages), costs=pipeline.costs)
            assert (again.orders, again.rows, again.placement) == (step.orders, step.rows, step.placement)


def swap(text: str, one: str, other: str) -> str:
    return text.replace(one, "#").replace(other, one).replace("#", other)


FOUR = schedule("zbv", Pipeline.of(num_ranks=2, num_chunks=2, num_microbatches=3))
HOLES: dict[str, tuple[str, bool, str]] = {
    "a duplicate": (
        write(FOUR).replace("1F1,", "1F1,1F1,", 1),
        False,
        "1F1 on pipeline rank 1 is not the only 1F1 there",
    ),
    "an order across ranks that waits in a circle": (
        "0F0,3F0,3B0,0B0\n2F0,1F0,2B0,1B0\n",
        False,
        "2F0>s3 on pipeline rank 1 is before 1F0 on the same rank, whose result it takes",
    ),
    "messages in another order than they are received": (
        swap(re.sub(",[0-9]REDUCE_GRAD", "", write(FOUR, messages=True)), "1RECV_F1", "1RECV_F2"),
        True,
        "send 1 from pipeline rank 0 to pipeline rank 1 is that of 1F1, but receive 1 there is that of 1F2",
    ),
}


@pytest.mark.parametrize(("text", "messages", "reason"), HOLES.values(), ids=HOLES)
def test_what_torch_s_tools_let_pass_is_refused(text: str, messages: bool, reason: str) -> None:
    step = read(text)
    number = step.pipeline.num_stages
    rows = rows_of(text)
    theirs._validate_schedule(rows, 2, number, step.pipeline.num_microbatches)
    if messages:
        theirs._simulate_comms_compute(rows, list(FOUR.placement).__getitem__, number)
    assert refused(text).split("\n")[0] == f"the schedule is wrong: {reason}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0G0,0B0\n", "row 0, column 1: '0G0' is no action, as in 0F3, 1I3, 0SEND_F3 or 1RECV_F3"),
        ("0F,0B0\n", "row 0, column 0: '0F' is no action, as in 0F3, 1I3, 0SEND_F3 or 1RECV_F3"),
        ("0F0,0B0,1F0,1B0\n2F0,2B0\n", "csv has 3 stages on 2 ranks: every rank runs the same number of them"),
        ("", "csv has 0 stages on 0 ranks: every rank runs the same number of them"),
        (
            "0F0,1F0,1B0\n1F0,0B0\n",
            "schedule 'csv': 1F0 on pipeline rank 1 is of a stage that pipeline rank 0 runs too",
        ),
        ("0F0,0B0\n2F0,2B0\n", "csv has 3 stages on 2 ranks: every rank runs the same number of them"),
        ("0F0,0B0\n3F0,3B0\n", "schedule 'csv' runs the stages 0, 3, the pipeline has 4, from 0 on"),
        ("0F0,0UNSHARD,0B0\n", "csv, row 0: 0F0 is run while the parameters of stage 0 are not gathered"),
        ("0UNSHARD,0F0,0RESHARD,0B0\n", "csv, row 0: 0B0 is run while the parameters of stage 0 are not gathered"),
        ("0F0,0REDUCE_GRAD,0B0\n", "csv, row 0: 0B0 comes after the gradients of stage 0 were reduced"),
        ("0RECV_F0,0F0,0B0\n", "csv: F0 receives from -1, a negative number"),
        (
            "0F0,0B0,0SEND_F0\n",
            "the schedule is wrong: [F0]>s1 on pipeline rank 0 talks to stage 1, but the last one is 0",
        ),
        ("0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD\n", "csv, row 0: 0REDUCE_GRAD comes a second time"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    assert refused(text) == message


def test_the_format_cannot_say_skips() -> None:
    step = schedule("1f1b", Pipeline.of(num_ranks=3, num_microbatches=2, edges=[*chain(3), (0, 2)]))
    assert write(step).startswith("0F0,0F1,0B0,0B1\n")
    with pytest.raises(PlanError) as error:
        write(step, messages=True)
    assert str(error.value) == (
        "F0 of stage 0 sends to stage 2: torch's format knows messages between neighbouring stages alone"
    )
    again = read(write(step), edges=[*chain(3), (0, 2)])
    assert again.rows == step.rows


def test_a_pair_to_overlap_is_one_after_the_other() -> None:
    assert [str(c) for c in read("0F0,(0F1;0B0)OVERLAP_F_B,,0B1\n").orders[0]] == ["0F0", "0F1", "0B0", "0B1"]


def test_stages_may_lie_on_other_ranks_than_of_their_number() -> None:
    step = read("1F0,1B0\n0F0,0B0\n")
    assert step.placement == (1, 0)
    text = write(step, messages=True)
    assert text == "1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n"
    assert read(text).rows == step.rows
