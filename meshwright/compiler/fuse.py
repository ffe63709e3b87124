"""Rewrites of several nodes at once: matmuls and losses in one spelling, fused projections in parts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from meshwright.compiler.bags import BAGS
from meshwright.compiler.graph import Segment
from meshwright.compiler.rewriting import arguments_of, aten, insert, shape_of, static
from meshwright.compiler.sums import SUMS, added


def _linear(node: fx.Node) -> fx.Node | None:
    """A linear's bias as an addition of its own: where the contraction is split it must be added once."""
    if len(node.args) < 3 or node.args[2] is None:
        return None
    product = insert(aten.linear.default, node.args[:2], like=node)
    return insert(aten.add.Tensor, (product, node.args[2]), like=node)


def _matmul(node: fx.Node) -> fx.Node | None:
    """A product with a transposed matrix is a linear."""
    left, right = node.args
    if isinstance(right, fx.Node) and right.target is aten.transpose.int and right.meta["val"].ndim == 2:
        return insert(aten.linear.default, (left, right.args[0]), like=node)
    return None


def _transpose(node: fx.Node) -> fx.Node | None:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    ndim = source.meta["val"].ndim
    if ndim == 2:
        return insert(aten.transpose.int, (source, 0, 1), like=node)
    return insert(aten.permute.default, (source, list(reversed(range(ndim)))), like=node)


def _last_two(node: fx.Node) -> fx.Node:
    return insert(aten.transpose.int, (node.args[0], -2, -1), like=node)


def _addmm(node: fx.Node) -> fx.Node | None:
    """bias + x @ weight, on x as it was before its leading dims were flattened if they are restored right after."""
    bias, left, right = node.args
    if any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta")):
        return added(lambda node, left, right: insert(aten.matmul.default, (left, right), like=node))(node)
    flat, whole = left, None
    if isinstance(flat, fx.Node) and flat.target in (aten.view.default, aten.reshape.default):
        whole = flat.args[0]
    users = list(node.users)
    if isinstance(whole, fx.Node) and users:
        wanted = (*shape_of(whole.meta["val"])[:-1], shape_of(node.meta["val"])[-1])
        restored = all(
            user.target in (aten.view.default, aten.reshape.default) and shape_of(user.meta["val"]) == wanted
            for user in users
        )
        if restored and shape_of(whole.meta["val"])[-1] == shape_of(flat.meta["val"])[-1]:  # type: ignore[union-attr]
            product = insert(aten.matmul.default, (whole, right), like=node)
            result = insert(aten.add.Tensor, (product, bias), like=node)
            for user in users:
                user.replace_all_uses_with(result)
                node.graph.erase_node(user)
            return result
    product = insert(aten.matmul.default, (left, right), like=node)
    return insert(aten.add.Tensor, (product, bias), like=node)


def _cross_entropy(node: fx.Node) -> fx.Node | None:
    """The mean over valid labels as a sum over a count: both are partial where the tokens are split.

    With class weights the count is the sum of the valid labels' weights. A mean over soft targets is one over all rows.
    """
    given = arguments_of(node)
    logits, labels, weight = _rows(node, given["self"]), given["target"], given["weight"]
    soft = labels.meta["val"].is_floating_point()
    labels = _rows(node, labels) if soft else _flat(node, labels)
    if given["reduction"] == NONE:
        logarithms = insert(aten.log_softmax.int, (logits, 1), like=node)
        return _each(node, logarithms, labels, given, soft)
    options: dict[str, Any] = {"reduction": "sum"} if not soft or given["reduction"] == SUM else {}
    if given["ignore_index"] != -100 and not soft:
        options["ignore_index"] = given["ignore_index"]
    if given["label_smoothing"]:
        options["label_smoothing"] = given["label_smoothing"]
    operands = (logits, labels) if weight is None else (logits, labels, weight)
    total = insert(F.cross_entropy, operands, options, like=node)
    if soft or given["reduction"] == SUM:
        return total
    count = insert(aten.ne.Scalar, (labels, given["ignore_index"]), like=node)
    if weight is not None:
        known = insert(aten.mul.Tensor, (labels, count), like=node)  # an ignored label is no index
        count = insert(aten.mul.Tensor, (insert(aten.index.Tensor, (weight, [known]), like=node), count), like=node)
    count = insert(aten.sum.default, (count,), like=node)
    count.meta["name"] = "num_valid"
    return insert(aten.div.Tensor, (total, count), like=node)


