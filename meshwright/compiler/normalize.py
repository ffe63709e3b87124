"""Normalization: one spelling for each meaning, and nothing that computes nothing.

A table of rewrites, each a small function that looks at one node and returns what it is replaced by, or None. The
graph is
still torch.export's own here, with fake tensors in ``node.meta["val"]``.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from meshwright.compiler.decompose import Known, decompose
from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.foreign import refuse_foreign
from meshwright.compiler.functional import functionalize
from meshwright.compiler.fuse import FUSIONS, cut_segments
from meshwright.compiler.graph import Segment, Site
from meshwright.compiler.in_place import plain_views
from meshwright.compiler.indexing import index
from meshwright.compiler.masks.causal import is_causal
from meshwright.compiler.random import Sites, is_random
from meshwright.compiler.rewriting import aten, insert, place, shape_of, static, with_gradient
from meshwright.compiler.shaping import SHAPING
from meshwright.compiler.written import NORMALIZATIONS, is_writer, keep_old_values, keep_statistics

Rewrite = Callable[[fx.Node], fx.Node | None]


def normalize(
    module: fx.GraphModule,
    constants: Mapping[fx.Node, torch.Tensor],
    attributes: Mapping[fx.Node, str],
    buffers: Set[fx.Node],
    segments: dict[str, tuple[str, Segment]] | None,
    sites: dict[str, Site],
    is_known: Known,
) -> None:
    """Rewrite the graph of ``module`` in place.

    constants: placeholders of tensors that the model's code made, with their values. attributes: placeholders of
    parameters and buffers with their names. buffers: those of registered buffers. segments: filled with the parts of
    unevenly fused parameters, which are then read one by one; None leaves them whole. sites: filled with what random
    operators draw from. is_known: which composite operators stay as they are.
    Raises UnsupportedError for random operators that are not supported, for in-place operations that have no pure
    form, and for operators of other libraries that cannot be imported.
    """
    graph = module.graph
    _inline_submodules(module)
    refuse_foreign(graph)
    ours = {*_REWRITES, *SHAPING, *FUSIONS, *NORMALIZATIONS}

    def stays(target: Any) -> bool:
        return target in ours or is_random(target) or is_known(target)

    decompose(graph, stays)
    plain_views(graph)
    keep_statistics(graph, attributes, buffers)
    functionalize(graph, attributes, buffers)
    decompose(graph, stays, views=True)
    _drop_needless_detaches(graph)
    rewrites: dict[Any, Rewrite] = {**_REWRITES, **SHAPING, **FUSIONS}
    rewrites[aten.cat.default] = _drop_empty_parts
    rewrites[aten.index.Tensor] = lambda node: index(node, constants)
    drawn = Sites(sites, attributes.values())
    for node in list(graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        rewrite = drawn.rewrite if is_random(node.target) else rewrites.get(node.target)
        replacement = rewrite(node) if rewrite else None
        if replacement is not None and replacement is not node:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    remove_dead(graph)
    for node in list(graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _prove_mask(node, constants)
        elif node.target is aten.expand.default:
            _sink_expand(node)
    drawn.finish()
    _promote(graph)
    remove_dead(graph)
    if segments is not None:
        cut_segments(graph, attributes, segments)
        remove_dead(graph)
    _share(graph)
    remove_dead(graph)
    keep_old_values(graph, attributes)


def remove_dead(graph: fx.Graph) -> None:
    """Remove every node without users, asserts included; placeholders and what writes to buffers stay."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not is_writer(node):
            graph.erase_node(node)


def _inline_submodules(module: fx.GraphModule) -> None:
    """Put the bodies of no-grad and autocast regions in place, cut off from the gradient where they were."""
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        skip = 1 if name == "wrap_with_set_grad_enabled" else 4
        if name == "wrap_with_autocast" and node.args[2]:
            raise UnsupportedError(
                f"autocast inside the model {place(node)} is not supported yet\n  train in the model's own "
                f"dtypes instead"
            )
        body: fx.GraphModule = getattr(module, str(node.args[skip].target))
        cut = name == "wrap_with_set_grad_enabled" and not node.args[0]
        arguments = iter(node.args[skip + 1 :])
        environment: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    outer = next(arguments)
                    value = outer.meta.get("val")
                    if cut and isinstance(value, FakeTensor) and (value.is_floating_point() or value.is_complex()):
                        outer = insert(aten.detach.default, (outer,), like=node)
                    environment[inner] = outer
                elif inner.op == "output":
                    results = inner.args[0]
                else:
                    environment[inner] = graph.node_copy(inner, environment.__getitem__)
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(environment[results])
        else:
            for user in list(node.users):
                user.replace_all_uses_with(environment[results[user.args[1]]])
                graph.erase_node(user)
        graph.erase_node(node)


# What computes nothing


