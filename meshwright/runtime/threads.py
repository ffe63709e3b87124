"""Ranks as threads of one process that take turns."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from meshwright.runtime.errors import RankError
from meshwright.runtime.meetings import Circle, ThreadGroup
from meshwright.runtime.turns import Turns


@dataclass(slots=True)
class Threads:
    """A ``Wire`` between threads. circles: the groups of all ranks."""

    turns: Turns
    circles: dict[tuple[str, tuple[int, ...]], Circle]
    rank: int
    kind: str = "ranks"

    @property
    def num_ranks(self) -> int:
        return self.turns.num_ranks

    @property
    def world(self) -> ThreadGroup:
        return self._group(tuple(range(self.num_ranks)), "all axes")

    def launch(self, num_ranks: int) -> str:
        return f"run_in_one_process(function, num_ranks={num_ranks})"

    def join(self, device: torch.device) -> None:
        """They are here."""

    def group(self, ranks: Sequence[int], name: str) -> ThreadGroup | None:
        return self._group(tuple(ranks), name) if len(ranks) > 1 else None

    def _group(self, ranks: tuple[int, ...], name: str) -> ThreadGroup:
        return ThreadGroup(self.turns, self.circles.setdefault((name, ranks), Circle(name, ranks)), self.rank)

    def watch(self) -> "Threads | None":
        return self if self.num_ranks > 1 else None

    def report(self, reason: str) -> None:
        self.turns.fail(self.rank, sys.exception() or RankError(reason))

    def stop(self) -> None:
        """Nothing runs beside the ranks."""

    def save(self, state: Mapping[str, torch.Tensor], path: str) -> None:
        states = self.world.gather_objects(state)
        if self.rank == 0:
            merged = {key: tensor for one in reversed(states) for key, tensor in one.items()}
            with _without_processes():
                state_dict_saver.save(merged, checkpoint_id=path, no_dist=True)
        self.world.gather_objects(None)  # nobody goes on before it is written

    def load(self, state: dict[str, torch.Tensor], path: str) -> None:
        with _without_processes():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=True)


@contextmanager
def _without_processes() -> Iterator[None]:
    """Torch warns that it takes this for a program of one rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


HERE: ContextVar[Threads | None] = ContextVar("meshwright_threads", default=None)
"""The rank that the thread is."""
