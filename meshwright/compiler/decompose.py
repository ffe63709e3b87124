"""Composite operators that nobody knows, as what torch composes them of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

Known = Callable[[Any], bool]


def decompose(graph: fx.Graph, is_known: Known, *, views: bool = False) -> None:
    """Replace every composite operator that is not known by what it is composed of in the end; the others stay.

    views: those too whose result may share memory with an operand, once nothing is written in place any more.
    """
    for node in list(graph.nodes):
        if _is_unknown(node, is_known, views):
            _inline(node)


def _is_unknown(node: fx.Node, is_known: Known, views: bool) -> bool:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or is_known(target):
        return False
    if not any("Tensor" in str(result.type) for result in target._schema.returns):
        return False  # a size, which the dispatcher does not know
    shares = any(result.alias_info is not None for result in target._schema.returns)
    return (views or not shares) and target._can_decompose()


def _inline(node: fx.Node) -> None:
    """Put the parts of an operator in its place; what torch cannot take apart stays, and runs whole."""
    flat, spec = tree_flatten((node.args, dict(node.kwargs)))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, fx.Node)]
    values = [flat[i].meta["val"] for i in places]

    def run(*given: Any) -> Any:
        leaves = list(flat)
        for i, value in zip(places, given, strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, spec)
        return node.target.decompose(*args, **kwargs)  # type: ignore[union-attr]

    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    try:
        with mode:
            body = make_fx(run, tracing_mode="real")(*values)
    except Exception:
        return
    inner = iter(flat[i] for i in places)
    environment: dict[fx.Node, Any] = {}
    with node.graph.inserting_before(node):
        for part in body.graph.nodes:
            if part.op == "placeholder":
                environment[part] = next(inner)
            elif part.op == "output":
                result = tree_map_only(fx.Node, environment.__getitem__, part.args[0])
            else:
                environment[part] = node.graph.node_copy(part, environment.__getitem__)
                kept = ("stack_trace", "nn_module_stack")
                environment[part].meta.update({key: node.meta[key] for key in kept if key in node.meta})
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
