"""Operators that give a tensor another shape, or fill one: as few of them as rules need to know.

Like the rewrites of normalize.py, of which they are a part.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from meshwright.compiler.rewriting import arguments_of, aten, insert, shape_of, static

Rewrite = Callable[[fx.Node], fx.Node | None]


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _made(target: Any) -> Rewrite:
    """A tensor filled with one value, made without another as a pattern."""

    def rewrite(node: fx.Node) -> fx.Node:
        given = arguments_of(node)
        rest = (given["fill_value"],) if "fill_value" in given else ()
        return insert(target, (given["size"], *rest), {"dtype": node.meta["val"].dtype}, like=node)

    return rewrite


def _empty(node: fx.Node) -> fx.Node:
    """What is read only where it was written may as well be zero."""
    return insert(aten.zeros.default, (arguments_of(node)["size"],), {"dtype": node.meta["val"].dtype}, like=node)


def _empty_like(node: fx.Node) -> fx.Node:
    return insert(aten.zeros_like.default, node.args[:1], {"dtype": node.meta["val"].dtype}, like=node)


def _expand(node: fx.Node) -> fx.Node:
    """One spelling of broadcasting; none where the shape stays."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if shape_of(source.meta["val"]) == shape_of(node.meta["val"]):
        return source
    return insert(aten.expand.default, (source, _shape(node)), like=node)


def _reshape(node: fx.Node) -> fx.Node:
    """The shape of another tensor is a shape like any other."""
    return insert(aten.reshape.default, (node.args[0], _shape(node)), like=node)


def _repeat(node: fx.Node) -> fx.Node:
    """Repeating as broadcasting along new dims, which then merge with what they repeat: so a batch that is made by
    ``repeat(B, 1)`` is a dim of its own.
    """
    source: fx.Node
    times: Any
    source, times = node.args  # type: ignore[assignment]
    for _ in range(len(times) - source.meta["val"].ndim):
        source = insert(aten.unsqueeze.default, (source, 0), like=node)
    merged: list[int] = []
    sizes: list[Any] = []
    for dim, count in enumerate(times):
        size = source.meta["val"].shape[dim]
        if count != 1 and not (static(size) and int(size) == 1):
            merged.append(dim)
            sizes.append(count)
        sizes.append(-1 if count == 1 or dim in merged else count)
    for dim in reversed(merged):
        source = insert(aten.unsqueeze.default, (source, dim), like=node)
    source = insert(aten.expand.default, (source, sizes), like=node)
    for dim in merged:
        source = insert(aten.flatten.using_ints, (source, dim, dim + 1), like=node)
    return source


SHAPING: Mapping[Any, Rewrite] = {
    aten.new_zeros.default: _made(aten.zeros.default),
    aten.new_ones.default: _made(aten.ones.default),
    aten.new_full.default: _made(aten.full.default),
    aten.new_empty.default: _empty,
    aten.empty.memory_format: _empty,
    aten.empty_like.default: _empty_like,
    aten.broadcast_to.default: _expand,
    aten.expand_as.default: _expand,
    aten.repeat.default: _repeat,
    aten.reshape_as.default: _reshape,
    aten.view_as.default: _reshape,
    aten._unsafe_view.default: _reshape,
}
