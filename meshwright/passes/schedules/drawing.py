"""A simulated step as an SVG picture: a lane for every rank, below it what is alive there."""

import html
import itertools
import math
from collections.abc import Iterator, Mapping

from meshwright.passes.schedules.simulate import Simulation
from meshwright.passes.schedules.timeline import amount, chunk_of, figures, labels
from meshwright.runtime.actions import KINDS, Kind

COLOURS: Mapping[Kind, tuple[str, str]] = {
    "F": ("#4c86c6", "#a9c8ea"),
    "B": ("#4a9d6e", "#a8d8be"),
    "I": ("#d08c3f", "#efcb9c"),
    "W": ("#8a6bb8", "#cdbbe6"),
}
"""Of the first and the last chunk of a rank; those between are mixed."""

LEFT, TOP, RIGHT = 64, 64, 16
LANE, STRIP, GAP = 24, 14, 10
LETTER = 6.9
"""About the width of a letter."""

WIDTHS = 1200, 6000
"""Of a picture, in pixels: as wide as the names of its shortest computations need, within these."""


def svg(step: Simulation, title: str) -> str:
    """The picture; computations have their names where there is room, and times when they are pointed at."""
    spans = zip(itertools.chain.from_iterable(step.ranks), itertools.chain.from_iterable(labels(step)), strict=True)
    needed = max((_room(name) / (span.end - span.begin) for span, name in spans if span.end > span.begin), default=0.0)
    width = math.ceil(min(max(LEFT + RIGHT + needed * step.makespan, WIDTHS[0]), WIDTHS[1]))
    height = TOP + len(step.ranks) * (LANE + STRIP + GAP) + 24
    scale = (width - LEFT - RIGHT) / (step.makespan or 1.0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{LEFT}" y="38" fill="#555555">{html.escape(figures(step))}</text>',
        *_legend(step, width),
        *(line for rank in range(len(step.ranks)) for line in _lane(step, rank, scale)),
        *_axis(step, scale),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _legend(step: Simulation, width: int) -> Iterator[str]:
    used = {span.compute.kind for spans in step.ranks for span in spans}
    x = float(width - RIGHT)
    for kind in reversed([kind for kind in KINDS if kind in used]):
        x -= LETTER * len(KINDS[kind]) + 24
        yield f'<rect x="{x:.1f}" y="12" width="10" height="10" fill="{COLOURS[kind][0]}"/>'
        yield f'<text x="{x + 14:.1f}" y="21">{KINDS[kind]}</text>'


def _lane(step: Simulation, rank: int, scale: float) -> Iterator[str]:
    spans, names = step.ranks[rank], labels(step)[rank]
    top = TOP + rank * (LANE + STRIP + GAP)
    right = LEFT + step.makespan * scale
    yield f'<text x="{LEFT - 8}" y="{top + LANE / 2 + 4:.1f}" text-anchor="end">rank {rank}</text>'
    yield f'<rect x="{LEFT}" y="{top}" width="{right - LEFT:.2f}" height="{LANE}" fill="#f0f0f0"/>'
    chunks = chunk_of(spans)
    for span, name in zip(spans, names, strict=True):
        x, length = LEFT + (span.begin - step.begin) * scale, (span.end - span.begin) * scale
        fill = _mixed(COLOURS[span.compute.kind], chunks[span.compute.stage] / max(1, len(chunks) - 1))
        yield (
            f'<rect x="{x:.2f}" y="{top}" width="{length:.2f}" height="{LANE}" fill="{fill}" stroke="#ffffff" '
            f'stroke-width="0.5"><title>{name}: {span.begin:g} to {span.end:g}</title></rect>'
        )
        if round(length) >= round(_room(name)):
            middle = f'x="{x + length / 2:.2f}" y="{top + LANE / 2 + 4:.1f}"'
            yield f'<text {middle} text-anchor="middle" pointer-events="none">{name}</text>'
    yield from _strip(step, rank, scale, top + LANE + STRIP)


def _strip(step: Simulation, rank: int, scale: float, base: float) -> Iterator[str]:
    """The activations alive, as a surface as high as the strip where any rank keeps the most."""
    most = max(step.peaks) or 1.0
    points, before = [f"{LEFT},{base:.2f}"], base
    for time, _, size in step.alive(rank):
        x, y = LEFT + (time - step.begin) * scale, base - size / most * STRIP
        points += [f"{x:.2f},{before:.2f}", f"{x:.2f},{y:.2f}"]
        before = y
    points.append(f"{LEFT + step.makespan * scale:.2f},{before:.2f}")
    points.append(f"{LEFT + step.makespan * scale:.2f},{base:.2f}")
    yield f'<polygon points="{" ".join(points)}" fill="#c8c8c8"/>'
    peak = f'y="{base:.1f}" text-anchor="end" font-size="9" fill="#777777">{amount(step.peaks[rank])}'
    yield f'<text x="{LEFT - 8}" {peak}</text>'


def _axis(step: Simulation, scale: float) -> Iterator[str]:
    """Round times, about one in a hundred pixels."""
    about = 100 / scale
    power = 10.0 ** math.floor(math.log10(about))
    unit = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about)
    for number in range(math.floor(step.makespan / unit) + 1):
        x = LEFT + number * unit * scale
        yield f'<line x1="{x:.2f}" y1="{TOP - 6}" x2="{x:.2f}" y2="{TOP - 2}" stroke="#999999"/>'
        yield f'<text x="{x:.2f}" y="{TOP - 9}" text-anchor="middle" fill="#777777">{number * unit:g}</text>'


def _room(name: str) -> float:
    """How long a computation has to be to have its name written on it."""
    return LETTER * len(name) + 4


def _mixed(colours: tuple[str, str], part: float) -> str:
    one, other = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(one, other, strict=True))
