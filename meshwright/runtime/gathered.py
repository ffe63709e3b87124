"""ZeRO-3: parameters that rest in pieces over dp and are whole while a module uses them.

Before the forward of a module its parameters are gathered by one collective into the storage that they are views of,
and the storage is freed after; the same around its backward; or they stay from their first use in a step until the last
backward of their stages. Autograd saves the views, not the storage, and finds the same values in it again. The order of
uses repeats from step to step, so the next is gathered beside the present one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from meshwright.runtime.flat import views
from meshwright.runtime.groups import Groups
from meshwright.runtime.wire import Finish


class Gathered:
    """A flat tensor of parameters over dp.

    flat: the whole, which becomes this object's to free and fill. stages: those of this rank that use it.
    """

    def __init__(self, flat: torch.Tensor, groups: Groups, stages: Iterable[int]):
        length = flat.numel() // groups.size("dp")
        start = groups.index("dp") * length
        self.flat = flat
        self.groups = groups
        self.rest = flat[start : start + length].clone()
        self.group = groups.group(["dp"])
        self.stages = frozenset(stages)
        self.users = 0
        self.stays = False
        self.is_whole = True
        self.finish: Finish | None = None
        self.drop()

    def values(self, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Whole tensors of the given shapes, apart from those in use."""
        flat = torch.empty(self.rest.numel() * self.groups.size("dp"), dtype=self.rest.dtype, device=self.rest.device)
        self.group.begin_all_gather(flat, self.rest)()
        return views(flat, shapes)

    def begin(self) -> None:
        """Begin to gather, unless it is whole or under way."""
        if self.is_whole or self.finish is not None:
            return
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.itemsize)
        # What autograd saved of an earlier forward are views of this storage, and the same values come back.
        preserved = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
        with preserved(self.flat), torch.no_grad():
            self.finish = self.group.begin_all_gather(self.flat, self.rest)

    def gather(self) -> None:
        """Make the parameters whole."""
        self.begin()
        if self.finish is not None:
            self.finish()
            self.finish, self.is_whole = None, True

    def drop(self) -> None:
        """Free the whole parameters unless a module uses them, or they stay for later ones."""
        if self.users or self.stays:
            return
        if self.finish is not None:
            self.gather()
        if self.is_whole:
            self.flat.untyped_storage().resize_(0)
            self.is_whole = False


@dataclass(slots=True)
class Uses:
    """The order in which a rank's gathered parameters are used, as it was in the last step of the same kind.

    gathered: all of them. stay: whether they do, from their first use in a step until the last backward of their
    stages. over: the stages that had it.
    """

    gathered: Sequence[Gathered]
    stay: bool
    known: dict[str, list[Gathered]] = field(default_factory=dict)
    kind: str = ""
    seen: list[Gathered] = field(default_factory=list)
    over: set[int] = field(default_factory=set)

    def begin(self, kind: str) -> None:
        """A step of a kind (training, evaluation) begins."""
        self.kind, self.seen = kind, []
        self.over.clear()

    def end(self) -> None:
        """It is over: remember its order, and keep nothing whole."""
        self.known[self.kind] = self.seen
        for one in self.gathered:
            one.stays = False
            one.drop()

    def hold(self, stage: int) -> None:
        """Make whole what a stage uses: its backward for the weights reads them, and no hook of a module tells when."""
        held = [one for one in self.gathered if stage in one.stages]
        for one in held:
            one.begin()  # beside each other
        for one in held:
            self.use(one)
            one.users += 1

    def let_go(self, stage: int) -> None:
        """The backward after ``hold`` is over."""
        for one in self.gathered:
            if stage in one.stages:
                one.users -= 1

    def end_backward(self, stage: int, last: bool) -> None:
        """A backward of a stage is over, its ``last`` of the step: free what no module uses and what is not used next.

        Else what it did not come to drop would be left: what is frozen, or what it does not reach.
        """
        if last:
            self.over.add(stage)
        following = self.following() if self.seen else None
        for one in self.gathered:
            one.stays = one.stays and not one.stages <= self.over
            if one is not following:
                one.drop()

    def use(self, one: Gathered) -> None:
        """Make it whole, and begin to gather what comes next."""
        if one.stays:
            return
        one.gather()
        one.stays = self.stay
        self.seen.append(one)
        following = self.following()
        if following is not None:
            following.begin()

    def following(self) -> Gathered | None:
        """What was used next, where the order so far is the known one."""
        known, at = self.known.get(self.kind, []), len(self.seen)
        return known[at] if at < len(known) and known[at - 1] is self.seen[-1] else None


def gather_around(module: nn.Module, gathered: Sequence[Gathered], uses: Uses, is_done: Callable[[], bool]) -> None:
    """Make ``gathered`` whole in the forward of ``module``, and from when the gradient of its result arrives.

    is_done: whether this backward has all gradients of the parameters of the module and of those inside it. Units drop
    what they have the gradients of; what is frozen, and all in a backward for the inputs alone, is dropped here, when
    the gradients of all inputs show that nothing needs it any more.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for one in gathered:
            uses.use(one)
            one.users += 1
        values = (*args, *kwargs.values())
        inputs = {id(t): t for t in values if isinstance(t, torch.Tensor) and t.requires_grad}
        missing = set(inputs)
        for key, tensor in inputs.items():
            tensor.register_hook(partial(backward_after, missing, key))

    def after(_module: nn.Module, _args: Any, result: Any) -> None:
        for one in gathered:
            one.users -= 1
            if uses.following() is not one:  # the last block's backward follows its forward
                one.drop()
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(backward_before)

    def backward_before(_: torch.Tensor) -> None:
        for one in gathered:
            uses.use(one)

    def backward_after(missing: set[int], key: int, _: torch.Tensor) -> None:
        missing.discard(key)
        if not missing and is_done():
            for one in gathered:
                one.drop()

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
