"""Small tools for rewriting torch.export's graphs, whose nodes carry fake tensors in ``meta["val"]``."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from meshwright.compiler.frames import frames

aten = torch.ops.aten


def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: fx.Node) -> fx.Node:
    """A new node before ``like``, with the source of ``like`` and a fake value of its own."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target)
    node.args, node.kwargs = args, kwargs or {}  # by themselves: create_node warns of plain sizes, which run nowhere
    node.meta.update({key: value for key, value in like.meta.items() if key in ("stack_trace", "nn_module_stack")})
    values = map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    given = [n.meta.get("val") for n in (*node.all_input_nodes, like)]
    modes = [value.fake_mode for value in given if isinstance(value, FakeTensor)]
    with modes[0]:
        node.meta["val"] = target(*values[0], **values[1])
    return node


def shape_of(value: Any) -> tuple[Any, ...]:
    """The sizes of a fake tensor or shape as ints and sympy expressions, which compare without guards."""
    shape = value.shape if isinstance(value, torch.Tensor) else value
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in shape)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by the names of its schema, defaults included."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    return {argument.name: argument.default_value for argument in arguments} | given | dict(node.kwargs)


def with_gradient(graph: fx.Graph) -> set[fx.Node]:
    """The values that a gradient may flow to: what floats and depends on a parameter, not through a detach.

    torch.export's own values do not tell. Memory is taken as a whole: what is written to one view counts for all.
    """
    found: set[fx.Node] = set()
    storages: set[int] = set()
    before = -1
    while before != len(found) + len(storages):
        before = len(found) + len(storages)
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                flows = isinstance(value, torch.Tensor) and value.requires_grad
            elif node.target in (aten.detach.default, aten.detach_.default):
                continue
            else:
                flows = any(source in found for source in node.all_input_nodes)
            if isinstance(value, torch.Tensor):
                flows = flows and (value.is_floating_point() or value.is_complex())
                memory = storage_of(node)
                writes = is_in_place(node) and memory is not None
                if flows and writes:
                    storages.add(memory)  # type: ignore[arg-type]
                flows = flows or memory in storages
            if flows:
                found.add(node)
    return found


def storage_of(node: Any) -> int | None:
    """The memory of a value, by which views of one another are known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return StorageWeakRef(value.untyped_storage()).cdata if isinstance(value, torch.Tensor) else None


def is_in_place(node: fx.Node) -> bool:
    """Whether an operator changes its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    return first is not None and first.is_write and node.target is not aten.detach_.default


def writes_elsewhere(node: fx.Node) -> bool:
    """Whether an operator changes an argument behind its first, as with ``out=``."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    rest = node.target._schema.arguments[1:]
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in rest)


def static(size: Any) -> bool:
    """Whether a size is a plain number."""
    return not isinstance(size, torch.SymInt)


def place(node: fx.Node) -> str:
    """Where in the user's source a node comes from, for messages."""
    found = frames(node)
    return f"at {found[-1].file.rsplit('/', 1)[-1]}:{found[-1].line}" if found else "in the model"
