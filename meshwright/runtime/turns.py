"""Ranks as threads of one process that take turns: one runs until it waits, then the lowest that can go on.

So what they do is the same in every run, a debugger has the terminal for itself, and where every rank waits there is
nobody left to wait for, which is found at once.
"""

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from meshwright.runtime.errors import RankError

Restore = tuple[Callable[[Any], Any], Any]
"""What sets the state of a random generator, and the state."""

HIDDEN = (str(Path(__file__).parent), str(Path(torch.__file__).parent), threading.__file__)
"""Files that nobody wants to be pointed to."""


class Ended(BaseException):
    """Ends a rank because another one failed. No Exception: a script's ``except`` must not keep it alive."""


class Turns:
    """The turns of ``num_ranks`` ranks. failure: the first rank that failed, and what it raised.

    at_turn: called on a rank whenever its turn begins. state: of the random generators at the start.
    """

    def __init__(self, num_ranks: int, at_turn: Callable[[int], None]):
        self.num_ranks, self.at_turn = num_ranks, at_turn
        self.failure: tuple[int, BaseException] | None = None
        self.state = random_state()
        self.turns = [threading.Semaphore(0) for _ in range(num_ranks)]
        self.running = set(range(num_ranks))
        self.waiting: dict[int, tuple[Callable[[], bool], Callable[[], str]]] = {}
        self.deadlock: str | None = None

    def run(self, rank: int, function: Callable[[], None]) -> None:
        """The life of a rank's thread: wait for the first turn, call ``function``, hand on."""
        self._take(rank, self.state)
        try:
            self.check()
            function()
        except Ended:
            pass
        except BaseException as error:
            if self.failure is None or self.failure[0] == rank:
                self.failure = rank, error
        finally:
            self.running.discard(rank)
            self.hand_on()

    def wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let others go on until ``ready()``. Raises RankError where nobody can, with what every rank waits for."""
        self.check()
        if ready():
            return
        self.waiting[rank] = ready, what
        state = random_state()
        self.hand_on()
        self._take(rank, state)
        del self.waiting[rank]
        self.check()
        if self.deadlock is not None:
            text, self.deadlock = self.deadlock, None
            raise RankError(text)

    def _take(self, rank: int, state: list[Restore]) -> None:
        """Wait for the turn of ``rank``, whose random generators are in ``state``."""
        self.turns[rank].acquire()
        restore(state)
        self.at_turn(rank)

    def check(self) -> None:
        """Raises Ended where a rank has failed."""
        if self.failure is not None:
            sys.settrace(None)  # nobody wants to step through the end
            raise Ended

    def fail(self, rank: int, error: BaseException) -> None:
        """A rank fails: the others end when it is their turn. Raises Ended where one did so before."""
        self.check()
        self.failure = rank, error

    def hand_on(self) -> None:
        """It is the turn of the lowest rank that can go on."""
        if not self.running:
            return
        ready = (rank for rank in sorted(self.running) if self._can_go_on(rank))
        following = next(ready, None)
        if following is None:
            following = min(self.running)
            self.deadlock = self._described()
        self.turns[following].release()

    def _can_go_on(self, rank: int) -> bool:
        return self.failure is not None or rank not in self.waiting or self.waiting[rank][0]()

    def _described(self) -> str:
        lines = [
            f"  rank {rank} {self.waiting[rank][1]() if rank in self.running else 'has ended'}"
            for rank in range(self.num_ranks)
        ]
        return "\n".join(["deadlock: no rank can go on", *lines])


def random_state() -> list[Restore]:
    """The generators that a process has one of: torch's, Python's and, where it is loaded, NumPy's."""
    state: list[Restore] = [
        (torch.default_generator.set_state, torch.default_generator.get_state()),
        (random.setstate, random.getstate()),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        state.append((numpy.random.set_state, numpy.random.get_state()))
    if torch.cuda.is_initialized():
        state.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
    return state


def restore(state: list[Restore]) -> None:
    """Generators go on as they were."""
    for setter, value in state:
        setter(value)


def place() -> str:
    """Where the calling rank is in files of the user, such as `` at stage_0.py:41``; empty where in none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(HIDDEN):
        frame = frame.f_back
    return "" if frame is None else f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