def _each(node: fx.Node, logarithms: fx.Node, labels: fx.Node, given: Mapping[str, Any], soft: bool) -> fx.Node:
    """The loss of every row: that of its label or soft target, and for smoothing a part of that of all classes."""
    part, weight = given["label_smoothing"], given["weight"]
    weighted = logarithms if weight is None else insert(aten.mul.Tensor, (logarithms, weight), like=node)
    if soft:
        target = labels
        if part:
            kept = insert(aten.mul.Tensor, (labels, 1 - part), like=node)
            target = insert(aten.add.Tensor, (kept, part / logarithms.meta["val"].shape[1]), like=node)
        product = insert(aten.mul.Tensor, (weighted, target), like=node)
        losses = insert(aten.neg.default, (insert(aten.sum.dim_IntList, (product, [1]), like=node),), like=node)
    else:
        losses = _picked(node, logarithms, labels, given)[0]
        if part:
            valid = insert(aten.ne.Scalar, (labels, given["ignore_index"]), like=node)
            every = insert(aten.sum.dim_IntList, (weighted, [1]), like=node)
            every = insert(aten.mul.Tensor, (every, -part / logarithms.meta["val"].shape[1]), like=node)
            every = insert(aten.mul.Tensor, (every, valid), like=node)
            losses = insert(aten.mul.Tensor, (losses, 1 - part), like=node)
            losses = insert(aten.add.Tensor, (losses, every), like=node)
    return _shaped(node, losses)


def _shaped(node: fx.Node, losses: fx.Node) -> fx.Node:
    """One loss for each row, as the operator gives them."""
    if node.meta["val"].ndim == 1:
        return losses
    return insert(aten.reshape.default, (losses, list(node.meta["val"].shape)), like=node)


def _nll(node: fx.Node) -> fx.Node | None:
    """The logarithms at the labels, over the count of those that are valid."""
    given = arguments_of(node)
    losses, counted = _picked(node, _rows(node, given["self"]), _flat(node, given["target"]), given)
    if given["reduction"] == NONE:
        return _shaped(node, losses)
    total = insert(aten.sum.default, (losses,), like=node)
    if given["reduction"] == SUM:
        return total
    count = insert(aten.sum.default, (counted,), like=node)
    count.meta["name"] = "num_valid"
    return insert(aten.div.Tensor, (total, count), like=node)


def _picked(node: fx.Node, logarithms: fx.Node, labels: fx.Node, given: Mapping[str, Any]) -> tuple[fx.Node, fx.Node]:
    """The loss of every label, and what it counts: its weight, nothing where it is ignored."""
    valid = insert(aten.ne.Scalar, (labels, given["ignore_index"]), like=node)
    known = insert(aten.mul.Tensor, (labels, valid), like=node)  # an ignored label is no index
    counted = insert(aten.to.dtype, (valid, logarithms.meta["val"].dtype), like=node)
    if given["weight"] is not None:
        weights = insert(aten.index.Tensor, (given["weight"], [known]), like=node)
        counted = insert(aten.mul.Tensor, (weights, counted), like=node)
    places = insert(aten.unsqueeze.default, (known, 1), like=node)
    found = insert(aten.squeeze.dim, (insert(aten.gather.default, (logarithms, 1, places), like=node), 1), like=node)
    losses = insert(aten.neg.default, (insert(aten.mul.Tensor, (found, counted), like=node),), like=node)
    return losses, counted


NONE, SUM = 0, 2
"""How torch numbers reductions."""


def _rows(node: fx.Node, logits: fx.Node) -> fx.Node:
    """(N, C, ...) as (N * ..., C): the classes last, as a matrix."""
    shape = logits.meta["val"].shape
    if len(shape) == 2:
        return logits
    if len(shape) == 1:
        return insert(aten.unsqueeze.default, (logits, 0), like=node)
    last = insert(aten.permute.default, (logits, [0, *range(2, len(shape)), 1]), like=node)
    return insert(aten.reshape.default, (last, [-1, shape[1]]), like=node)


