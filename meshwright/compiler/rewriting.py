"""Small tools for rewriting torch.export's graphs, whose nodes carry fake tensors in ``meta["val"]``."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from meshwright.compiler.frames import frames

aten = torch.ops.aten


def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: fx.Node) -> fx.Node:
    """A new node before ``like``, with the source of ``like`` and a fake value of its own."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs or {})
    node.meta.update({key: value for key, value in like.meta.items() if key in ("stack_trace", "nn_module_stack")})
    values = map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    modes = [n.meta["val"].fake_mode for n in node.all_input_nodes if isinstance(n.meta.get("val"), FakeTensor)]
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


def static(size: Any) -> bool:
    """Whether a size is a plain number."""
    return not isinstance(size, torch.SymInt)


def place(node: fx.Node) -> str:
    """Where in the user's source a node comes from, for messages."""
    found = frames(node)
    return f"at {found[-1].file.rsplit('/', 1)[-1]}:{found[-1].line}" if found else "in the model"
