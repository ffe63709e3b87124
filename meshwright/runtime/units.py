"""Units of communication: parameters that are reduced, and where ZeRO asks for it kept in pieces, together.

Each unit is one flat tensor, of which the parameters are views, so that every collective is one call without copies.
Where it is sharded over dp, a rank keeps one contiguous run of the flat tensor (Rajbhandari et al., arXiv 1910.02054;
the
flat layout is that of FSDP, arXiv 2304.11277). An optimizer that works element by element gets the runs of the
parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.runtime.groups import Groups, all_gather_flat, reduce_scatter_flat
from meshwright.runtime.layout import parse
from meshwright.runtime.parameters import Held

BUCKET_BYTES = 25 * 2**20


@dataclass(slots=True, eq=False)
class Unit:
    """Parameters with the same dtype and pending axes. ``zero``: 0 to 3, 0 where there is no dp to split over."""

    held: list[Held]
    zero: int
    groups: Groups
    axes: tuple[str, ...]
    stages: tuple[int, ...] | None
    flat: torch.Tensor = field(init=False)
    rest: torch.Tensor = field(init=False)
    grad: torch.Tensor | None = field(init=False, default=None)
    piece_grad: torch.Tensor | None = field(init=False, default=None)
    pieces: list[tuple[str, nn.Parameter]] = field(init=False, default_factory=list)
    waiting: int = field(init=False, default=0)
    last: bool = field(init=False, default=True)
    work: list[Any] = field(init=False, default_factory=list)
    scratch: list[torch.Tensor] = field(init=False, default_factory=list)
    reduced: bool = field(init=False, default=False)
    shard_size: int = field(init=False, default=0)
    is_whole: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        first = self.held[0].parameter
        total = sum(h.parameter.numel() for h in self.held)
        ranks = self.groups.size("dp") if self.zero else 1
        self.shard_size = -(-total // ranks)
        self.flat = torch.zeros(self.shard_size * ranks, dtype=first.dtype, device=first.device)
        for held, view in zip(self.held, self._views(self.flat), strict=True):
            view.copy_(held.parameter.detach())
            held.parameter.data = view
        index = self.groups.coordinates.get("dp", 0) if self.zero else 0
        start, stop = index * self.shard_size, (index + 1) * self.shard_size
        if self.zero == 3:
            self.rest = self.flat[start:stop].clone()
            self._drop()
        else:
            self.rest = self.flat[start:stop]
        if self.zero < 2:
            self.grad = torch.zeros_like(self.flat)
            self.piece_grad = self.grad[start:stop]
            self._attach()
        else:
            self.piece_grad = torch.zeros_like(self.rest)
        self._make_pieces(start, stop)
        for held in self.held:
            held.parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        views, at = [], 0
        for held in self.held:
            size = held.parameter.numel()
            views.append(flat[at : at + size].view(held.piece.local_shape))
            at += size
        return views

    def _attach(self) -> None:
        """Make every .grad a view of the flat gradient."""
        assert self.grad is not None
        for held, view in zip(self.held, self._views(self.grad), strict=True):
            held.parameter.grad = view

    def _make_pieces(self, start: int, stop: int) -> None:
        """What the optimizer updates: the parameters, or the runs of them in this rank's shard."""
        if not self.zero:
            self.pieces = [(h.label, h.parameter) for h in self.held]
            return
        assert self.piece_grad is not None
        at = 0
        for held in self.held:
            size = held.parameter.numel()
            a, b = max(at, start), min(at + size, stop)
            if a < b:
                piece = nn.Parameter(self.rest[a - start : b - start])
                piece.grad = self.piece_grad[a - start : b - start]
                self.pieces.append((held.label, piece))
            at += size

    # Gradients

    def begin(self) -> None:
        """Zero gradients, nothing reduced."""
        self.reduced = False
        if self.grad is not None:
            self.grad.zero_()
        elif self.piece_grad is not None:
            self.piece_grad.zero_()
            for held in self.held:
                held.parameter.grad = None

    def expect(self, last: bool) -> None:
        """A backward begins; ``last``: it is the step's last, after which gradients are complete."""
        self.waiting, self.last = len(self.held), last

    def _accumulated(self, _: torch.Tensor) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self._complete()

    def _complete(self) -> None:
        """All gradients of a backward are there: reduce them now, while the backward goes on."""
        if self.zero >= 2:
            self._scatter_now()
        elif self.last:
            self._reduce()

    def _scatter_now(self) -> None:
        """ZeRO-2 and 3: reduce_scatter this backward's gradients and keep the piece alone."""
        self._collect()  # at most one backward's whole gradients are on their way
        grads = [h.parameter.grad for h in self.held]
        flat = self.rest.new_zeros(self.shard_size * self.groups.size("dp"))
        pairs = [(v, g) for v, g in zip(self._views(flat), grads, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([v for v, _ in pairs], [g for _, g in pairs])
        for held in self.held:
            held.parameter.grad = None
        out = torch.empty_like(self.rest)
        work = reduce_scatter_flat(out, flat, group=self.groups.group(["dp"]), async_op=True)
        self.work.append(work)
        self.scratch += [out, flat]
        if self.zero == 3:
            self.drop()

    def _collect(self) -> None:
        """Wait for what is under way and add scattered pieces up, in the order of the backwards."""
        for work in self.work:
            work.wait()
        if self.zero >= 2:
            assert self.piece_grad is not None
            for out in self.scratch[::2]:
                self.piece_grad += out
        self.work.clear()
        self.scratch.clear()

    def _reduce(self) -> None:
        """ZeRO-0 and 1: reduce the gradients of the whole step."""
        assert self.grad is not None and self.piece_grad is not None
        self.reduced = True
        if self.zero == 1:
            group = self.groups.group(["dp"])
            self.work.append(reduce_scatter_flat(self.piece_grad, self.grad, group=group, async_op=True))
        elif self.axes and (group := self.groups.group(self.axes, self.stages)) is not None:
            self.work.append(dist.all_reduce(self.grad, group=group, async_op=True))

    def finish(self) -> None:
        """After the last backward: everything reduced over all pending axes."""
        if self.zero >= 2:
            if any(h.parameter.grad is not None for h in self.held):
                self._scatter_now()
        elif not self.reduced:
            self._reduce()
        self._collect()
        others = [a for a in self.axes if a != "dp"] if self.zero else []
        if others and (group := self.groups.group(others, self.stages)) is not None:
            dist.all_reduce(self.piece_grad, group=group)

    def full_grad(self) -> list[torch.Tensor]:
        """The reduced gradients of the whole parameters in use."""
        assert self.piece_grad is not None
        if not self.zero:
            return self._views(self.piece_grad)
        flat = self.rest.new_empty(self.shard_size * self.groups.size("dp"))
        all_gather_flat(flat, self.piece_grad.contiguous(), group=self.groups.group(["dp"]))
        return self._views(flat)

    # Parameters

    def updated(self) -> Any:
        """After the optimizer: ZeRO-1 and 2 gather the parameters again. Returns the work to wait for."""
        if self.zero in (1, 2):
            return all_gather_flat(self.flat, self.rest, group=self.groups.group(["dp"]), async_op=True)
        return None

    def gather(self) -> None:
        """ZeRO-3: make the parameters whole for use."""
        if self.is_whole:
            return
        storage = self.flat.untyped_storage()
        storage.resize_(self.flat.numel() * self.flat.itemsize)
        # Saved tensors of an earlier forward are views of this storage: the same values come back.
        preserved = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
        with preserved(self.flat), torch.no_grad():
            all_gather_flat(self.flat, self.rest, group=self.groups.group(["dp"]))
        self.is_whole = True

    def drop(self) -> None:
        """ZeRO-3: free the whole parameters."""
        if self.zero == 3 and self.is_whole:
            self._drop()

    def _drop(self) -> None:
        self.flat.untyped_storage().resize_(0)
        self.is_whole = False

    def values(self) -> list[torch.Tensor]:
        """The parameters in use, as they are now."""
        if self.zero != 3:
            return [h.parameter.detach() for h in self.held]
        flat = self.rest.new_empty(self.shard_size * self.groups.size("dp"))
        all_gather_flat(flat, self.rest.contiguous(), group=self.groups.group(["dp"]))
        return self._views(flat)


def make_units(held: Sequence[Held], zero: int, groups: Groups) -> list[Unit]:
    """The units of a stage: by module where parameters are gathered (ZeRO-3), else in buckets, last declared first."""
    keyed: dict[tuple[Any, ...], list[Held]] = {}
    for one in reversed(held):
        if not one.trainable:
            continue
        tied = one.stages if len(one.stages) > 1 else None
        level = zero if "dp" in one.pending and groups.size("dp") > 1 else 0
        if level == 3 and not one.scattered:
            level = 1
        axes = (*one.pending, "pp") if tied else one.pending
        scope = one.scope if level == 3 else ""
        keyed.setdefault((one.parameter.dtype, axes, tied, level, scope), []).append(one)
    units = []
    for (dtype, axes, tied, level, _), members in keyed.items():
        for bucket in _buckets(members, dtype, 2**62 if level == 3 else BUCKET_BYTES):
            units.append(Unit(bucket, level, groups, axes, tied))
    return units


def _buckets(members: Sequence[Held], dtype: torch.dtype, limit: int) -> list[list[Held]]:
    buckets: list[list[Held]] = [[]]
    size = 0
    for one in members:
        bytes_ = one.parameter.numel() * dtype.itemsize
        if buckets[-1] and size + bytes_ > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(one)
        size += bytes_
    return buckets


def needed_groups(manifest: Any) -> list[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    """Every set of axes (and stages) that some parameter's gradient is summed over, in an order that all ranks
    share.
    """
    found: dict[tuple[tuple[str, ...], tuple[int, ...] | None], None] = {}
    for entry in manifest["parameters"].values():
        tied = tuple(entry["stages"]) if len(entry["stages"]) > 1 else None
        for part in entry.get("segments") or [{"types": {}}]:
            types = {**entry["types"], **part["types"]}
            pending = tuple(a for a in manifest["mesh"] if a in types and parse(types[a])[1] == "R")
            axes = (*pending, "pp") if tied else pending
            for choice in (axes, tuple(a for a in axes if a != "dp")):
                if choice:
                    found.setdefault((choice, tied if "pp" in choice else None))
    return list(found)
