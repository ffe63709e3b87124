"""A product added to a value, as product and sum: ``beta * x + alpha * product``."""

from collections.abc import Callable
from typing import Any

from torch import fx

from meshwright.compiler.rewriting import arguments_of, aten, insert


def added(product: Callable[[fx.Node, fx.Node, fx.Node], fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """The rewrite of an operator that adds the ``product`` of its second and third argument to its first."""

    def rewrite(node: fx.Node) -> fx.Node:
        given = arguments_of(node)
        first, left, right = node.args[:3]
        result = _scaled(node, product(node, left, right), given["alpha"])  # type: ignore[arg-type]
        if given["beta"] == 0:
            return result
        scaled = _scaled(node, first, given["beta"])  # type: ignore[arg-type]
        return insert(aten.add.Tensor, (result, scaled), like=node)

    return rewrite


def _scaled(node: fx.Node, value: fx.Node, factor: Any) -> fx.Node:
    return value if factor == 1 else insert(aten.mul.Tensor, (value, factor), like=node)


def _outer(node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    return insert(aten.mul.Tensor, (insert(aten.unsqueeze.default, (left, 1), like=node), right), like=node)


def _summed(node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    return insert(aten.sum.dim_IntList, (insert(aten.bmm.default, (left, right), like=node), [0]), like=node)


SUMS: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.addmv.default: added(lambda node, left, right: insert(aten.mv.default, (left, right), like=node)),
    aten.addr.default: added(_outer),
    aten.addbmm.default: added(_summed),
}
