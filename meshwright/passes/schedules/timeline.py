"""A simulated step to look at: as text and as a trace; ``drawing.py`` draws it."""

import math

from meshwright.passes.schedules.simulate import Simulation, Span
from meshwright.runtime.actions import KINDS
from meshwright.runtime.traces import Arrow, Level, Slice, chrome_trace

COLUMNS = 60
"""Of a timeline that people read in a terminal."""


def labels(step: Simulation) -> list[list[str]]:
    """What the computations are called: without their stage where every rank has one."""
    single = all(len({span.compute.stage for span in spans}) <= 1 for spans in step.ranks)
    return [
        [f"{span.compute.kind}{span.compute.microbatch}" if single else str(span.compute) for span in spans]
        for spans in step.ranks
    ]


def figures(step: Simulation) -> str:
    """One line: the time of the step, its bubble, and the part of it between a rank's first and last computation."""
    idle = sum(step.idle) / (step.makespan * len(step.ranks)) if step.makespan else 0.0
    return f"makespan {step.makespan:g}, bubble {step.bubble_share:.1%}, idle within ranks {idle:.1%}"


def amount(size: float) -> str:
    """A number of bytes, or of anything else, in three digits from a thousand on: ``5.78M``."""
    for power, name in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if size >= 10**power:
            return f"{size / 10**power:.3g}{name}"
    return f"{size:g}"


def readable(step: Simulation) -> float:
    """The time of a column for which a line of ``text`` has at most ``COLUMNS`` of them."""
    return max(_shortest(step), step.makespan / COLUMNS)


def text(step: Simulation, column: float | None = None) -> str:
    """The step as aligned text, one line a rank: ``-`` goes on with a computation, ``.`` is idle.

    column: the time of a column; None for the shortest computation. Computations shorter than a column may be covered
    by what follows.
    """
    names = labels(step)
    column = _shortest(step) if column is None else column
    width = max((len(name) for row in names for name in row), default=1)
    lines = []
    for rank, (spans, row) in enumerate(zip(step.ranks, names, strict=True)):
        cells = ["." + " " * (width - 1)] * _column(step, step.end, column)
        for span, name in zip(spans, row, strict=True):
            begin, end = _column(step, span.begin, column), _column(step, span.end, column)
            cells[begin:end] = [name.ljust(width), *["-" * width] * (end - begin - 1)][: end - begin]
        lines.append(f"rank {rank:<{len(str(len(names) - 1))}}  {' '.join(cells)}  peak {amount(step.peaks[rank])}")
    return "\n".join([*lines, figures(step)]) + "\n"


def trace(step: Simulation) -> str:
    """The step as a trace for Perfetto, with the activations alive and the messages; times are taken as seconds."""
    names = labels(step)
    slices = {
        span.compute: Slice(rank, span.begin, span.end, name, KINDS[span.compute.kind])
        for rank, (spans, row) in enumerate(zip(step.ranks, names, strict=True))
        for span, name in zip(spans, row, strict=True)
    }
    levels = [
        Level(rank, time, "activations", size) for rank in range(len(names)) for time, _, size in step.alive(rank)
    ]
    arrows = [Arrow(slices[m.source], slices[m.destination], f"{m.source} to {m.destination}") for m in step.messages]
    return chrome_trace(slices.values(), levels, arrows)


def _shortest(step: Simulation) -> float:
    return min((span.end - span.begin for spans in step.ranks for span in spans if span.end > span.begin), default=1.0)


def _column(step: Simulation, time: float, column: float) -> int:
    return math.floor((time - step.begin) / column + 0.5)


def chunk_of(spans: tuple[Span, ...]) -> dict[int, int]:
    """The stages of a rank, numbered in their order."""
    return {stage: chunk for chunk, stage in enumerate(sorted({span.compute.stage for span in spans}))}