def _input(node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _unless_changed(node: fx.Node) -> fx.Node | None:
    """The input, when shape and dtype are the same."""
    before, after = _input(node).meta["val"], node.meta["val"]
    return _input(node) if before.dtype == after.dtype and shape_of(before) == shape_of(after) else None


def _cast(node: fx.Node) -> fx.Node | None:
    """One spelling of casts; none where the dtype stays."""
    before, after = _input(node).meta["val"], node.meta["val"]
    if before.dtype == after.dtype:
        return _input(node)
    return insert(aten.to.dtype, (_input(node), after.dtype), like=node)


def _add_zero(node: fx.Node) -> fx.Node | None:
    neutral = 1 if node.target in (aten.mul.Tensor, aten.div.Tensor) else 0
    return _unless_changed(node) if isinstance(node.args[1], (int, float)) and node.args[1] == neutral else None


def _and(node: fx.Node) -> fx.Node:
    """One spelling of "and"; a mask of ones leaves the other as it is."""
    left, right = node.args
    for ones, other in ((left, right), (right, left)):
        if (
            isinstance(other, fx.Node)
            and _is_all_true(ones)
            and shape_of(other.meta["val"]) == shape_of(node.meta["val"])
        ):
            return other
    return insert(aten.bitwise_and.Tensor, (left, right), like=node)


def _is_all_true(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.ones.default and node.meta["val"].dtype == torch.bool


def _detach(node: fx.Node) -> fx.Node | None:
    """One spelling."""
    return insert(aten.detach.default, node.args, like=node) if node.target is aten.detach_.default else None


def _drop_needless_detaches(graph: fx.Graph) -> None:
    learning = with_gradient(graph)
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.detach_.default) and _input(node) not in learning:
            node.replace_all_uses_with(_input(node))
            graph.erase_node(node)


def _drop_empty_parts(node: fx.Node) -> fx.Node | None:
    parts = [part for part in node.args[0] if shape_of(part.meta["val"]) != (0,)]  # type: ignore[union-attr]
    if len(parts) == 1:
        return parts[0]  # type: ignore[return-value]
    node.args = (parts, *node.args[1:])
    return None


# Masks


def _prove_mask(node: fx.Node, constants: Mapping[fx.Node, torch.Tensor]) -> None:
    """Replace an explicit causal mask by is_causal=True, which costs no memory and keeps the fast kernel."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node) or not is_causal(mask, constants):
        return
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("attn_mask", "dropout_p")}
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    node.args = (*node.args[:3], None, dropout) if dropout else node.args[:3]
    node.kwargs = {**kwargs, "is_causal": True}


def _sink_expand(node: fx.Node) -> None:
    """Let users that broadcast by themselves read the value before it was expanded."""
    for user in list(node.users):
        if user.target is aten.scaled_dot_product_attention.default:
            broadcasts = node in (user.args[3:4] or (user.kwargs.get("attn_mask"),))
        elif isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags:
            shapes = [
                (_input(node) if n is node else n).meta["val"].shape
                for n in user.all_input_nodes
                if isinstance(n.meta.get("val"), torch.Tensor)
            ]
            broadcasts = shape_of(torch.empty(torch.broadcast_shapes(*shapes), device="meta")) == shape_of(
                user.meta["val"]
            ) if all(static(s) for shape in shapes for s in shape) else _covers(shapes, user.meta["val"])  # fmt: skip
        else:
            broadcasts = False
        if broadcasts:
            user.replace_input_with(node, _input(node))


def _covers(shapes: list[torch.Size], result: torch.Tensor) -> bool:
    """Whether broadcasting symbolic ``shapes`` gives the shape of ``result``: some operand has every size of it."""
    wanted = shape_of(result)
    for dim in range(1, len(wanted) + 1):
        sizes = {shape_of(shape)[-dim] for shape in shapes if len(shape) >= dim}
        if wanted[-dim] not in sizes:
            return False
    return True


# Dtypes


def _promote(graph: fx.Graph) -> None:
    """Integers that meet numbers, and tensors of numbers, have torch's default dtype, which a program does not have
    from its model: in float64 they are cast, or made so.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        is_operator = isinstance(node.target, torch._ops.OpOverload)
        if not is_operator or not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
            continue
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if not tensors and any(argument.name == "dtype" for argument in node.target._schema.arguments):
            node.kwargs = {**node.kwargs, "dtype": value.dtype}
        if torch.Tag.pointwise not in node.target.tags or node.target is aten.where.Scalar:
            continue
        if any(n.meta["val"].is_floating_point() or n.meta["val"].is_complex() for n in tensors):
            continue
        for tensor in tensors:
            node.replace_input_with(tensor, insert(aten.to.dtype, (tensor, value.dtype), like=node))


# Common subexpressions


def _share(graph: fx.Graph) -> None:
    """Compute once what the same module computes twice from the same values."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_writer(node):
            continue
        scope = tuple(path for path, _ in node.meta.get("nn_module_stack", {}).values())
        key = repr((str(node.target), map_arg((node.args, dict(node.kwargs)), lambda n: _Name(n.name)), scope))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen.setdefault(key, node)


class _Name(str):
    """A node's name inside a key; shown without quotes, so that no string argument looks like it."""

    def __repr__(self) -> str:
        return f"%{self}"


_REWRITES: dict[Any, Rewrite] = {
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten._to_copy.default: _cast,
    aten.type_as.default: _cast,
    aten.contiguous.default: _input,
    aten.clone.default: _input,
    aten.alias.default: _input,
    aten.lift_fresh_copy.default: _input,
    aten.detach_.default: _detach,
    aten.slice.Tensor: _unless_changed,
    aten.expand.default: _unless_changed,
    aten.__and__.Tensor: _and,
    aten.bitwise_and.Tensor: _and,
    aten.__or__.Tensor: lambda node: insert(aten.bitwise_or.Tensor, node.args, like=node),
    aten._unsafe_index.Tensor: lambda node: insert(aten.index.Tensor, node.args, like=node),
    aten.view.default: _unless_changed,
    aten.reshape.default: _unless_changed,
    aten.add.Tensor: _add_zero,
    aten.sub.Tensor: _add_zero,
    aten.mul.Tensor: _add_zero,
    aten.div.Tensor: _add_zero,
}
