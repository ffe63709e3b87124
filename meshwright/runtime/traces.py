"""Traces that Perfetto and chrome://tracing show: what every rank did and when, of a real step or a simulated one."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

MICROSECONDS = 1e6


class Slice(NamedTuple):
    """Something that a rank does for a while; times in seconds. Slices of one category have one colour."""

    rank: int
    begin: float
    end: float
    name: str
    category: str


class Level(NamedTuple):
    """A quantity of a rank, from a time on."""

    rank: int
    time: float
    name: str
    value: float


class Arrow(NamedTuple):
    """Something that goes from one slice to another."""

    source: Slice
    destination: Slice
    name: str


def chrome_trace(slices: Iterable[Slice], levels: Iterable[Level] = (), arrows: Iterable[Arrow] = ()) -> str:
    """The trace as JSON in Chrome's trace event format: one process with a track for every rank, beside it one for each
    of its levels.

    A real and a simulated trace lie side by side if both are opened.
    """
    shown = sorted(slices)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({one.rank for one in shown})
    ]
    for rank, begin, end, name, category in shown:
        times = {"ts": begin * MICROSECONDS, "dur": (end - begin) * MICROSECONDS}
        events.append({"ph": "X", "name": name, "cat": category, "pid": 0, "tid": rank, **times})
    for rank, time, name, value in levels:
        where = {"pid": 0, "tid": rank, "ts": time * MICROSECONDS}
        events.append({"ph": "C", "name": f"rank {rank} {name}", **where, "args": {name: value}})
    for number, (source, destination, name) in enumerate(arrows):
        for phase, one in (("s", source), ("f", destination)):
            middle = (one.begin + one.end) / 2 * MICROSECONDS
            place = {"pid": 0, "tid": one.rank, "ts": middle, "bp": "e"}
            events.append({"ph": phase, "id": number, "name": name, "cat": "message", **place})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
