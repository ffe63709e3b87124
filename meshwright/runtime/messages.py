"""What travels between stages: the manifest's edges as tables, so that a step only looks them up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.runtime.actions import Kind
from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups, along
from meshwright.runtime.layout import local_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A value on its way between stages, as the manifest has it. requires_grad: its gradient comes back."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    types: Mapping[str, str]
    requires_grad: bool


Shapes = Mapping[str, tuple[int, ...]]
"""Local shapes of a step's values by name."""


@dataclass(slots=True, kw_only=True)
class Messages:
    """The values between stage ``index`` and others, in the order in which both ends name them.

    outgoing, incoming: (kind, rank of the peer) -> edges. sent, received: the names in the order of the stage file.
    """

    manifest: Mapping[str, Any]
    index: int
    groups: Groups
    sent: tuple[str, ...] = field(init=False)
    received: Mapping[str, Edge] = field(init=False)
    edges: Mapping[str, Edge] = field(init=False)
    outgoing: dict[tuple[Kind, int], tuple[Edge, ...]] = field(default_factory=dict)
    incoming: dict[tuple[Kind, int], tuple[Edge, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stages = self.manifest["stages"]
        here = stages[self.index]
        ranks = along(self.groups.sizes, self.groups.rank, "pp") if "pp" in self.groups.sizes else (self.groups.rank,)
        self.sent = tuple(here["sends"])
        self.received = {name: _edge(name, entry) for name, entry in here["receives"].items()}
        self.edges = {**{name: _edge(name, entry) for name, entry in here["sends"].items()}, **self.received}
        for peer, stage in enumerate(stages):
            down = tuple(self.edges[name] for name, entry in here["sends"].items() if peer in entry["to"])
            up = tuple(
                self.received[name]
                for name, entry in stage["sends"].items()
                if self.index in entry["to"] and here["receives"][name]["from"] == peer
            )
            rank = ranks[peer]
            self.outgoing["F", rank], self.incoming["F", rank] = down, up
            self.incoming["B", rank] = tuple(edge for edge in down if edge.requires_grad)
            self.outgoing["B", rank] = tuple(edge for edge in up if edge.requires_grad)

    def shapes(self, symbols: Mapping[str, int]) -> Shapes:
        """The local shapes of all values of this stage's edges. Raises BundleError for sizes that do not divide."""
        sizes = {**self.groups.sizes, "mb": self.groups.microbatches}
        at = self.groups.coordinates
        return {name: local_shape(edge.shape, edge.types, symbols, sizes, at) for name, edge in self.edges.items()}

    def check(self, values: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
        """Raises BundleError for a value that is not what its receivers make room for."""
        for name, value in values.items():
            edge = self.edges[name]
            if tuple(value.shape) != shapes[name] or value.dtype != edge.dtype:
                raise BundleError(
                    f"stage {self.index} sends {name} as {tuple(value.shape)} {value.dtype}, "
                    f"the manifest says {shapes[name]} {edge.dtype}"
                )


def _edge(name: str, entry: Mapping[str, Any]) -> Edge:
    return Edge(
        name=name,
        shape=tuple(entry["shape"]),
        dtype=getattr(torch, entry["dtype"]),
        types=entry["types"],
        requires_grad=entry.get("requires_grad", True),
    )
