"""Schedules in the format of torch.distributed.pipelining: CSV, one row per rank, one action per cell.

``0F0`` is the forward of stage 0, microbatch 0; B, I and W are as in ``meshwright.runtime.actions``. A file of
computations alone may have empty cells, which mean nothing here: a rank goes on when it can. One with communication
has ``0SEND_F3`` and ``1RECV_F3`` (the result of 0F3 on its way to stage 1), ``1SEND_B3`` and ``0RECV_B3`` (a gradient
back), and may have ``1UNSHARD``, ``1RESHARD`` and ``1REDUCE_GRAD``. ``(0F3;3B1)OVERLAP_F_B`` is a pair, read as one
after the other.
"""

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from meshwright.compiler.errors import PlanError
from meshwright.passes.schedules import Compute, Costs, Edge, Pipeline, Row, Schedule, of_orders
from meshwright.runtime.actions import KINDS, Action, Kind

CELL = re.compile("([0-9]+)(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD|[FBIW])([0-9]*)")
PAIR = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B")
WITHOUT_MICROBATCH = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
NEXT = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}
"""Where the other end of a message is: the stages of this format talk to their neighbours alone."""


class Cell(NamedTuple):
    """One action as the file has it."""

    stage: int
    what: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.what}{'' if self.what in WITHOUT_MICROBATCH else self.microbatch}"


def write(step: Schedule, *, messages: bool = False) -> str:
    """The CSV of a schedule: its computations alone, or with sends and receives where they are.

    With messages a stage's last backward is followed by REDUCE_GRAD: torch's runtime divides gradients by the number of
    microbatches there and nowhere else.
    Raises PlanError for messages between stages that are no neighbours, which the format cannot say.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    stages = [order[0].stage for order in step.orders]
    writer.writerows(map(_with_messages, step.rows, stages) if messages else step.orders)
    return file.getvalue()


def read(
    text: str, *, edges: Collection[Edge] | None = None, costs: Costs | None = None, name: str = "csv"
) -> Schedule:
    """The schedule of a CSV of either kind. Ranks, stages and microbatches are those that the file names.

    edges, costs: see ``Pipeline``; by default the stages are a chain. Where the file has sends or receives, they stand
    where it has them; else they are added. Raises PlanError for what cannot be read, with row and column, for stages
    that are not the same number on every rank, and for parameters used before they are gathered or reduced too early;
    whether the schedule is right is for the proof to say.
    """
    rows = [
        [cell for at, word in enumerate(words) for cell in _parse(word.strip(), rank, at)]
        for rank, words in enumerate(csv.reader(io.StringIO(text)))
    ]
    computed = [cell for row in rows for cell in row if cell.what in KINDS]
    num_stages = max((cell.stage for cell in computed), default=-1) + 1
    if not num_stages or num_stages % len(rows):
        raise PlanError(f"{name} has {num_stages} stages on {len(rows)} ranks: every rank runs the same number of them")
    pipeline = Pipeline.of(
        num_ranks=len(rows),
        num_chunks=num_stages // len(rows),
        num_microbatches=max(cell.microbatch for cell in computed) + 1,
        edges=edges,
        costs=costs,
    )
    orders = [[Compute(cast(Kind, c.what), c.stage, c.microbatch) for c in row if c.what in KINDS] for row in rows]
    for rank, row in enumerate(rows):
        for reason in _parameters(row):
            raise PlanError(f"{name}, row {rank}: {reason}")
    step = of_orders(name, pipeline, orders)
    if any(cell.what in NEXT for row in rows for cell in row):
        try:
            step = replace(step, rows=tuple(_actions(row, pipeline) for row in rows))
        except ValueError as reason:
            raise PlanError(f"{name}: {reason}") from None
    return step


def _parse(word: str, rank: int, at: int) -> Iterator[Cell]:
    pair = PAIR.fullmatch(word)
    for part in pair.groups() if pair else (word,) if word else ():
        found = CELL.fullmatch(part.strip())
        if found is None or bool(found[3]) == (found[2] in WITHOUT_MICROBATCH):
            raise PlanError(f"row {rank}, column {at}: {word!r} is no action, as in 0F3, 1I3, 0SEND_F3 or 1RECV_F3")
        yield Cell(int(found[1]), found[2], int(found[3] or 0))


def _with_messages(row: Row, only: int) -> Iterator[str]:
    """The cells of a row; ``only`` is the stage of actions that do not name theirs."""
    last = {action.stage: index for index, action in enumerate(row) if action.kind in "BW" and action.runs}
    for index, action in enumerate(row):
        stage = only if action.stage is None else action.stage
        way = "F" if action.kind == "F" else "B"
        yield from (_message(action, stage, f"RECV_{way}", peer) for peer in action.receives)
        if action.runs:
            yield f"{stage}{action.kind}{action.microbatch}"
        yield from (_message(action, stage, f"SEND_{way}", peer) for peer in action.sends)
        if last.get(action.stage) == index:
            yield f"{stage}REDUCE_GRAD"


def _message(action: Action, stage: int, what: str, peer: int) -> str:
    if peer - stage != NEXT[what]:
        verb = "sends to" if what.startswith("SEND") else "receives from"
        raise PlanError(
            f"{action.name} of stage {stage} {verb} stage {peer}: torch's format knows messages between neighbouring "
            "stages alone"
        )
    return f"{stage}{what}{action.microbatch}"


def _actions(row: Sequence[Cell], pipeline: Pipeline) -> Row:
    """The actions of a row; a message is part of its computation where it stands right beside it."""
    whole = {(cell.stage, cell.microbatch) for cell in row if cell.what == "B"}
    found: list[Action] = []
    for cell in row:
        if cell.what in WITHOUT_MICROBATCH:
            continue
        backward: Kind = "B" if (cell.stage, cell.microbatch) in whole else "I"
        kind = cast(Kind, cell.what) if cell.what in KINDS else "F" if cell.what.endswith("F") else backward
        peers = (cell.stage + NEXT[cell.what],) if cell.what in NEXT else ()
        action = Action(
            kind=kind,
            microbatch=cell.microbatch,
            stage=cell.stage if pipeline.num_chunks > 1 else None,
            receives=peers if cell.what.startswith("RECV") else (),
            sends=peers if cell.what.startswith("SEND") else (),
            runs=cell.what in KINDS,
        )
        before = found[-1] if found and found[-1].name == action.name else None
        if before is not None and not before.sends and action.runs != before.runs and (action.runs or action.sends):
            action = replace(found.pop(), runs=True, sends=action.sends)
        found.append(action)
    return tuple(found)


def _parameters(row: Sequence[Cell]) -> Iterator[str]:
    """What is wrong with gathering and releasing parameters and reducing gradients, where the file says it at all."""
    said = {cell.stage for cell in row if cell.what == "UNSHARD"}
    gathered: set[int] = set()
    reduced: set[int] = set()
    for cell in row:
        if cell.what == "UNSHARD":
            gathered.add(cell.stage)
        elif cell.what == "RESHARD":
            gathered.discard(cell.stage)
        elif cell.what == "REDUCE_GRAD":
            if cell.stage in reduced:
                yield f"{cell} comes a second time"
            reduced.add(cell.stage)
        elif cell.what in KINDS and cell.stage in said - gathered:
            yield f"{cell} is run while the parameters of stage {cell.stage} are not gathered"
        elif cell.what in ("B", "W") and cell.stage in reduced:
            yield f"{cell} comes after the gradients of stage {cell.stage} were reduced"
