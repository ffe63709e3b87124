"""Views in the forms that writes through them can be taken back from."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from meshwright.compiler.rewriting import aten, insert, is_in_place, storage_of


def plain_views(graph: fx.Graph) -> None:
    """Replace views that change their input's shape in place by those that do not; and parts of a tensor whose memory
    is written to by a slice or selection of their own.
    """
    for node in list(graph.nodes):
        if is_in_place(node) and torch.Tag.inplace_view in node.target.tags:
            _reshape(node)
    written = {storage_of(node.args[0]) for node in graph.nodes if is_in_place(node)}
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.args[0].target in _PARTS and storage_of(node) in written:
            node.replace_all_uses_with(_PARTS[node.args[0].target](node.args[0], node))
            graph.erase_node(node)


def _reshape(node: fx.Node) -> None:
    """What is read of the input later has the new shape."""
    name = node.target._schema.name.split("::")[1].removesuffix("_")  # type: ignore[union-attr]
    packet, overload = getattr(aten, name), node.target._overloadname  # type: ignore[union-attr]
    view = getattr(packet, overload if overload in packet.overloads() else "int")
    changed: fx.Node = node.args[0]  # type: ignore[assignment]
    new = insert(view, node.args, dict(node.kwargs), like=node)
    later = False
    for user in node.graph.nodes:
        if user is node:
            later = True
        elif later and changed in user.all_input_nodes:
            user.replace_input_with(changed, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _slice(parts: fx.Node, node: fx.Node) -> fx.Node:
    source, dim = parts.args[0], _dim(parts, 2)
    index: Any = node.args[1]
    sizes = [part.shape[dim] for part in parts.meta["val"]]
    start = sum(sizes[:index])
    return insert(aten.slice.Tensor, (source, dim, start, start + sizes[index]), like=node)


def _select(parts: fx.Node, node: fx.Node) -> fx.Node:
    return insert(aten.select.int, (parts.args[0], _dim(parts, 1), node.args[1]), like=node)


def _dim(parts: fx.Node, position: int) -> Any:
    return parts.args[position] if len(parts.args) > position else parts.kwargs.get("dim", 0)


_PARTS: Mapping[Any, Any] = {
    aten.split.Tensor: _slice,
    aten.split_with_sizes.default: _slice,
    aten.chunk.default: _slice,
    aten.unsafe_split.Tensor: _slice,
    aten.unsafe_split_with_sizes.default: _slice,
    aten.unsafe_chunk.default: _slice,
    aten.unbind.int: _select,
}