def _flat(node: fx.Node, labels: fx.Node) -> fx.Node:
    return labels if labels.meta["val"].ndim == 1 else insert(aten.reshape.default, (labels, [-1]), like=node)


FUSIONS: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.numpy_T.default: _transpose,
    aten.t.default: _transpose,
    aten.mT.default: _last_two,
    aten.addmm.default: _addmm,
    **SUMS,
    **BAGS,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss_nd.default: _nll,
}


def cut_segments(graph: fx.Graph, attributes: Mapping[fx.Node, str], segments: dict[str, tuple[str, Segment]]) -> None:
    """Where a projection's output is cut into uneven parts (multi-query attention), read and multiply each part alone.

    An even cut needs nothing: a type ``S(d/g)`` splits each of its g parts. Fills ``segments``.
    """
    for node in list(graph.nodes):
        if node.target is aten.linear.default and node.args[1] in attributes:
            _cut_projection(node, attributes, segments)


def _cut_projection(node: fx.Node, attributes: Mapping[fx.Node, str], segments: dict[str, tuple[str, Segment]]) -> None:
    chain, last = [], node
    while len(last.users) == 1:
        (user,) = last.users
        is_bias = user.target is aten.add.Tensor and user.args[1] in attributes and user.args[0] is last
        if not is_bias and user.target is not aten.view.default:
            break
        chain.append(user)
        last = user
        if user.target is aten.view.default:
            break
    shape = shape_of(last.meta["val"])
    dim, width = len(shape) - 1, 1
    if chain and chain[-1].target is aten.view.default:
        if len(shape) != node.meta["val"].ndim + 1 or shape[:-2] != shape_of(node.meta["val"])[:-1]:
            return
        dim, width = len(shape) - 2, shape[-1]
    cuts = _cuts(last, dim)
    if cuts is None or len({stop - start for start, stop, _ in cuts}) == 1 or not static(width):
        return
    for start, stop, user in cuts:
        part = node
        for step in (node, *chain):
            if step.target is aten.view.default:
                sizes = [*step.args[1][:-2], stop - start, width]  # type: ignore[index, misc]
                part = insert(aten.view.default, (part, sizes), like=user)
            else:
                matrix: fx.Node = step.args[1]  # type: ignore[assignment]
                piece = _segment(matrix, attributes[matrix], start * width, (stop - start) * width, segments)
                first = node.args[0] if step is node else part
                part = insert(step.target, (first, piece), like=user)
            part.meta.update({k: v for k, v in step.meta.items() if k in ("stack_trace", "nn_module_stack")})
        user.replace_all_uses_with(part)
        user.graph.erase_node(user)


def _cuts(node: fx.Node, dim: int) -> list[tuple[int, int, fx.Node]] | None:
    """The slices that cut ``dim`` of ``node`` without gap or overlap, in order; None when its users are others."""
    size = shape_of(node.meta["val"])[dim]
    cuts = []
    for user in node.users:
        if user.target is not aten.slice.Tensor or user.args[1] % node.meta["val"].ndim != dim or len(user.args) > 4:
            return None
        start, stop = (user.args[2] or 0), user.args[3]
        start = start + size if start < 0 else start  # type: ignore[operator]
        stop = min(stop + size if stop < 0 else stop, size)  # type: ignore[operator]
        cuts.append((int(start), int(stop), user))  # type: ignore[arg-type]
    cuts.sort(key=lambda cut: cut[0])
    edges = [0, *(stop for _, stop, _ in cuts)]
    complete = all(start == edge for (start, _, _), edge in zip(cuts, edges, strict=False)) and edges[-1] == size
    return cuts if len(cuts) > 1 and complete else None


def _segment(matrix: fx.Node, name: str, start: int, length: int, segments: dict[str, tuple[str, Segment]]) -> fx.Node:
    """The node that reads one part of a parameter along dim 0."""
    key = f"{name}[{start}:{start + length}]"
    for node in matrix.graph.nodes:
        if node.op == "get_attr" and node.target == key:
            return node  # type: ignore[no-any-return]
    segments[key] = (name, Segment(0, start, length))
    with matrix.graph.inserting_after(matrix):
        node = matrix.graph.create_node("get_attr", key)
    with matrix.meta["val"].fake_mode:
        node.meta["val"] = torch.narrow(matrix.meta["val"], 0, start, length)
    return node
