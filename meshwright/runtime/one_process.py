"""All ranks of a program in one process, to step through it with a debugger."""

import bdb
import os
import pdb
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from meshwright.runtime.errors import PlanError, RankError
from meshwright.runtime.meetings import Circle
from meshwright.runtime.threads import HERE, Threads
from meshwright.runtime.turns import Turns, restore

Result = TypeVar("Result")


def run_in_one_process(function: Callable[[int], Result], num_ranks: int) -> list[Result]:
    """Call ``function(rank)`` on every rank, ranks being threads of this process; returns the results by rank.

    A ``Trainer`` inside is the rank's as under torchrun. One rank runs at a time, until it waits for another; then the
    lowest that can go on does. So the same run gives the same bits, ``breakpoint()`` has the terminal for itself (its
    prompt names the rank), and breakpoints of ``python -m pdb`` hold on all ranks. Each rank has random generators of
    its own (torch's, Python's and NumPy's), which begin as they are here and leave those here as they were.

    Raises what the first rank to fail raised, with a note that names the rank; the others end where they wait. Raises
    RankError where all ranks wait for each other, with what each waits for, and where members of a group do not call
    the same collective, with both. Raises PlanError inside another such call.

    >>> def train(rank):
    ...     trainer = Trainer("build/llama", optimizer=torch.optim.AdamW)
    ...     return trainer.step(trainer.shard(batch)).item()
    >>> losses = run_in_one_process(train, num_ranks=8)
    """
    if HERE.get() is not None:
        raise PlanError("run_in_one_process was called on a rank of run_in_one_process")
    debugger = _debugger()
    turns = Turns(num_ranks, lambda rank: _say_rank(debugger, rank))
    circles: dict[tuple[str, tuple[int, ...]], Circle] = {}
    results: dict[int, Result] = {}

    def call(rank: int) -> None:
        HERE.set(Threads(turns, circles, rank))
        if debugger is not None:
            sys.settrace(debugger.trace_dispatch)
        # Where a GPU computes, a backward would run on a thread that all ranks share, and wait there for itself.
        with torch.autograd.set_multithreading_enabled(False):
            results[rank] = function(rank)

    threads = [
        threading.Thread(target=turns.run, args=(rank, partial(call, rank)), name=f"rank {rank}", daemon=True)
        for rank in range(num_ranks)
    ]
    with _prompts_with_ranks(debugger):
        for thread in threads:
            thread.start()
        turns.hand_on()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # the user interrupts: ranks end where they wait next
            turns.failure = 0, error
            raise
    restore(turns.state)
    if turns.failure is not None:
        raise _told(*turns.failure)
    return [results[rank] for rank in range(num_ranks)]


def _told(rank: int, error: BaseException) -> BaseException:
    """The error of a rank as the caller gets it. Who quits the debugger quits, whatever frames that went through."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, bdb.BdbQuit):
            return cause
        cause = cause.__cause__
    if not isinstance(error, RankError):
        error.add_note(f"on rank {rank}")
    return error


def _debugger() -> bdb.Bdb | None:
    """What traces this thread, if it is a debugger in Python that the ranks may share: one of them runs at a time."""
    debugger = getattr(sys.gettrace(), "__self__", None)
    return debugger if isinstance(debugger, bdb.Bdb) else None


def _say_rank(debugger: bdb.Bdb | None, rank: int) -> None:
    if isinstance(debugger, pdb.Pdb):
        debugger.prompt = f"(rank {rank}) "


@contextmanager
def _prompts_with_ranks(debugger: bdb.Bdb | None) -> Iterator[None]:
    """Debuggers say on which rank they are: the one that traces, and ``breakpoint()`` unless the user has another."""
    before, prompt = sys.breakpointhook, getattr(debugger, "prompt", "")
    if before is sys.__breakpointhook__ and "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _breakpoint
    try:
        yield
    finally:
        sys.breakpointhook = before
        if isinstance(debugger, pdb.Pdb):
            debugger.prompt = prompt


def _breakpoint() -> None:
    debugger, here = pdb.Pdb(), HERE.get()
    if here is not None:
        _say_rank(debugger, here.rank)
    debugger.set_trace(sys._getframe(1))
