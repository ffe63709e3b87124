"""Conversions between types: each a collective forward and the conversion of the gradient backward.

The axis is looked up in the mesh of the program that runs; on an axis of one rank, or one that the mesh does not have,
every conversion is the identity. Tensors of integers are converted in the same way, without a backward.

Pieces are equally long unless ``size`` gives the length of the whole dim: then the last piece may be shorter, and is
filled up with zeros on the way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from meshwright.runtime.errors import PlanError
from meshwright.runtime.groups import current
from meshwright.runtime.layout import shard_bounds
from meshwright.runtime.wire import Group

Convert = Callable[[torch.Tensor], torch.Tensor]


class _Conversion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Convert | None, backward: Convert | None) -> torch.Tensor:
        ctx.backward_of = backward
        return x.view_as(x) if forward is None else forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return grad if ctx.backward_of is None else ctx.backward_of(grad), None, None


def _convert(x: torch.Tensor, forward: Convert | None, backward: Convert | None) -> torch.Tensor:
    if has_torch_function_unary(x):  # a mode would not see an autograd function
        return handle_torch_function(_convert, (x,), x, forward, backward)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x if forward is None else forward(x)
    result: torch.Tensor = _Conversion.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return result


# What goes over the wire: the group, its number of pieces and a tensor give a new contiguous one.


def _summed(group: Group, pieces: int, x: torch.Tensor) -> torch.Tensor:
    return group.summed(x)


def _gathered(group: Group, pieces: int, x: torch.Tensor) -> torch.Tensor:
    parts = x.new_empty((pieces, *x.shape))
    group.begin_all_gather(parts.view(-1), x.contiguous().view(-1))()
    return parts


def _scattered(group: Group, pieces: int, parts: torch.Tensor) -> torch.Tensor:
    parts = parts.contiguous()
    out = torch.empty_like(parts[0])
    group.begin_reduce_scatter(out.view(-1), parts.view(-1))()
    return out


def _exchanged(group: Group, pieces: int, parts: torch.Tensor) -> torch.Tensor:
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    group.all_to_all(out, parts)
    return out


COMMUNICATIONS: Mapping[str, Callable[[Group, int, torch.Tensor], torch.Tensor]] = {
    "all_reduce": _summed,
    "all_gather": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _exchanged,
}


def _is_traced(x: torch.Tensor) -> bool:
    """Whether torch.compile traces: then tensors have no values."""
    return type(x) is not torch.Tensor and isinstance(x, (FakeTensor, FunctionalTensor))


def _over(axis: str, kind: str) -> Convert:
    """One of the communications. Its group is looked up now: backwards may run on another thread.

    Where torch.compile traces, its graph gets an operator in this place (``runtime/compiled.py``).
    """
    group, pieces, communicate = current().group([axis]), current().size(axis), COMMUNICATIONS[kind]

    def run(x: torch.Tensor) -> torch.Tensor:
        if _is_traced(x):
            result: torch.Tensor = torch.ops.meshwright.communicate(x, kind, axis, pieces, None)[0]
            return result
        return communicate(group, pieces, x)

    return run


# What is done to a tensor on an axis


def _sum(axis: str) -> Convert:
    summed = _over(axis, "all_reduce")

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bool:
            raise TypeError(f"a boolean tensor cannot be summed over {axis}")
        return summed(x)

    return run


def _gather(axis: str, dim: int, groups: int, size: int | None) -> Convert:
    gathered, pieces = _over(axis, "all_gather"), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        if size is not None:
            x = _lengthened(x, dim, -(-size // pieces))
        whole = _joined(gathered(x), dim, groups)
        return whole if size is None else whole.narrow(dim, 0, size)

    return run


def _check_constant(x: torch.Tensor, axis: str) -> None:
    """In a graph this rank's index is a constant, and the microbatch's is none: torch.compile breaks the graph here."""
    if axis == "mb" and _is_traced(x):
        raise NotImplementedError("a graph that is compiled once cannot know the microbatch")


def _lengthened(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """``x`` with zeros behind it along ``dim``."""
    return F.pad(x, (*(0, 0) * (x.ndim - 1 - dim), 0, length - x.shape[dim]))


def _joined(parts: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """(pieces, *shape) as one tensor with the pieces (of every group) side by side along ``dim``."""
    blocks: torch.Tensor = parts.unflatten(dim + 1, (groups, parts.shape[dim + 1] // groups))
    return blocks.movedim(0, dim + 1).flatten(dim, dim + 2)


def _cut(axis: str, dim: int, groups: int, size: int | None) -> Convert:
    index, pieces = current().index(axis), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        _check_constant(x, axis)
        if size is not None:
            start, stop = shard_bounds(size, index, pieces)
            return x.narrow(dim, start, stop - start).contiguous()
        blocks: torch.Tensor = x.unflatten(dim, (groups, pieces, x.shape[dim] // (groups * pieces)))
        return blocks.select(dim + 1, index).flatten(dim, dim + 1).contiguous()

    return run


def _scatter(axis: str, dim: int, groups: int, size: int | None) -> Convert:
    index, scattered, pieces = current().index(axis), _over(axis, "reduce_scatter"), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        if size is not None:
            x = _lengthened(x, dim, -(-size // pieces) * pieces)
        blocks: torch.Tensor = x.unflatten(dim, (groups, pieces, x.shape[dim] // (groups * pieces)))
        out = scattered(blocks.movedim(dim + 1, 0).flatten(dim + 1, dim + 2))
        if size is not None:
            start, stop = shard_bounds(size, index, pieces)
            return out.narrow(dim, 0, stop - start)
        return out

    return run


def _place(axis: str, dim: int, groups: int, size: int | None) -> Convert:
    index, pieces = current().index(axis), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        _check_constant(x, axis)
        if size is not None:
            start, stop = shard_bounds(size, index, pieces)
            whole = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
            whole.narrow(dim, start, stop - start).copy_(x)
            return whole
        blocks = x.unflatten(dim, (groups, x.shape[dim] // groups))
        whole = x.new_zeros((*blocks.shape[: dim + 1], pieces, *blocks.shape[dim + 1 :]))
        whole.select(dim + 1, index).copy_(blocks)
        return whole.flatten(dim, dim + 2)

    return run


def _exchange(axis: str, split_dim: int, concat_dim: int) -> Convert:
    exchanged, pieces = _over(axis, "all_to_all"), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(split_dim, (pieces, x.shape[split_dim] // pieces)).movedim(split_dim, 0)
        return _joined(exchanged(parts), concat_dim, 1)

    return run


# The vocabulary of stage files


def invariant_to_replicated(x: torch.Tensor, axis: str) -> torch.Tensor:
    """I -> R: returns ``x``; the backward all_reduces the gradient over ``axis``."""
    if current().size(axis) == 1:
        return x
    return _convert(x, None, _sum(axis))


def replicated_to_partial(x: torch.Tensor, axis: str) -> torch.Tensor:
    """R -> P: an n-th of ``x`` on each of the n ranks of ``axis``, so that they sum to it; no communication."""
    return x / current().size(axis)


def all_reduce(x: torch.Tensor, axis: str) -> torch.Tensor:
    """P -> I: the sum over ``axis``; the backward passes the gradient through. Raises TypeError for booleans."""
    if current().size(axis) == 1:
        return x
    return _convert(x, _sum(axis), None)


def all_gather(
    x: torch.Tensor, axis: str, *, dim: int, to: str, groups: int = 1, size: int | None = None
) -> torch.Tensor:
    """S(dim/groups) -> ``to``: the pieces side by side along ``dim``.

    The backward reduce_scatters the gradient for ``to="R"`` and slices it for ``to="I"``. Raises PlanError for a
    dim that is not a multiple of ``groups``, or not this rank's piece of ``size``.
    """
    if current().size(axis) == 1:
        return x
    dim = dim % x.ndim
    start, stop = shard_range(size, axis) if size is not None else (0, x.shape[dim])
    if x.shape[dim] % groups or x.shape[dim] != stop - start:
        wanted = f"{groups} equal groups" if size is None else f"this rank's {stop - start} of {size}"
        raise PlanError(f"dim {dim} of {tuple(x.shape)} is not {wanted}")
    back = {"R": _scatter, "I": _cut}[to]
    return _convert(x, _gather(axis, dim, groups, size), back(axis, dim, groups, size))


def reduce_scatter(x: torch.Tensor, axis: str, *, dim: int, groups: int = 1, size: int | None = None) -> torch.Tensor:
    """P -> S(dim/groups): a piece of the sum; the backward all_gathers.

    Raises PlanError for a dim without such pieces.
    """
    if current().size(axis) == 1:
        return x
    dim = _checked(x, axis, dim, groups, size)
    return _convert(x, _scatter(axis, dim, groups, size), _gather(axis, dim, groups, size))


def shard(x: torch.Tensor, axis: str, *, dim: int, of: str, groups: int = 1, size: int | None = None) -> torch.Tensor:
    """``of`` -> S(dim/groups): this rank's piece.

    The backward all_gathers the gradient for ``of="I"`` and sets it among zeros for ``of="R"``. Raises PlanError for a
    dim without such pieces.
    """
    if current().size(axis) == 1:
        return x
    dim = _checked(x, axis, dim, groups, size)
    back = {"I": _gather, "R": _place}[of]
    return _convert(x, _cut(axis, dim, groups, size), back(axis, dim, groups, size))


def all_to_all(x: torch.Tensor, axis: str, *, split_dim: int, concat_dim: int) -> torch.Tensor:
    """S(concat_dim) -> S(split_dim); the backward exchanges back. Raises PlanError for uneven pieces."""
    if current().size(axis) == 1:
        return x
    split_dim, concat_dim = _checked(x, axis, split_dim, 1, None), concat_dim % x.ndim
    return _convert(x, _exchange(axis, split_dim, concat_dim), _exchange(axis, concat_dim, split_dim))


def shard_range(length: int, axis: str) -> tuple[int, int]:
    """(start, stop) of this rank's piece of a dim of ``length``; the last piece may be shorter."""
    return shard_bounds(length, current().index(axis), current().size(axis))


def part_of_mean(x: torch.Tensor, *axes: str) -> torch.Tensor:
    """The mean of one of n equal pieces, divided by n: they sum to the mean of the whole. n: product of ``axes``."""
    pieces = 1
    for axis in axes:
        pieces *= current().size(axis)
    return x / pieces


def _checked(x: torch.Tensor, axis: str, dim: int, groups: int, size: int | None) -> int:
    """``dim`` from the front. Raises PlanError where it is not ``groups`` times equal pieces, or not ``size`` long."""
    pieces, found = current().size(axis), x.shape[dim]
    if size is None and found % (groups * pieces):
        raise PlanError(
            f"cannot cut dim {dim % x.ndim} of {tuple(x.shape)} in {pieces} equal pieces over {axis}\n"
            f"  use a size that is a multiple of {groups * pieces}"
        )
    if size is not None and found != size:
        raise PlanError(f"dim {dim % x.ndim} of {tuple(x.shape)} is to be cut over {axis} as if it were {size} long")
    return dim % x.ndim
