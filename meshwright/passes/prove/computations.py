"""Each computation once, where its stage is, in an order that its own rank can run and remember."""

import collections
import itertools
from collections.abc import Iterator, Sequence

from meshwright.passes.prove.case import Case
from meshwright.runtime.actions import Action, Kind, render

PARTS: tuple[Kind, Kind] = ("I", "W")
"""What a backward in two parts consists of."""


def placed(case: Case) -> Iterator[str]:
    """Every stage is on a rank, every action on the rank of its stage; edges and peers are others of the stages."""
    stages = range(len(case.placement))
    for stage, rank in enumerate(case.placement):
        if rank not in range(len(case.rows)):
            yield f"stage {stage} is on pipeline rank {rank}, and there are {len(case.rows)}"
    for edge in case.edges:
        if edge[0] not in stages or edge[1] not in stages or edge[0] == edge[1]:
            yield f"the edge {edge} does not join two of the {len(stages)} stages"
    for rank, action, _ in case.actions():
        own = case.stages_of[rank]
        if action.stage is None and len(own) != 1:
            names = ", ".join(map(str, own)) or "none"
            yield f"{case.at(rank, action)} does not say its stage, and the rank runs {names}"
        elif action.stage is not None and action.stage not in stages:
            yield f"{case.at(rank, action)} is of stage {action.stage}, but the last one is {stages[-1]}"
        elif action.stage is not None and case.placement[action.stage] != rank:
            yield f"{case.at(rank, action)} is of a stage on pipeline rank {case.placement[action.stage]}"
        for peer in (*action.receives, *action.sends):
            if peer not in stages:
                yield f"{case.at(rank, action)} talks to stage {peer}, but the last one is {stages[-1]}"
            elif case.placement[peer] == rank:
                yield f"{case.at(rank, action)} talks to its own rank"


def coverage(case: Case) -> Iterator[str]:
    """Every stage runs one forward of every microbatch, one backward or both of its parts, and nothing else; no
    backward where the step is of forwards alone.
    """
    if case.num_microbatches < 1:
        yield f"a step has {case.num_microbatches} microbatches, less than one"
    count = collections.Counter(
        (action.kind, case.stage(rank, action), action.microbatch) for rank, action, _ in case.actions() if action.runs
    )
    for rank, action, _ in case.actions():
        if action.microbatch >= case.num_microbatches:
            yield f"{case.at(rank, action)} is of a microbatch beyond the last, {case.num_microbatches - 1}"
        if action.kind != "F" and case.forward_only:
            yield f"{case.at(rank, action)} is a backward, in a step of forwards alone"
        stage = case.stage(rank, action)
        if action.runs and count[action.kind, stage, action.microbatch] > 1:
            yield f"{case.at(rank, action)} is not the only {case.name(action.kind, stage, action.microbatch)} there"
        if action.runs and action.kind == "B":
            for part in PARTS:
                if count[part, stage, action.microbatch]:
                    name = case.name(part, stage, action.microbatch)
                    yield f"{case.at(rank, action)} is a whole backward, and {name} is there too"
    for stage, rank in enumerate(case.placement):
        for microbatch in range(case.num_microbatches):
            whole, inputs, weights = (count[kind, stage, microbatch] for kind in ("B", "I", "W"))
            if not count["F", stage, microbatch]:
                yield f"pipeline rank {rank} never runs {case.name('F', stage, microbatch)}"
            if not (whole or inputs or weights or case.forward_only):
                yield f"pipeline rank {rank} never runs {case.name('B', stage, microbatch)}"
            for here, missing in (PARTS, PARTS[::-1]):
                if count[here, stage, microbatch] and not count[missing, stage, microbatch]:
                    names = (case.name(kind, stage, microbatch) for kind in (here, missing))
                    yield f"pipeline rank {rank} runs {' but never '.join(names)}"


def local_order(case: Case) -> Iterator[str]:
    """On its rank an action follows what it takes from there. Forwards ascend, because they may write to buffers;
    backwards too, so that sums of gradients compare bit for bit.
    """
    forward = {edge[:2] for edge in case.edges}
    backward = {(edge[1], edge[0]) for edge in case.edges if edge[2:] != (False,)}
    for rank, row in enumerate(case.rows):
        own = case.stages_of[rank]
        done: set[tuple[str, int, int]] = set()
        latest: dict[int, Action] = {}
        newest: dict[int, Action] = {}
        for action in row:
            if not action.runs:
                continue
            stage, microbatch = case.stage(rank, action), action.microbatch
            if action.kind in "BI" and ("F", stage, microbatch) not in done:
                yield f"{case.at(rank, action)} is before the forward {case.name('F', stage, microbatch)}"
            if action.kind == "W" and ("B", stage, microbatch) not in done:
                yield f"{case.at(rank, action)} is before {case.name('I', stage, microbatch)}, its other part"
            made = "F" if action.kind == "F" else "B"
            if made == "F":
                before = newest.get(stage)
                if before is not None and before.microbatch > microbatch:
                    yield f"{case.at(rank, action)} is after the forward {render([before], 'stage')} of a later one"
                newest[stage] = action
            for source in own if action.kind != "W" else ():
                if (source, stage) in (forward if made == "F" else backward) and (made, source, microbatch) not in done:
                    name = f"{source}{made}{microbatch}"
                    yield f"{case.at(rank, action)} is before {name} on the same rank, whose result it takes"
            if action.kind != "W":
                done.add((made, stage, microbatch))
            if action.kind in "BW":
                before = latest.get(stage)
                if case.ascending and before is not None and before.microbatch > microbatch:
                    yield f"{case.at(rank, action)} adds its gradients after those of {render([before], 'stage')}"
                latest[stage] = action


def memory(case: Case) -> Iterator[str]:
    """No rank keeps more chunks alive than the schedule declares."""
    for rank, (row, bound) in enumerate(zip(case.rows, case.peaks, strict=True) if case.peaks is not None else ()):
        if peak(row) > bound:
            what = "microbatches" if len(case.stages_of[rank]) == 1 else "microbatches' chunks"
            yield f"pipeline rank {rank} keeps {peak(row)} {what} alive at once, more than the {bound} declared"


def peak(row: Sequence[Action]) -> int:
    """Chunks alive at once: forwards whose backward, or the part of it for the weights, has not been run."""
    change = {"F": 1, "B": -1, "I": 0, "W": -1}
    return max(itertools.accumulate(change[action.kind] for action in row if action.runs), default=0)
