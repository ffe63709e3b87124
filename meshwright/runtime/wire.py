"""How ranks talk: all that the runtime asks of what it runs on, be it processes or threads.

Every collective is called by all members of its group in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Finish = Callable[[], None]
"""Waits for something that was begun; afterwards its result is there."""

Message = tuple[int, torch.Tensor]
"""(the other rank, a contiguous tensor to send or to receive into)."""


class Group(Protocol):
    """Some ranks of the mesh in ascending order, as one of them sees them."""

    def begin_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Finish:
        """Begin to sum ``flat`` (pieces * n,) over the group and keep piece k of it in ``out`` (n,) on member k.

        ``out`` may be a part of ``flat``. Neither may be touched before the end.
        """

    def begin_all_gather(self, flat: torch.Tensor, piece: torch.Tensor) -> Finish:
        """Begin to put every member's ``piece`` (n,) side by side in ``flat`` (pieces * n,).

        ``piece`` may be a part of ``flat``.
        """

    def begin_all_reduce(self, flat: torch.Tensor) -> Finish:
        """Begin to sum ``flat`` over the group, in place."""

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over the group, contiguous, as a tensor of its own; the same bits on every member."""

    def all_to_all(self, out: torch.Tensor, parts: torch.Tensor) -> None:
        """Part k of ``parts`` (pieces, ...) goes to member k; ``out``, alike, has what comes, in the members' order."""

    def broadcast(self, value: torch.Tensor, source: int) -> None:
        """``value`` becomes what the rank ``source`` of the mesh has."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every member's plain data, which nobody changes, in the members' order."""

    def begin_exchange(
        self, sends: Sequence[Message], receives: Sequence[Message]
    ) -> tuple[list[Finish], list[Finish]]:
        """Begin all messages together; each may be waited for by itself. Two ranks name their messages in one order."""


class Watch(Protocol):
    """When one rank fails the others end."""

    def report(self, reason: str) -> None:
        """Tell the others that this rank fails; does not return where another rank did so before."""

    def stop(self) -> None:
        """Watch no longer."""


class Wire(Protocol):
    """The ranks that were launched together, as one of them sees them.

    kind: what ranks are, for messages. ``rank`` and ``world``, the group of all, are there after ``join``.
    """

    kind: str

    @property
    def num_ranks(self) -> int:
        """How many were launched."""

    @property
    def rank(self) -> int:
        """This one among them."""

    @property
    def world(self) -> Group:
        """All of them."""

    def launch(self, num_ranks: int) -> str:
        """How to launch another number."""

    def join(self, device: torch.device) -> None:
        """Meet the others, with tensors on ``device``."""

    def group(self, ranks: Sequence[int], name: str) -> Group | None:
        """The group of ``ranks``, this one among them; None for one alone. Every rank calls this in the same order."""

    def watch(self) -> Watch | None:
        """From now on other ranks' failures end this one; None for one rank alone."""

    def save(self, state: Mapping[str, torch.Tensor], path: str) -> None:
        """Write all ranks' tensors by key, as torch.distributed.checkpoint does; what several have by one key, once."""

    def load(self, state: dict[str, torch.Tensor], path: str) -> None:
        """Fill the tensors of ``state``, which may have other keys on other ranks. All ranks call this together."""
