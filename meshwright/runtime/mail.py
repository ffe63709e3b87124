"""Messages on their way: room for what arrives, what waits to be sent, what is waited for."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups
from meshwright.runtime.messages import Edge, Links, Packet, Place, Shapes
from meshwright.runtime.wire import Finish, Message


class Arrival(NamedTuple):
    """A value for a stage: the result of an earlier one, or of a later one (``peer``) the gradient of a result."""

    peer: int
    edge: Edge
    value: torch.Tensor
    finish: Finish


class Outgoing(NamedTuple):
    """What a computation leaves to be sent, and how many stages on other ranks still have to get it."""

    values: Mapping[str, torch.Tensor]
    receivers: int


class Room:
    """Tensors to receive into. One is taken again when nothing refers to its storage any more, be it a message under
    way, autograd, or a script: pages that are in use already cost less than fresh ones.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.known: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any content."""
        known = self.known.setdefault((shape, dtype), [])
        free = next((tensor for tensor in known if _num_references(tensor) == 1), None)
        if free is None:
            free = torch.empty(shape, dtype=dtype, device=self.device)
            known.append(free)
        return free.detach()

    def clear(self) -> None:
        """Keep nothing."""
        self.known.clear()


def _num_references(tensor: torch.Tensor) -> int:
    """How many tensors share the storage, this one included."""
    storage = tensor.untyped_storage()  # itself a reference
    return torch._C._storage_Use_Count(storage._cdata) - 1


@dataclass(slots=True, kw_only=True)
class Mail:
    """The messages of one rank in one step. Between its own stages values are handed over without a copy."""

    links: Links
    groups: Groups
    room: Room = field(init=False)
    shapes: Shapes = field(default_factory=dict)
    arrived: dict[Place, list[Arrival]] = field(default_factory=dict)
    outgoing: dict[Place, Outgoing] = field(default_factory=dict)
    sending: deque[list[tuple[Finish, Message]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.room = Room(self.groups.device)

    def begin(self, symbols: Mapping[str, int]) -> None:
        """A step begins, with a batch of these sizes."""
        shapes = self.links.shapes(symbols)
        if shapes != self.shapes:
            self.shapes = shapes
            self.room.clear()
        for kept in (self.arrived, self.outgoing, self.sending):
            kept.clear()

    def exchange(self, sends: Sequence[Packet], receives: Sequence[Packet]) -> None:
        """Start these messages together. What is received is waited for where it is taken."""
        leaving = [message for packet in sends for message in self._leaving(packet)]
        coming = [(packet, edge, self._empty(edge)) for packet in receives for edge in packet.edges]
        messages = [(packet.rank, value) for packet, _, value in coming]
        sent, received = self.groups.group(["pp"]).begin_exchange(leaving, messages)
        for (packet, edge, value), finish in zip(coming, received, strict=True):
            self.arrived.setdefault(packet.own, []).append(Arrival(packet.peer, edge, value, finish))
        if leaving:
            # A schedule is proven as if every exchange waited for its sends. Waiting a little later lets this rank go
            # on, and keeps what is being sent from piling up.
            self.sending.append(list(zip(sent, leaving, strict=True)))
            if len(self.sending) > self.groups.size("pp"):
                self._wait_for_oldest()

    def take(self, place: Place, expected: Iterable[tuple[int, Edge]]) -> list[tuple[Edge, torch.Tensor]]:
        """What has come for a computation, in the order of ``expected``: (the other stage, edge).

        Raises BundleError for what the schedule does not bring.
        """
        found = {(arrival.peer, arrival.edge.name): arrival for arrival in self.arrived.pop(place, ())}
        values = []
        for peer, edge in expected:
            arrival = found.get((peer, edge.name))
            if arrival is None:
                what = edge.name if place.forward else f"the gradient of {edge.name}"
                raise BundleError(f"the schedule does not bring {what} from stage {peer} before")
            arrival.finish()
            values.append((edge, arrival.value))
        return values

    def put(self, place: Place, values: Mapping[str, torch.Tensor], receivers: int) -> None:
        """What a computation has made: handed to stages of this rank, kept for ``receivers`` stages on others."""
        for stage, edge in self.links.here(place.stage, place.forward):
            there = Place(stage, place.forward, place.microbatch)
            value = values[edge.name].detach()
            self.arrived.setdefault(there, []).append(Arrival(place.stage, edge, value, _is_here))
        if receivers:
            self.outgoing[place] = Outgoing(values, receivers)

    def end(self) -> None:
        """A step is over when everything is sent."""
        while self.sending:
            self._wait_for_oldest()

    def _leaving(self, packet: Packet) -> Iterable[Message]:
        values, receivers = self.outgoing.pop(packet.own)
        if receivers > 1:
            self.outgoing[packet.own] = Outgoing(values, receivers - 1)
        return [(packet.rank, values[edge.name].detach().contiguous()) for edge in packet.edges]

    def _empty(self, edge: Edge) -> torch.Tensor:
        return self.room.take(self.shapes[edge.source, edge.name], edge.dtype)

    def _wait_for_oldest(self) -> None:
        for finish, _ in self.sending.popleft():
            finish()


def _is_here() -> None:
    """Nothing to wait for."""
