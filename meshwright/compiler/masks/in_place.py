"""Whether a value of an exported graph is changed in place, itself or through what shares its memory."""

from collections.abc import Container
from typing import Any

import torch
from torch import fx

from meshwright.compiler.rewriting import arguments_of


def is_written(node: fx.Node, *, reads: Container[Any] = ()) -> bool:
    """Whether ``node``, or what may share its memory, is changed in place anywhere in the graph. reads: operators that
    leave their arguments' values as they are, whatever their schema says."""
    return any(
        _writes(user, node, reads) or (_may_share(user, node) and is_written(user, reads=reads)) for user in node.users
    )


def _writes(user: fx.Node, node: fx.Node, reads: Container[Any]) -> bool:
    if isinstance(user.target, torch._ops.OpOverload):
        given = arguments_of(user)
        written = [a.name for a in user.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return user.target not in reads and any(node in _nodes(given[name]) for name in written)
    attributes = [str(n.target) for n in user.all_input_nodes if n.op == "get_attr"]
    bodies = [getattr(user.graph.owning_module, name, None) for name in attributes]
    inner = [n for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes]
    return any(_writes(n, source, reads) for n in inner for source in n.all_input_nodes)


def _may_share(user: fx.Node, node: fx.Node) -> bool:
    """Views share memory with their first argument, and so may what torch composes of other operators."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    is_view = any(result.alias_info is not None for result in user.target._schema.returns)
    return (is_view or user.target._can_decompose()) and node in _nodes(next(iter(arguments_of(user).values())))


def _nodes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
