"""The ranks of a mesh and the groups that they communicate in."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.runtime.errors import PlanError
from meshwright.runtime.processes import BACKENDS, Processes
from meshwright.runtime.threads import HERE
from meshwright.runtime.wire import Group, Wire

Holders = tuple[int, ...] | None
"""The pipeline ranks (indices on "pp") that a group is limited to; None: not limited."""


@dataclass(slots=True)
class Groups:
    """This rank's place in the mesh, and the groups that it communicates in.

    sizes: axis -> size, outermost first, "mb" not among them. microbatches: the size of "mb"; microbatch: which of them
    is computed now. wire: to the other ranks.
    """

    sizes: Mapping[str, int]
    rank: int
    device: torch.device
    microbatches: int
    microbatch: int = 0
    coordinates: Mapping[str, int] = field(init=False)
    wire: Wire = field(default_factory=Processes)
    made: dict[tuple[Any, ...], Group | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinates = coordinates_of(self.sizes, self.rank)

    def size(self, axis: str) -> int:
        """The number of pieces on an axis, "mb" included; 1 for an axis that the mesh does not have."""
        return self.microbatches if axis == "mb" else self.sizes.get(axis, 1)

    def index(self, axis: str) -> int:
        """Which piece on an axis is this rank's (for "mb": is computed now); 0 on one that the mesh does not have."""
        return self.microbatch if axis == "mb" else self.coordinates.get(axis, 0)

    def make(self, axes: Iterable[str], holders: Holders = None) -> None:
        """Create the groups over ``axes``, between ``holders`` only. Every rank calls this in the same order."""
        key = self._key(axes, holders)
        if key is None or key in self.made:
            return
        self.made[key] = self.wire.group(self._members(*key) or [self.rank], ", ".join(key[0]))

    def group(self, axes: Iterable[str], holders: Holders = None) -> Group:
        """The group over ``axes``. Raises KeyError where it has one rank or was never made."""
        key = self._key(axes, holders)
        found = None if key is None else self.made[key]
        if found is None:
            raise KeyError(f"rank {self.rank} is alone there")
        return found

    def find(self, axes: Iterable[str], holders: Holders = None) -> Group | None:
        """The group over ``axes``, or None where it has one rank. Raises KeyError if it was never made."""
        key = self._key(axes, holders)
        return None if key is None else self.made[key]

    def _key(self, axes: Iterable[str], holders: Holders) -> tuple[tuple[str, ...], Holders] | None:
        """The axes that have more than one rank, and the holders if "pp" is among them; None where nothing is left."""
        given = set(axes)
        wide = tuple(axis for axis in self.sizes if axis in given and self.sizes[axis] > 1)
        limited = holders if "pp" in wide else None
        if limited is not None and len(limited) == 1:
            wide, limited = tuple(axis for axis in wide if axis != "pp"), None
        return (wide, limited) if wide else None

    def _members(self, axes: tuple[str, ...], holders: Holders) -> list[int]:
        """The ranks that differ from this one on ``axes`` alone; none where this one is not in ``holders``."""
        if holders is not None and self.index("pp") not in holders:
            return []
        found = [self.coordinates]
        for axis in axes:
            values = holders if axis == "pp" and holders is not None else range(self.sizes[axis])
            found = [{**at, axis: value} for at in found for value in values]
        return sorted(rank_at(self.sizes, at) for at in found)


def num_ranks(sizes: Mapping[str, int]) -> int:
    """The number of ranks of a mesh."""
    count = 1
    for size in sizes.values():
        count *= size
    return count


def coordinates_of(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """Row-major coordinates of a rank."""
    at: dict[str, int] = {}
    for axis, size in reversed(list(sizes.items())):
        rank, at[axis] = divmod(rank, size)
    return {axis: at[axis] for axis in sizes}


def placement_of(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The pipeline rank of every stage of a bundle: the index of its ranks on "pp"."""
    return tuple(coordinates_of(manifest["mesh"], stage["ranks"][0]).get("pp", 0) for stage in manifest["stages"])


def rank_at(sizes: Mapping[str, int], at: Mapping[str, int]) -> int:
    """The rank at the given coordinates."""
    rank = 0
    for axis, size in sizes.items():
        rank = rank * size + at[axis]
    return rank


def along(sizes: Mapping[str, int], rank: int, axis: str) -> tuple[int, ...]:
    """The ranks that differ from ``rank`` on ``axis`` alone, ``rank`` included, in the order of the axis."""
    at = coordinates_of(sizes, rank)
    return tuple(rank_at(sizes, {**at, axis: index}) for index in range(sizes[axis]))


_CURRENT: ContextVar[Groups | None] = ContextVar("meshwright_groups", default=None)


@contextmanager
def using(groups: Groups) -> Iterator[Groups]:
    """Collectives inside this context look their axes up in ``groups``."""
    before = _CURRENT.set(groups)
    try:
        yield groups
    finally:
        _CURRENT.reset(before)


def current() -> Groups:
    """The groups of the program that runs. Raises PlanError outside one."""
    groups = _CURRENT.get()
    if groups is None:
        raise PlanError("a collective of a stage file was called outside a Trainer")
    return groups


def start(sizes: Mapping[str, int], microbatches: int, device: str | torch.device | None) -> Groups:
    """Join the other ranks and place this one in the mesh.

    They are threads inside of ``run_in_one_process``, else the processes of torch's process group, which is started
    from torchrun's environment unless it exists. Raises PlanError for a number of ranks that is not the mesh's, and for
    a device that this process cannot have, before any rank waits on another.
    """
    wire: Wire = HERE.get() or Processes()
    needed = num_ranks(sizes)
    if wire.num_ranks != needed:
        mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items()) or "one rank"
        raise PlanError(
            f"the bundle is for {needed} {wire.kind} ({mesh}) and was launched with {wire.num_ranks}\n"
            f"  {wire.launch(needed)}"
        )
    chosen = _device(device)
    wire.join(chosen)
    return Groups(sizes=sizes, rank=wire.rank, device=chosen, microbatches=microbatches, wire=wire)


def _device(device: str | torch.device | None) -> torch.device:
    """The device of this process: the one asked for, else its CUDA device, else the CPU. Raises PlanError."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in BACKENDS:
        raise PlanError(f"cannot train on the device {chosen}: the devices are {', '.join(BACKENDS)}")
    if chosen.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise PlanError(
                f"this process wants CUDA device {index}, and the machine has {torch.cuda.device_count()}\n"
                "  launch fewer processes per machine, or run on the CPU with --device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    return chosen
