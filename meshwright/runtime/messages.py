"""What travels between stages: the manifest's edges as tables, so that a step only looks them up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from meshwright.runtime.actions import Action, stage_of
from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups, along
from meshwright.runtime.layout import local_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A value on its way from one stage to others, as the manifest has it. requires_grad: its gradient comes back."""

    name: str
    source: int
    destinations: tuple[int, ...]
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    types: Mapping[str, str]
    requires_grad: bool


class Place(NamedTuple):
    """Where values arrive: at a stage, in its forward or backward of a microbatch."""

    stage: int
    forward: bool
    microbatch: int


class Packet(NamedTuple):
    """What goes between a stage of this rank and ``peer``, a stage on ``rank``, for one action: one tensor per edge."""

    own: Place
    peer: int
    rank: int
    edges: tuple[Edge, ...]


Shapes = Mapping[tuple[int, str], tuple[int, ...]]
"""Local shapes of a step's values by source and name."""


@dataclass(slots=True, kw_only=True)
class Links:
    """The edges of the stages of this rank, in the order in which both ends name them.

    placement: the pipeline rank of every stage. sent, received: by stage and name.
    """

    manifest: Mapping[str, Any]
    placement: Sequence[int]
    stages: Sequence[int]
    groups: Groups
    ranks: tuple[int, ...] = field(init=False)
    sent: dict[int, dict[str, Edge]] = field(default_factory=dict)
    received: dict[int, dict[str, Edge]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes, rank = self.groups.sizes, self.groups.rank
        line = along(sizes, rank, "pp") if "pp" in sizes else (rank,)
        self.ranks = tuple(line[place] for place in self.placement)
        entries = self.manifest["stages"]
        for stage in self.stages:
            self.sent[stage] = {name: _edge(name, stage, entry) for name, entry in entries[stage]["sends"].items()}
            self.received[stage] = {
                name: _edge(name, entry["from"], entries[entry["from"]]["sends"][name])
                for name, entry in entries[stage]["receives"].items()
            }

    def packets(self, action: Action | None, peers: Iterable[int], sends: bool) -> tuple[Packet, ...]:
        """What an action sends to, or receives from, these stages. Raises BundleError where no edge leads."""
        if action is None:
            return ()
        stage = stage_of(action, self.stages)
        own = Place(stage, action.kind == "F", action.microbatch)
        packets = []
        for peer in peers:
            edges = self._between(stage, peer, own.forward == sends, own.forward)
            if not edges:
                verb = "sends to" if sends else "receives from"
                raise BundleError(f"the schedule's {action.name} {verb} stage {peer}: no value goes that way")
            packets.append(Packet(own, peer, self.ranks[peer], edges))
        return tuple(packets)

    def here(self, stage: int, forward: bool) -> tuple[tuple[int, Edge], ...]:
        """(stage, edge) for what a stage hands to others on this rank: results forward, gradients backward."""
        if forward:
            return tuple((d, e) for e in self.sent[stage].values() for d in e.destinations if d in self.stages)
        edges = (edge for edge in self.received[stage].values() if edge.requires_grad)
        return tuple((edge.source, edge) for edge in edges if edge.source in self.stages)

    def shapes(self, symbols: Mapping[str, int]) -> Shapes:
        """The local shapes of all values of these stages' edges. Raises BundleError for sizes that do not divide."""
        sizes, at = {**self.groups.sizes, "mb": self.groups.microbatches}, self.groups.coordinates
        edges = (edge for table in (self.sent, self.received) for some in table.values() for edge in some.values())
        return {(e.source, e.name): local_shape(e.shape, e.types, symbols, sizes, at) for e in edges}

    def check(self, stage: int, values: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
        """Raises BundleError for a value that is not what its receivers make room for."""
        for name, value in values.items():
            edge, shape = self.sent[stage][name], shapes[stage, name]
            if tuple(value.shape) != shape or value.dtype != edge.dtype:
                raise BundleError(
                    f"stage {stage} sends {name} as {tuple(value.shape)} {value.dtype}, the manifest says {shape} "
                    f"{edge.dtype}"
                )

    def _between(self, stage: int, peer: int, down: bool, forward: bool) -> tuple[Edge, ...]:
        """The edges from a stage down to a peer, or from the peer; those with gradient, unless it goes forward."""
        if down:
            edges = [edge for edge in self.sent[stage].values() if peer in edge.destinations]
        else:
            order = self.manifest["stages"][peer]["sends"]
            received = self.received[stage]
            edges = [received[name] for name in order if name in received and received[name].source == peer]
        return tuple(edge for edge in edges if forward or edge.requires_grad)


def _edge(name: str, source: int, entry: Mapping[str, Any]) -> Edge:
    return Edge(
        name=name,
        source=source,
        destinations=tuple(entry["to"]),
        shape=tuple(entry["shape"]),
        dtype=getattr(torch, entry["dtype"]),
        types=entry["types"],
        requires_grad=entry.get("requires_grad", True),
    )
