"""What goes on one line: which values are written into the line of their only user, and how long values live."""

import operator
from collections.abc import Set

import torch
from torch import fx

from meshwright.compiler.graph import Function, is_multiple
from meshwright.compiler.written import is_writer
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import PIECE, operands

aten = torch.ops.aten

VIEWS = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.default,
}  # fmt: skip
"""Views that are written by their shapes, without sizes."""

FOLDED_VIEWS = VIEWS | {
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
}
LIGHT = {
    aten.to.dtype,
    aten.logsumexp.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.arange.default,
    *FOLDED_VIEWS,
}
"""What may be computed in the middle of another line, beside all that is pointwise."""


def folded(function: Function) -> set[fx.Node]:
    """The values that are written into the line of their only user."""
    results = set(function.results())
    alone = [node for node in function.graph.nodes if len(node.users) == 1 and node not in results]
    return {node for node in alone if _may_fold(function, node, next(iter(node.users)))}


def is_bias(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` only adds a bias to the product ``node``: one operator for the reader."""
    products = (aten.linear.default, aten.matmul.default)
    return (
        node.target in products
        and user.target is aten.add.Tensor
        and user.args[0] is node
        and getattr(user.args[1], "op", "") == "get_attr"
    )


def last_uses(function: Function, folded: Set[fx.Node]) -> dict[fx.Node, float]:
    """The position of the last line that reads a value, counting calls; -1 for what nobody reads."""
    calls = [node for node in function.graph.nodes if node.op in ("call_function", "call_module")]
    where = {node: i for i, node in enumerate(calls)}

    def line_of(node: fx.Node) -> int:
        while node in folded:
            (node,) = node.users
        return where.get(node, len(calls))

    found: dict[fx.Node, float] = {}
    for node in function.graph.nodes:
        found[node] = max((line_of(user) for user in node.users), default=-1)
        for user in node.users:
            if user.target is operator.getitem and not is_multiple(node):
                found[node] = max(found[node], line_of(user))
    return found


def _may_fold(function: Function, node: fx.Node, user: fx.Node) -> bool:
    if node.op != "call_function" or conversion_of(node) or user.op == "call_module" or is_multiple(node):
        return False
    if node not in function.values:
        return False
    if is_bias(node, user):
        return True
    if conversion_of(user) or (_takes_parameter(node) and not is_writer(user)):
        return False
    if node.target in FOLDED_VIEWS:
        return not _takes_parameter(user) or user.target in FOLDED_VIEWS
    origin = function.origins.get(node)
    same = _same_statement(function, node, user) and PIECE not in node.meta
    named = origin is None or (origin.is_name_of_statement and not same)
    return not named and _is_light(node)


def _takes_parameter(node: fx.Node) -> bool:
    return any(operand.op == "get_attr" for operand in operands(node))


def _same_statement(function: Function, a: fx.Node, b: fx.Node) -> bool:
    one, two = function.origins.get(a), function.origins.get(b)
    return one is not None and two is not None and one.statement == two.statement


def _is_light(node: fx.Node) -> bool:
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or node.target in LIGHT
