"""Conversions between types: each a collective forward and the conversion of the gradient backward.

The axis is looked up in the running program's mesh; on an axis of one rank every conversion is the identity. Tensors of
integers and booleans are converted without a backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from meshwright.runtime.errors import PlanError
from meshwright.runtime.groups import all_gather_flat, current, reduce_scatter_flat
from meshwright.runtime.layout import shard_bounds

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
    if not x.requires_grad:
        return x if forward is None else forward(x)
    result: torch.Tensor = _Conversion.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return result


# What is done to a tensor on an axis


def _sum(axis: str) -> Convert:
    group = current().group([axis])

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.dtype == torch.bool:
            raise TypeError("a boolean tensor cannot be summed over an axis")
        dist.all_reduce(x, group=group)
        return x

    return run


def _gather(axis: str, dim: int, groups: int) -> Convert:
    group, pieces = current().group([axis]), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty((pieces, *x.shape), dtype=x.dtype, device=x.device)
        all_gather_flat(out.view(pieces * x.shape[0], *x.shape[1:]) if x.ndim else out, x, group=group)
        return _joined(out, dim, groups)

    return run


def _joined(parts: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """(pieces, *shape) as one tensor with the pieces (of every group) side by side along ``dim``."""
    pieces, *shape = parts.shape
    blocks = parts.unflatten(dim + 1, (groups, shape[dim] // groups))
    return blocks.movedim(0, dim + 1).flatten(dim, dim + 2)  # type: ignore[no-any-return]


def _cut(axis: str, dim: int, groups: int) -> Convert:
    index, pieces = current().coordinates.get(axis, 0), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(dim, (groups, pieces, x.shape[dim] // (groups * pieces)))
        return blocks.select(dim + 1, index).flatten(dim, dim + 1).contiguous()  # type: ignore[no-any-return]

    return run


def _scatter(axis: str, dim: int, groups: int) -> Convert:
    group, pieces = current().group([axis]), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(dim, (groups, pieces, x.shape[dim] // (groups * pieces)))
        parts = blocks.movedim(dim + 1, 0).flatten(dim + 1, dim + 2).contiguous()
        out = torch.empty(parts.shape[1:], dtype=x.dtype, device=x.device)
        reduce_scatter_flat(out, parts.flatten(0, 1), group=group)
        return out

    return run


def _place(axis: str, dim: int, groups: int, length: int) -> Convert:
    index, pieces = current().coordinates.get(axis, 0), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = length
        whole = x.new_zeros(shape)
        blocks = whole.unflatten(dim, (groups, pieces, length // (groups * pieces)))
        blocks.select(dim + 1, index).copy_(x.unflatten(dim, (groups, length // (groups * pieces))))
        return whole

    return run


def _exchange(axis: str, split_dim: int, concat_dim: int) -> Convert:
    group, pieces = current().group([axis]), current().size(axis)

    def run(x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(split_dim, (pieces, x.shape[split_dim] // pieces)).movedim(split_dim, 0).contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group)
        return _joined(out, concat_dim, 1)

    return run


# The vocabulary of stage files


def invariant_to_replicated(x: torch.Tensor, axis: str) -> torch.Tensor:
    """I -> R: returns ``x``; the backward all_reduces the gradient over ``axis``."""
    if current().size(axis) == 1:
        return x
    return _convert(x, None, _sum(axis))


def all_reduce(x: torch.Tensor, axis: str) -> torch.Tensor:
    """P -> I: the sum over ``axis``; the backward passes the gradient through."""
    if current().size(axis) == 1:
        return x
    return _convert(x, _sum(axis), None)


def all_gather(x: torch.Tensor, axis: str, *, dim: int, to: str, groups: int = 1) -> torch.Tensor:
    """S(dim/groups) -> ``to``: the pieces side by side along ``dim``; the backward reduce_scatters ("R") or slices
    ("I").
    """
    if current().size(axis) == 1:
        return x
    return _convert(
        x, _gather(axis, dim, groups), _scatter(axis, dim, groups) if to == "R" else _cut(axis, dim, groups)
    )


def reduce_scatter(x: torch.Tensor, axis: str, *, dim: int, groups: int = 1) -> torch.Tensor:
    """P -> S(dim/groups): this rank's piece of the sum; the backward all_gathers. Raises PlanError for uneven
    pieces.
    """
    if current().size(axis) == 1:
        return x
    _check_even(x, axis, dim, groups)
    return _convert(x, _scatter(axis, dim, groups), _gather(axis, dim, groups))


def shard(x: torch.Tensor, axis: str, *, dim: int, of: str, groups: int = 1) -> torch.Tensor:
    """``of`` -> S(dim/groups): this rank's piece; the backward all_gathers ("I") or pads with zeros ("R"). Raises
    PlanError.
    """
    if current().size(axis) == 1:
        return x
    _check_even(x, axis, dim, groups)
    back = _gather(axis, dim, groups) if of == "I" else _place(axis, dim, groups, x.shape[dim])
    return _convert(x, _cut(axis, dim, groups), back)


def all_to_all(x: torch.Tensor, axis: str, *, split_dim: int, concat_dim: int) -> torch.Tensor:
    """S(concat_dim) -> S(split_dim); the backward exchanges back. Raises PlanError for uneven pieces."""
    if current().size(axis) == 1:
        return x
    _check_even(x, axis, split_dim, 1)
    return _convert(x, _exchange(axis, split_dim, concat_dim), _exchange(axis, concat_dim, split_dim))


def shard_range(length: int, axis: str) -> tuple[int, int]:
    """(start, stop) of this rank's piece of a dim of ``length``; the last piece may be shorter."""
    return shard_bounds(length, current().coordinates.get(axis, 0), current().size(axis))


def part_of_mean(x: torch.Tensor, *axes: str) -> torch.Tensor:
    """The mean of one of n equal pieces, divided by n: these sum to the mean of the whole. n is the product over
    ``axes``.
    """
    pieces = 1
    for axis in axes:
        pieces *= current().size(axis)
    return x / pieces


def _check_even(x: torch.Tensor, axis: str, dim: int, groups: int) -> None:
    pieces = current().size(axis)
    if x.shape[dim] % (groups * pieces):
        raise PlanError(
            f"cannot cut a dim of {x.shape[dim]} in {pieces} equal pieces over {axis}: pad the batch to a "
            f"multiple of {groups * pieces}"
        )
