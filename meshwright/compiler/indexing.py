"""Indexing as the slice, the view or the gather that it is, where it is one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from meshwright.compiler.rewriting import aten, insert, shape_of, static


def index(node: fx.Node, constants: Mapping[fx.Node, torch.Tensor]) -> fx.Node | None:
    """What computes the same as an aten.index: a slice of one place, a view of everything in order, or a gather of one
    place for every sample; None for what is none of these.
    """
    source: Any = node.args[0]
    indices: Any = node.args[1]
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(used) == 1 and used[0][1] in constants and constants[used[0][1]].shape == (1,):
        dim, found = used[0]
        size = source.meta["val"].shape[dim]
        start = int(constants[found])
        if start < 0 and static(size):
            start += int(size)
        return insert(aten.slice.Tensor, (source, dim, start, start + 1 if start != -1 else 2**63 - 1), like=node)
    result = node.meta["val"]
    positions = [_whole_range(index, source.meta["val"].shape[dim]) for dim, index in used]
    if len(used) == 2 and used[0][0] == 0 and positions == [0, None]:
        return _picked(node, *used[1])
    if len(used) != source.meta["val"].ndim or None in positions or sorted(positions) != positions:  # type: ignore[type-var]
        return None
    if len(set(positions)) != len(positions):
        return None
    view: fx.Node = source
    for dim in range(result.ndim):
        if dim not in positions:
            view = insert(aten.unsqueeze.default, (view, dim), like=node)
    return view


def _picked(node: fx.Node, dim: int, index: fx.Node) -> fx.Node | None:
    """One place along ``dim`` for every sample, ``x[torch.arange(len(x)), places]``: samples stay apart in a gather."""
    source: Any = node.args[0]
    places = index.meta["val"]
    if places.ndim != 1 or not places.dtype.is_signed:
        return None
    sizes = list(source.meta["val"].shape)
    found = insert(aten.remainder.Scalar, (index, sizes[dim]), like=node)  # a gather counts from the front alone
    for _ in sizes[1:]:
        found = insert(aten.unsqueeze.default, (found, -1), like=node)
    found = insert(aten.expand.default, (found, [-1, *sizes[1:dim], 1, *sizes[dim + 1 :]]), like=node)
    return insert(aten.squeeze.dim, (insert(aten.gather.default, (source, dim, found), like=node), dim), like=node)


def _whole_range(index: fx.Node, size: Any) -> int | None:
    """The dim (from the left, of the broadcast result) along which ``index`` counts 0, 1, ..., size - 1; else None."""
    value = index.meta["val"]
    while index.target in (aten.unsqueeze.default, aten.slice.Tensor, aten.view.default, aten.lift_fresh_copy.default):
        index = index.args[0]  # type: ignore[assignment]
    stop = index.meta["val"].shape[0] if index.target is aten.arange.default else None
    if stop is None or shape_of(index.meta["val"]) != shape_of(torch.Size([size]) if static(size) else (size,)):
        return None
    long = [dim for dim, length in enumerate(value.shape) if not (static(length) and int(length) == 1)]
    return long[0] if len(long) == 1 else None
