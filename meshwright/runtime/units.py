"""Units of reduction: parameters whose gradients travel together, and what ZeRO keeps of them in pieces.

A unit is one flat tensor of which its parameters are views, so every collective is one call without copies. Where
ZeRO splits it over dp, a rank owns one contiguous run of the flat tensor, padded at the end so that all runs are as
long, and the optimizer gets the parts of parameters that lie in it (Rajbhandari et al., ZeRO, arXiv 1910.02054).
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from meshwright.runtime.flat import flatten, views
from meshwright.runtime.gathered import Gathered
from meshwright.runtime.groups import Groups, Holders
from meshwright.runtime.parameters import Held
from meshwright.runtime.wire import Finish

MAX_UNDER_WAY = 2
"""Scattered buckets that may be under way at once; more would keep more whole gradients alive."""


def _call(method: "weakref.WeakMethod[Callable[[], None]]", _: torch.Tensor) -> None:
    if (found := method()) is not None:
        found()


def stages_of(held: Sequence[Held]) -> tuple[int, ...]:
    """The stages of this rank that use some of these parameters."""
    return tuple(sorted({stage for one in held for stage in one.stages}))


class Unit:
    """ZeRO-0, and the base of the others: gradients whole on every rank, summed once per step over all pending axes.

    held: parameters with the same dtype, the same pending ``axes`` and the same stages of this rank. holders: the
    pipeline ranks that all hold them where those are several, else None. under_way: what runs beside the backward,
    shared by the units of a rank. once: whether levels that keep no whole gradient between steps keep one within a
    step, and reduce it once.
    """

    split = False

    def __init__(
        self,
        held: Sequence[Held],
        groups: Groups,
        axes: tuple[str, ...],
        holders: Holders,
        under_way: deque[Finish],
        once: bool,
    ):
        self.held, self.groups, self.axes, self.holders, self.under_way = tuple(held), groups, axes, holders, under_way
        self.once = once
        self.stages = stages_of(held)
        pieces = groups.size("dp") if self.split else 1
        self.flat = flatten([h.parameter for h in held], pieces)
        self.length = self.flat.numel() // pieces
        self.start = self.length * (groups.index("dp") if self.split else 0)
        self.gathered: Gathered | None = None
        self.waiting = 0
        self.last = True
        self.begun = False
        self.finishes: list[Finish] = []
        self.grads: list[torch.Tensor] = []  # of the pieces in updates
        self._allocate()
        self.updates: list[tuple[str, nn.Parameter]] = self._updates()
        self._attach()
        # Weakly: no collector sees a circle through a hook, and the unit holds the parameters and the groups.
        accumulated = weakref.WeakMethod(self._accumulated)
        for one in held:
            one.parameter.register_post_accumulate_grad_hook(partial(_call, accumulated))

    @property
    def rest(self) -> torch.Tensor:
        """What this rank keeps of the parameters between steps, flat."""
        return self.flat[self.start : self.start + self.length]

    def _allocate(self) -> None:
        """One flat gradient; every parameter's .grad is a view of it, which backwards add to in place."""
        self.grad = torch.zeros_like(self.flat)
        self.piece_grad = self.grad[self.start : self.start + self.length]

    def _attach(self) -> None:
        """Make every .grad that the optimizer or the backward knows a view of the flat gradient."""
        for one, view in zip(self.held, self._views(self.grad), strict=True):
            one.parameter.grad = view

    def _updates(self) -> list[tuple[str, nn.Parameter]]:
        return [(h.label, h.parameter) for h in self.held]

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return views(flat, [h.piece.local_shape for h in self.held])

    # Gradients of a step: begin, (expect, hooks) per backward, settle, finish

    def begin(self) -> None:
        """A step begins: gradients are zero."""
        self.begun = False
        if self.held[0].parameter.grad is None or (self.updates and self.updates[0][1].grad is None):
            self._attach()  # a script called the optimizer's zero_grad
        self.grad.zero_()

    def expect(self, last: bool) -> None:
        """A backward of one of the stages begins; ``last``: the stage's last of the step."""
        self.waiting, self.last = len(self.held), last

    def _accumulated(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self._complete()

    def _complete(self) -> None:
        """All gradients of a backward are there, and the backward goes on: reduce beside it."""
        # Other pipeline ranks meet tied parameters in another order, and another stage of this rank may add to them:
        # those wait until all are there.
        if self.last and self.holders is None and len(self.stages) == 1:
            self._begin_reduction()

    def _begin_reduction(self) -> None:
        self.begun = True
        self._begin_sum(self.grad, self.axes)

    def _begin_sum(self, flat: torch.Tensor, axes: tuple[str, ...]) -> None:
        group = self.groups.find(axes, self.holders)
        if group is not None:
            self.finishes.append(group.begin_all_reduce(flat))

    def settle(self) -> None:
        """After the last backward: begin what has not begun. All units settle before one finishes."""
        if not self.begun:
            self._begin_reduction()

    def finish(self) -> None:
        """Gradients are summed over all pending axes."""
        for finish in self.finishes:
            finish()
        self.finishes.clear()

    def full_grad(self) -> list[torch.Tensor]:
        """The gradients of the parameters in use."""
        return self._views(self.grad)

    # Parameters

    def begin_update(self) -> None:
        """The optimizer has run: begin to tell the others."""

    def values(self) -> list[torch.Tensor]:
        """The parameters in use."""
        return self._views(self.flat)


class SplitState(Unit):
    """ZeRO-1: the optimizer's state in pieces. Gradients are scattered once per step, updated parameters gathered."""

    split = True

    def _updates(self) -> list[tuple[str, nn.Parameter]]:
        """The parts of the parameters that lie in this rank's run."""
        rest, found, at = self.rest, [], -self.start
        for one in self.held:
            begin, end = max(at, 0), min(at + one.parameter.numel(), self.length)
            if begin < end:
                found.append((one.label, nn.Parameter(rest[begin:end])))
                self.grads.append(self.piece_grad[begin:end])
            at += one.parameter.numel()
        return found

    def _attach(self) -> None:
        super()._attach()
        self._attach_pieces()

    def _attach_pieces(self) -> None:
        for (_, part), grad in zip(self.updates, self.grads, strict=True):
            part.grad = grad

    def _begin_reduction(self) -> None:
        self.begun = True
        self.finishes.append(self.groups.group(["dp"]).begin_reduce_scatter(self.piece_grad, self.grad))

    def settle(self) -> None:
        """The pieces are summed over dp; what else is pending begins."""
        super().settle()
        self.finish()
        self._begin_sum(self.piece_grad, tuple(axis for axis in self.axes if axis != "dp"))

    def full_grad(self) -> list[torch.Tensor]:
        return self._whole(self.piece_grad)

    def _whole(self, piece: torch.Tensor) -> list[torch.Tensor]:
        flat = piece.new_empty(self.length * self.groups.size("dp"))
        self.groups.group(["dp"]).begin_all_gather(flat, piece.contiguous())()
        return self._views(flat)

    def begin_update(self) -> None:
        self.finishes.append(self.groups.group(["dp"]).begin_all_gather(self.flat, self.rest))


class SplitGradients(SplitState):
    """ZeRO-2: gradients in pieces too. A whole one is there from a backward until it is scattered: after the last of a
    step (``once``), or after every one, and the pieces are added up.
    """

    def _allocate(self) -> None:
        self.piece_grad = torch.zeros_like(self.flat[: self.length])
        self.whole: torch.Tensor | None = None

    def _attach(self) -> None:
        self._attach_pieces()

    def begin(self) -> None:
        self.begun = False
        if self.updates and self.updates[0][1].grad is None:
            self._attach()

    def _complete(self) -> None:
        if self.once:
            self._collect()
            super()._complete()
        else:
            self._begin_reduction()

    def _collect(self) -> torch.Tensor:
        """The whole gradient, flat: what autograd left so far, and further backwards add to it in place."""
        if self.whole is None:
            grads = [h.parameter.grad for h in self.held]
            self.whole = self.flat.new_empty(self.length * self.groups.size("dp"))
            if any(grad is None for grad in grads):
                self.whole.zero_()
            else:
                self.whole[sum(h.parameter.numel() for h in self.held) :].zero_()
            parts = self._views(self.whole)
            pairs = [(view, grad) for view, grad in zip(parts, grads, strict=True) if grad is not None]
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
            for one, view in zip(self.held, parts, strict=True):
                one.parameter.grad = view
        return self.whole

    def _begin_reduction(self) -> None:
        whole, self.whole = self._collect(), None
        for one in self.held:
            one.parameter.grad = None
        out = torch.empty_like(self.piece_grad) if self.begun else self.piece_grad
        self.begun = True
        finish = self.groups.group(["dp"]).begin_reduce_scatter(out, whole)
        self.under_way.append(lambda: self._add(finish, out))
        if len(self.under_way) > MAX_UNDER_WAY:
            self.under_way.popleft()()

    def _add(self, finish: Finish, out: torch.Tensor) -> None:
        finish()
        if out is not self.piece_grad:
            self.piece_grad.add_(out)

    def settle(self) -> None:
        # A parameter that the backwards do not reach keeps its unit from completing.
        if not self.begun or any(h.parameter.grad is not None for h in self.held):
            self._begin_reduction()
        while self.under_way:
            self.under_way.popleft()()
        self._begin_sum(self.piece_grad, tuple(axis for axis in self.axes if axis != "dp"))


class SplitParameters(SplitGradients):
    """ZeRO-3: parameters in pieces too, whole only around their use (FSDP, arXiv 2304.11277)."""

    def _allocate(self) -> None:
        super()._allocate()
        self.gathered = Gathered(self.flat, self.groups, self.stages)

    @property
    def rest(self) -> torch.Tensor:
        assert self.gathered is not None
        return self.gathered.rest

    def _complete(self) -> None:
        super()._complete()
        assert self.gathered is not None
        self.gathered.drop()

    def begin_update(self) -> None:
        """Parameters are gathered when they are used."""

    def values(self) -> list[torch.Tensor]:
        return self._whole(self.rest)


LEVELS: Mapping[int, type[Unit]] = {0: Unit, 1: SplitState, 2: SplitGradients, 3: SplitParameters}
"""What each level of ZeRO is called here."""
