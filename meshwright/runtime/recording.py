"""What ranks did and when, as the executors have seen it: the real counterpart of a simulated step."""

import time
from collections.abc import Callable, Sequence

import torch

from meshwright.runtime.actions import KINDS
from meshwright.runtime.executor import Timed
from meshwright.runtime.traces import Level, Slice


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that shows what the device has computed; on CUDA it waits for that."""

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized if device.type == "cuda" else time.perf_counter


def slices(rank: int, timed: Sequence[Timed], origin: float) -> list[Slice]:
    """The computations of a rank, and before them the waits for what other ranks had to send; times from ``origin``."""
    found = []
    for action, asked, begin, end in timed:
        if begin > asked:
            found.append(Slice(rank, asked - origin, begin - origin, f"wait for {action.name}", "waiting"))
        found.append(Slice(rank, begin - origin, end - origin, action.name, KINDS[action.kind]))
    return found


def levels(rank: int, timed: Sequence[Timed], origin: float) -> list[Level]:
    """How many chunks of microbatches are alive on a rank."""
    found, alive = [], 0
    for action, _, begin, end in timed:
        if action.kind in "FBW":
            alive += 1 if action.kind == "F" else -1
            found.append(Level(rank, (begin if action.kind == "F" else end) - origin, "chunks alive", alive))
    return found
