"""Where ranks meet that are threads: collectives and messages are calls that wait for the others."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.runtime.errors import RankError
from meshwright.runtime.turns import Turns, place
from meshwright.runtime.wire import Finish, Message

Complete = Callable[[list[Any]], None]
"""Gives all members their results, from what they brought."""


@dataclass(slots=True)
class Call:
    """A collective: what each member so far brought, what it said that it calls, and where."""

    brought: dict[int, Any] = field(default_factory=dict)
    said: dict[int, tuple[str, str]] = field(default_factory=dict)
    done: bool = False


@dataclass(slots=True)
class Parcel:
    """One end of a message: the tensor to send or to receive into."""

    tensor: torch.Tensor
    place: str
    done: bool = False


@dataclass(slots=True)
class Circle:
    """What the members of a group share. calls: by number; a call that is over is gone, and so is a message."""

    name: str
    ranks: tuple[int, ...]
    counts: dict[int, int] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)
    sends: dict[tuple[int, int], deque[Parcel]] = field(default_factory=dict)
    receives: dict[tuple[int, int], deque[Parcel]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"over {self.name} (ranks {', '.join(map(str, self.ranks))})"


@dataclass(slots=True)
class ThreadGroup:
    """A ``Group`` of threads. The last that comes to a collective computes for all, in the order of the members."""

    turns: Turns
    circle: Circle
    rank: int

    def begin_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Finish:
        def complete(brought: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            total = _sum([flat for _, flat in brought]).view(len(brought), -1)
            for (out, _), piece in zip(brought, total, strict=True):
                _put(out, piece)

        return self._begin(f"reduce_scatter of {_form(flat)}", (out, flat), complete)

    def begin_all_gather(self, flat: torch.Tensor, piece: torch.Tensor) -> Finish:
        def complete(brought: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            whole = torch.cat([piece for _, piece in brought])
            for flat, _ in brought:
                _put(flat, whole)

        return self._begin(f"all_gather of {_form(piece)}", (flat, piece), complete)

    def begin_all_reduce(self, flat: torch.Tensor) -> Finish:
        def complete(brought: list[torch.Tensor]) -> None:
            total = _sum(brought)
            for one in brought:
                _put(one, total)

        return self._begin(f"all_reduce of {_form(flat)}", flat, complete)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        self.begin_all_reduce(x)()
        return x

    def all_to_all(self, out: torch.Tensor, parts: torch.Tensor) -> None:
        def complete(brought: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            for index, (out, _) in enumerate(brought):
                _put(out, torch.stack([parts[index] for _, parts in brought]))

        self._begin(f"all_to_all of {_form(parts)}", (out, parts), complete)()

    def broadcast(self, value: torch.Tensor, source: int) -> None:
        def complete(brought: list[torch.Tensor]) -> None:
            sent = brought[self.circle.ranks.index(source)]
            for one in brought:
                _put(one, sent)

        self._begin(f"broadcast of {_form(value)} from rank {source}", value, complete)()

    def gather_objects(self, value: Any) -> list[Any]:
        found: list[Any] = []

        def complete(brought: list[tuple[list[Any], Any]]) -> None:
            for one, _ in brought:
                one.extend(value for _, value in brought)

        self._begin("gathering of objects", (found, value), complete)()
        return found

    def begin_exchange(
        self, sends: Sequence[Message], receives: Sequence[Message]
    ) -> tuple[list[Finish], list[Finish]]:
        """A message is over when both ends have begun: as on a wire that keeps nothing."""
        self.turns.check()
        return [self._send(*message) for message in sends], [self._receive(*message) for message in receives]

    def _send(self, peer: int, tensor: torch.Tensor) -> Finish:
        parcel, way = Parcel(tensor, place()), (self.rank, peer)
        self._match(way, parcel, self.circle.sends, self.circle.receives)
        return self._finish(parcel, f"waits for rank {peer} to receive {_form(tensor)}")

    def _receive(self, peer: int, tensor: torch.Tensor) -> Finish:
        parcel, way = Parcel(tensor, place()), (peer, self.rank)
        self._match(way, parcel, self.circle.receives, self.circle.sends)
        return self._finish(parcel, f"waits for a message of {_form(tensor)} from rank {peer}")

    def _match(
        self,
        way: tuple[int, int],
        parcel: Parcel,
        ours: dict[tuple[int, int], deque[Parcel]],
        theirs: dict[tuple[int, int], deque[Parcel]],
    ) -> None:
        """Deliver with the oldest other end that is there, else lie down and wait for it."""
        if not theirs.get(way):
            ours.setdefault(way, deque()).append(parcel)
            return
        other = theirs[way].popleft()
        sent, room = (other, parcel) if ours is self.circle.receives else (parcel, other)
        if _form(sent.tensor) != _form(room.tensor):
            raise RankError(
                f"rank {way[0]} sends {_form(sent.tensor)}{sent.place}, "
                f"rank {way[1]} receives {_form(room.tensor)}{room.place}"
            )
        _put(room.tensor, sent.tensor)
        sent.done = room.done = True

    def _finish(self, parcel: Parcel, what: str) -> Finish:
        return lambda: self.turns.wait(self.rank, lambda: parcel.done, lambda: f"{what}{parcel.place}")

    def _begin(self, what: str, brought: Any, complete: Complete) -> Finish:
        """Come to the group's next call. Raises RankError where another member calls something else."""
        self.turns.check()
        circle, number = self.circle, self.circle.counts.get(self.rank, 0)
        circle.counts[self.rank] = number + 1
        call = circle.calls.setdefault(number, Call())
        call.brought[self.rank], call.said[self.rank] = brought, (what, place())
        first = next(iter(call.said))
        if call.said[first][0] != what:
            lines = [f"  rank {rank} calls {''.join(call.said[rank])}" for rank in (first, self.rank)]
            raise RankError("\n".join([f"ranks {first} and {self.rank} do not agree on a collective {circle}", *lines]))
        if len(call.brought) == len(circle.ranks):
            del circle.calls[number]
            with torch.no_grad():
                complete([call.brought[rank] for rank in circle.ranks])
            call.brought.clear()
            call.done = True

        def waited_for() -> str:
            missing = ", ".join(f"rank {rank}" for rank in circle.ranks if rank not in call.said)
            return f"waits for {missing} in {''.join(call.said[self.rank])} {circle}"

        return lambda: self.turns.wait(self.rank, lambda: call.done, waited_for)


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def _put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Fill a tensor as a wire does, behind autograd's back: what was saved of its storage stays valid."""
    target.data.copy_(value)
