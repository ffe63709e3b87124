"""Embedding bags: of equally many indices each as embeddings that are reduced, sample by sample; others as they are."""

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.nn import functional as F

from meshwright.compiler.rewriting import arguments_of, aten, insert, shape_of

SUM, MEAN, MAX = 0, 1, 2
"""How torch numbers modes."""
_NAMES = ("sum", "mean", "max")


def embedding_bag(node: fx.Node) -> fx.Node | None:
    """The bags alone; what else the operator returns belongs to its backward."""
    if any(user.args[1] != 0 and user.users for user in node.users):
        return None
    given = arguments_of(node)
    rows = _rows(given)
    new = _one_by_one(node, given) if rows is None else _reduced(node, given, rows)
    for user in list(node.users):
        user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    return new


def _rows(given: dict[str, Any]) -> fx.Node | None:
    """The matrix whose rows are the bags: its elements are the indices, and the offsets count them."""
    flat, offsets = given["indices"], given["offsets"]
    if flat.target not in (aten.reshape.default, aten.view.default) or offsets.target is not aten.arange.start_step:
        return None
    matrix = flat.args[0]
    bounds = offsets.args[:3]
    values = [bound.meta["val"] if isinstance(bound, fx.Node) else bound for bound in bounds]
    shape = matrix.meta["val"].shape
    if len(shape) != 2 or len(values) != 3 or given["include_last_offset"]:
        return None
    if given["mode"] == MAX and given.get("padding_idx") is not None:
        return None
    wanted = (0, shape[0] * shape[1], shape[1])
    return matrix if shape_of(values) == shape_of(wanted) else None


def _one_by_one(node: fx.Node, given: dict[str, Any]) -> fx.Node:
    options: dict[str, Any] = {"mode": _NAMES[given["mode"]]}
    for name in ("per_sample_weights", "include_last_offset", "scale_grad_by_freq"):
        if given[name] is not None and given[name] is not False:
            options[name] = given[name]
    if given.get("padding_idx") is not None:
        options["padding_idx"] = given["padding_idx"]
    return insert(F.embedding_bag, (given["indices"], given["weight"], given["offsets"]), options, like=node)


def _reduced(node: fx.Node, given: dict[str, Any], rows: fx.Node) -> fx.Node:
    weight, padding = given["weight"], given.get("padding_idx")
    options = (-1, True) if given["scale_grad_by_freq"] else ()
    found = insert(aten.embedding.default, (weight, rows, *options), like=node)
    if given["per_sample_weights"] is not None:
        shape = list(rows.meta["val"].shape)
        factors = insert(aten.reshape.default, (given["per_sample_weights"], [*shape, 1]), like=node)
        found = insert(aten.mul.Tensor, (found, factors), like=node)
    if given["mode"] == MAX:
        return insert(aten.amax.default, (found, [1]), like=node)
    if padding is None:
        reduction = aten.mean.dim if given["mode"] == MEAN else aten.sum.dim_IntList
        return insert(reduction, (found, [1]), like=node)
    counted = insert(aten.ne.Scalar, (rows, padding), like=node)
    column = insert(aten.unsqueeze.default, (counted, -1), like=node)
    total = insert(aten.sum.dim_IntList, (insert(aten.mul.Tensor, (found, column), like=node), [1]), like=node)
    if given["mode"] == SUM:
        return total
    count = insert(aten.clamp.default, (insert(aten.sum.dim_IntList, (counted, [1], True), like=node), 1), like=node)
    return insert(aten.div.Tensor, (total, count), like=node)


BAGS: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
}
