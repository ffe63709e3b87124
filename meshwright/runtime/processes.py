"""Ranks as processes, over torch.distributed: collectives in the form that each kind of device does fastest."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from meshwright.runtime.errors import PlanError
from meshwright.runtime.failure import StoreWatch
from meshwright.runtime.wire import Finish, Message

TIMEOUT = 300.0
"""Seconds that a collective may take; the environment's MESHWRIGHT_TIMEOUT overrides."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

# torch 2.13 renames these two.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroup:
    """A ``Group`` over one of torch's."""

    __slots__ = ("group", "index", "size")

    def __init__(self, group: Any):
        self.group, self.index, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def begin_reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor) -> Finish:
        if flat.is_complex():
            out, flat = torch.view_as_real(out).view(-1), torch.view_as_real(flat).view(-1)
        return _SCATTERS[flat.device.type](out, flat, self.group)

    def begin_all_gather(self, flat: torch.Tensor, piece: torch.Tensor) -> Finish:
        if flat.is_complex():
            flat, piece = torch.view_as_real(flat).view(-1), torch.view_as_real(piece).view(-1)
        work = _ALL_GATHER(flat, piece, group=self.group, async_op=True)
        return lambda: _wait(work)

    def begin_all_reduce(self, flat: torch.Tensor) -> Finish:
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return lambda: _wait(work)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_complex():
            return torch.view_as_complex(self.summed(torch.view_as_real(x)))
        x = x.contiguous()
        if x.device.type == "cpu" and self.size == 2:
            return self._sum_of_two(x)
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def _sum_of_two(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange and add: as many bytes as gloo's all_reduce, in one step of messages instead of two, uncopied."""
        other, peer = torch.empty_like(x), 1 - self.index
        sent = dist.isend(x, group=self.group, group_dst=peer)
        received = dist.irecv(other, group=self.group, group_src=peer)
        _wait(received)
        _wait(sent)
        return other.add_(x)

    def all_to_all(self, out: torch.Tensor, parts: torch.Tensor) -> None:
        dist.all_to_all_single(out, parts, group=self.group)

    def broadcast(self, value: torch.Tensor, source: int) -> None:
        dist.broadcast(value, src=source, group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def begin_exchange(
        self, sends: Sequence[Message], receives: Sequence[Message]
    ) -> tuple[list[Finish], list[Finish]]:
        operations = [dist.P2POp(dist.isend, tensor, peer, group=self.group) for peer, tensor in sends]
        operations += [dist.P2POp(dist.irecv, tensor, peer, group=self.group) for peer, tensor in receives]
        works = dist.batch_isend_irecv(operations)
        if len(works) == len(operations):
            finishes: list[Finish] = [partial(_wait, work) for work in works]
        else:  # NCCL makes one of a batch
            finishes = [partial(_wait, *works)] * len(operations)
        return finishes[: len(sends)], finishes[len(sends) :]


def _native(out: torch.Tensor, flat: torch.Tensor, group: Any) -> Finish:
    work = _REDUCE_SCATTER(out, flat, group=group, async_op=True)
    return lambda: _wait(work)


def _exchanged(out: torch.Tensor, flat: torch.Tensor, group: Any) -> Finish:
    """Exchange, then add here: gloo's own reduce_scatter is slower than its all_reduce, this is twice as fast as it."""
    parts = torch.empty_like(flat)
    work = dist.all_to_all_single(parts, flat, group=group, async_op=True)

    def finish() -> None:
        _wait(work)
        first, second, *others = parts.view(-1, out.numel()).unbind()
        torch.add(first, second, out=out)
        for part in others:
            out.add_(part)

    return finish


def _wait(*works: Any) -> None:
    for work in works:
        if work is not None:
            work.wait()


_SCATTERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, Any], Finish]] = {
    "cpu": _exchanged,
    "cuda": _native,
}


class Processes:
    """A ``Wire`` over torch's process group, which exists or is started from torchrun's environment."""

    kind = "processes"

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.num_ranks > 1 else 0

    @property
    def world(self) -> ProcessGroup:
        return ProcessGroup(dist.group.WORLD)

    def launch(self, num_ranks: int) -> str:
        return f"torchrun --nproc-per-node {num_ranks} train.py"

    def join(self, device: torch.device) -> None:
        """The backend follows the device: gloo for the CPU, NCCL for CUDA."""
        if not dist.is_initialized() and self.num_ranks > 1:
            bound = device if device.type == "cuda" else None
            dist.init_process_group(BACKENDS[device.type], timeout=time_limit(), device_id=bound)
        self.device = device

    def group(self, ranks: Sequence[int], name: str) -> ProcessGroup | None:
        # Only members meet to make a group: thousands of groups elsewhere cost this rank nothing. Torch names such a
        # group by how many the process has, so a rank that is in none makes one of its own to keep in step.
        if len(ranks) == self.num_ranks:
            group: Any = dist.group.WORLD
        else:
            group = dist.new_group(list(ranks), timeout=time_limit(), use_local_synchronization=True)
        if len(ranks) == 1:
            return None
        if self.device.type == "cuda":
            # The first use connects all members; messages between some of them must not be the first.
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        return ProcessGroup(group)

    def watch(self) -> StoreWatch | None:
        return StoreWatch(self.rank) if self.num_ranks > 1 else None

    def save(self, state: Mapping[str, torch.Tensor], path: str) -> None:
        state_dict_saver.save(dict(state), checkpoint_id=path)

    def load(self, state: dict[str, torch.Tensor], path: str) -> None:
        state_dict_loader.load(state, checkpoint_id=path)


def time_limit() -> timedelta:
    """How long a collective may take. Raises PlanError for a MESHWRIGHT_TIMEOUT that is no number."""
    text = os.environ.get("MESHWRIGHT_TIMEOUT", str(TIMEOUT))
    try:
        return timedelta(seconds=float(text))
    except ValueError:
        raise PlanError(f"MESHWRIGHT_TIMEOUT={text!r} is no number of seconds") from None
