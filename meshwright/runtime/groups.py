"""The ranks of a mesh and their process groups."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meshwright.runtime.errors import PlanError

TIMEOUT = 300.0

# torch 2.13 renames these two; both names do the same.
all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(slots=True)
class Groups:
    """This process's place in the mesh, and the groups that it communicates in.

    sizes: axis -> size, outermost first, "mb" not among them. microbatches: the size of "mb".
    """

    sizes: Mapping[str, int]
    rank: int
    device: torch.device
    microbatches: int
    coordinates: Mapping[str, int] = field(init=False)
    made: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinates = coordinates_of(self.sizes, self.rank)

    def size(self, axis: str) -> int:
        return self.microbatches if axis == "mb" else self.sizes.get(axis, 1)

    def make(self, axes: Iterable[str], stages: Sequence[int] | None = None) -> None:
        """Create the groups over ``axes`` (of the given pipeline stages). Every rank calls this in the same order."""
        key = _key(axes, stages)
        if key in self.made or self._count(key, stages) == 1:
            return
        groups: dict[tuple[int, ...], list[int]] = {}
        count = num_ranks(self.sizes)
        for rank in range(count):
            at = coordinates_of(self.sizes, rank)
            if stages is not None and at.get("pp", 0) not in stages:
                continue
            fixed = tuple(at[a] for a in self.sizes if a not in axes)
            groups.setdefault(fixed, []).append(rank)
        for ranks in groups.values():
            group = dist.new_group(ranks) if len(ranks) < count else dist.group.WORLD
            if self.rank in ranks:
                self.made[key] = group

    def _count(self, key: tuple[str, ...], stages: Sequence[int] | None) -> int:
        count = 1
        for axis in key:
            if axis in self.sizes:
                count *= len(stages) if axis == "pp" and stages is not None else self.sizes[axis]
        return count

    def group(self, axes: Iterable[str], stages: Sequence[int] | None = None) -> Any:
        """The process group over ``axes``, or None where it has one rank."""
        return self.made.get(_key(axes, stages))


def _key(axes: Iterable[str], stages: Sequence[int] | None) -> tuple[str, ...]:
    return (*sorted(axes), *(() if stages is None else (f"stages {','.join(map(str, stages))}",)))


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


def rank_at(sizes: Mapping[str, int], at: Mapping[str, int]) -> int:
    """The rank at the given coordinates."""
    rank = 0
    for axis, size in sizes.items():
        rank = rank * size + at[axis]
    return rank


_CURRENT: ContextVar[Groups | None] = ContextVar("meshwright_groups", default=None)


@contextmanager
def using(groups: Groups) -> Any:
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
    """Join the process group (from torchrun's environment unless it exists) and place this process in the mesh.

    The backend follows the device: gloo for the CPU, NCCL for CUDA. Raises PlanError when the number of processes is
    not
    the mesh's, before any process waits on another.
    """
    needed = num_ranks(sizes)
    mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items()) or "one rank"
    started = dist.is_initialized()
    world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    if world != needed:
        raise PlanError(
            f"the bundle is for {needed} processes ({mesh}) and was launched with {world}\n"
            f"  torchrun --nproc-per-node {needed} train.py"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= 1 else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    if not started and world > 1:
        timeout = timedelta(seconds=float(os.environ.get("MESHWRIGHT_TIMEOUT", TIMEOUT)))
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=chosen if backend == "nccl" else None)
    rank = dist.get_rank() if world > 1 else 0
    return Groups(sizes=sizes, rank=rank, device=chosen, microbatches=microbatches)
