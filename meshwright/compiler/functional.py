"""In-place operators as pure ones: who reads a value later reads what was written, through whatever view.

Values that share memory are versions of one base, the first value of its storage. An in-place operator makes a new
value of what it changes, writes it back through the views between that and the base, and so makes a new version;
later readers of the base get it, later readers of a view get the view taken again. (The functionalization of
functorch, on an exported graph and keeping its composite operators.)
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.rewriting import (
    arguments_of,
    aten,
    insert,
    is_in_place,
    place,
    shape_of,
    storage_of,
    with_gradient,
    writes_elsewhere,
)
from meshwright.compiler.written import detach_stored, new_store


def functionalize(graph: fx.Graph, held: Mapping[fx.Node, str], buffers: Set[fx.Node] = frozenset()) -> None:
    """Replace every in-place operator of ``graph`` and what is read after it.

    held: placeholders of parameters and buffers with their names. buffers: those of them that the model registered,
    whose last version is stored. Raises UnsupportedError for a write to another, through a view that cannot be taken
    back, or by an operator without a pure form; it names the line.
    """
    if not any(is_in_place(node) or writes_elsewhere(node) for node in graph.nodes):
        return
    memory = _Memory(held=held, buffers=buffers, learning=with_gradient(graph))
    for node in list(graph.nodes):
        first = node.args[0] if node.args else None
        if node.op in ("call_function", "output"):
            memory.refresh(node)
        if is_in_place(node):
            memory.write(node, first)  # type: ignore[arg-type]
        elif writes_elsewhere(node):
            raise UnsupportedError(
                f"{node.target} {place(node)} writes to an argument behind its first, which is not supported\n"
                "  write it without out="
            )
        else:
            memory.note(node, first)
    detach_stored(graph)


@dataclass(slots=True)
class _Memory:
    """Storages: the first value of each and how often it was written to; what each value was a view of, and is now."""

    held: Mapping[fx.Node, str]
    buffers: Set[fx.Node]
    learning: set[fx.Node]
    bases: dict[int, fx.Node] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    known: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    sources: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stored: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def note(self, node: fx.Node, first: Any) -> None:
        """A value that is new, or a view of its first argument."""
        storage = storage_of(node)
        if storage is None:
            return
        if self.bases.setdefault(storage, node) is not node and storage_of(first) == storage:
            self.sources[node] = first
        self.known[node, self.versions.setdefault(storage, 0)] = node

    def source(self, node: fx.Node) -> fx.Node:
        """What a view was taken of."""
        if node not in self.sources:
            raise UnsupportedError(f"{node.target} {place(node)} shares memory in a way that is not known")
        return self.sources[node]

    def refresh(self, node: fx.Node) -> None:
        """Let ``node`` read the newest version of everything."""
        for used in node.all_input_nodes:
            now = self.value(used, node)
            if now is not used:
                node.replace_input_with(used, now)

    def value(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """``node`` as it is when ``user`` runs."""
        storage = storage_of(node)
        if storage is None or not self.versions.get(storage):
            return node
        key = (node, self.versions[storage])
        if key not in self.known:
            arguments = (self.value(self.source(node), user), *node.args[1:])
            self.known[key] = _insert(node.target, arguments, dict(node.kwargs), user)
        return self.known[key]

    def write(self, node: fx.Node, changed: fx.Node) -> None:
        """Make the new version that an in-place operator leaves. Its arguments are the newest values already."""
        storage = storage_of(changed)
        assert storage is not None
        base = self.bases[storage]
        if base in self.held and base not in self.buffers:
            raise UnsupportedError(
                f"{_name(node)} {place(node)} writes to {self.held[base]!r}, which is no buffer of the model\n"
                "  forward may write to buffers: keep it with register_buffer"
            )
        result = _pure(node)
        written, view = result, changed
        while view is not base:
            source = self.source(view)
            back = _BACK.get(view.target)
            if back is None or (view.target is aten.detach.default and source in self.learning):
                raise UnsupportedError(
                    f"{_name(node)} {place(node)} writes through {view.target}, which cannot be taken back\n"
                    "  write it without the trailing underscore"
                )
            written = back(view, self.value(source, node), written, node)
            view = source
        self.versions[storage] += 1
        self.known[base, self.versions[storage]] = written
        self.known[changed, self.versions[storage]] = result
        if base in self.buffers:
            if base in self.stored:
                node.graph.erase_node(self.stored[base])
            self.stored[base] = new_store(base, written, node)
        # What the operator returns is what it changed.
        for user in list(node.users):
            user.replace_input_with(node, changed)
        node.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name.split("::")[1])  # type: ignore[union-attr]


def _insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
    return insert(target, args, kwargs, like=like)


# The pure form of an in-place operator: a value like the one that was changed


def _pure(node: fx.Node) -> fx.Node:
    name, overload = _name(node), node.target._overloadname  # type: ignore[union-attr]
    changed: fx.Node = node.args[0]  # type: ignore[assignment]
    result: fx.Node
    if name in _WRITES:
        result = _WRITES[name](node)
    else:
        pure_name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
        pure = getattr(getattr(aten, pure_name, None), overload, None)
        if pure is None or pure._schema.is_mutable:
            raise UnsupportedError(
                f"{name} {place(node)} has no form that leaves its input as it is\n"
                "  write it without the trailing underscore"
            )
        result = _insert(pure, node.args, dict(node.kwargs), node)
    before, after = changed.meta["val"], result.meta["val"]
    if shape_of(before) != shape_of(after):
        raise UnsupportedError(f"{name} {place(node)} changes the shape of its input in place, which is not supported")
    if before.dtype != after.dtype:
        result = _insert(aten.to.dtype, (result, before.dtype), {}, node)
    return result


def _copied(node: fx.Node) -> fx.Node:
    """The source in the dtype and shape of what it is copied to."""
    given = arguments_of(node)
    changed, source = given["self"].meta["val"], given["src"]
    assert isinstance(source, fx.Node)
    if source.meta["val"].dtype != changed.dtype:
        source = _insert(aten.to.dtype, (source, changed.dtype), {}, node)
    if shape_of(source.meta["val"]) == shape_of(changed):
        return source
    return _insert(aten.expand.default, (source, _sizes(given["self"])), {}, node)


def _filled(node: fx.Node) -> fx.Node:
    given = arguments_of(node)
    changed, value = given["self"], given.get("value", 0)
    if isinstance(value, fx.Node):
        cast = _insert(aten.to.dtype, (value, changed.meta["val"].dtype), {}, node)
        return _insert(aten.expand.default, (cast, _sizes(changed)), {}, node)
    return _insert(aten.full_like.default, (changed, value), {}, node)


def _diagonal_filled(node: fx.Node) -> fx.Node:
    """Of a matrix; of more dims, and of tall ones wrapped around, it is none of a pair of dims."""
    given = arguments_of(node)
    if given["wrap"] or given["self"].meta["val"].ndim != 2:
        raise UnsupportedError(
            f"fill_diagonal_ {place(node)} fills what is no diagonal of a matrix\n  write it with torch.where"
        )
    diagonal = _insert(aten.diagonal.default, (given["self"],), {}, node)
    filled = _insert(aten.full_like.default, (diagonal, given["fill_value"]), {}, node)
    return _insert(aten.diagonal_scatter.default, (given["self"], filled), {}, node)


def _bernoulli(node: fx.Node) -> fx.Node:
    given = arguments_of(node)
    target = aten.bernoulli.Tensor if isinstance(given["p"], fx.Node) else aten.bernoulli.p
    return _insert(target, (given["self"], given["p"]), {}, node)


def _normal(node: fx.Node) -> fx.Node:
    given = arguments_of(node)
    return _insert(aten.normal_functional.default, (given["self"], given["mean"], given["std"]), {}, node)


_WRITES: Mapping[str, Callable[[fx.Node], fx.Node]] = {
    "bernoulli_": _bernoulli,
    "copy_": _copied,
    "fill_": _filled,
    "fill_diagonal_": _diagonal_filled,
    "normal_": _normal,
    "zero_": _filled,
}
"""Operators whose pure form is called otherwise."""


# A view taken back: the value it is of, with the view's part replaced


def _sizes(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


Back = Callable[[fx.Node, fx.Node, fx.Node, fx.Node], fx.Node]
"""(view, what it is of, the view's new value, where) -> the new value of what it is of."""


def _reshaped(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    return _insert(aten.reshape.default, (part, _sizes(source)), {}, where)


def _unpermuted(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    dims: Any = view.args[1]
    order = [dim % len(dims) for dim in dims]
    return _insert(aten.permute.default, (part, [order.index(dim) for dim in range(len(order))]), {}, where)


def _again(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    return _insert(view.target, (part, *view.args[1:]), dict(view.kwargs), where)


def _sliced(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    """A slice of everything is replaced as a whole."""
    if shape_of(view.meta["val"]) == shape_of(source.meta["val"]):
        return part
    return _into(aten.slice_scatter.default)(view, source, part, where)


def _into(scatter: Any) -> Back:
    return lambda view, source, part, where: _insert(scatter, (source, part, *view.args[1:]), dict(view.kwargs), where)


def _itself(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    return part


def _narrowed(view: fx.Node, source: fx.Node, part: fx.Node, where: fx.Node) -> fx.Node:
    dim, start, length = view.args[1:]
    return _insert(aten.slice_scatter.default, (source, part, dim, start, start + length), {}, where)  # type: ignore[operator]


_BACK: Mapping[Any, Back] = {
    aten.diagonal.default: _into(aten.diagonal_scatter.default),
    aten.narrow.default: _narrowed,
    aten.select.int: _into(aten.select_scatter.default),
    aten.slice.Tensor: _sliced,
    aten.transpose.int: _again,
    aten.t.default: _again,
    aten.permute.default: _unpermuted,
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.view_as.default: _reshaped,
    aten.detach.default: _itself,
    aten.alias.default: _itself,
    aten.contiguous.default: _itself,
    aten.to.dtype: _itself,
    aten.to.device: _itself,
    aten.to.dtype_layout: _itself,
}
