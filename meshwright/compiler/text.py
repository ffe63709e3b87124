"""The text form of functions and of what is made of them: one aligned line per node, the same for the same program.

A line has a node's name, what it computes, and of its value the shape over the global batch, the dtype, what it is made
of ("grad" where a gradient flows to it) and its type on every axis that has one:

    x          input                           (B, 8)  float32  inputs           dp S(0)  tp I
    up_weight  up.weight                       (8, 8)  float32  parameters grad  dp R     tp S(0)
    linear     aten.linear(shared, up_weight)  (B, 8)  float32  data grad        dp S(0)  tp S(1)
               output linear
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.program import Edge, Stage

_PLAIN = ("placeholder", "get_attr")


def function_text(function: Function, before: Mapping[fx.Node, str] | None = None) -> str:
    """All nodes of a function. ``before``: a text for the front of each line; nodes that it lacks are left out."""
    nodes = [node for node in function.graph.nodes if before is None or node in before]
    axes = tuple(
        dict.fromkeys(axis for node in nodes if node in function.values for axis in function.values[node].types)
    )
    front = {node: () for node in nodes} if before is None else {node: (before[node],) for node in nodes}
    return aligned((*front[node], *_cells(node, function.values.get(node), axes)) for node in nodes)


def blocks_text(blocks: Blocks) -> str:
    """The main function, then every block under its name and its instances."""
    parts = [f"main\n{function_text(blocks.main)}"]
    parts += [f"{block.name}: {', '.join(block.instances)}\n{function_text(block.function)}" for block in blocks.blocks]
    return "\n\n".join(parts)


def stage_text(stage: Stage) -> str:
    """What a stage reads, receives and sends, what it prepares once per step, and its function."""
    lines = [f"stage {stage.index}"]
    lines += [f"inputs {', '.join(stage.inputs)}"] if stage.inputs else []
    lines += [f"receives {_edge(edge)}" for edge in stage.receives]
    lines += [f"sends {_edge(edge)}" for edge in stage.sends]
    lines.append(function_text(stage.function))
    if stage.prepare is not None:
        lines += [f"prepares {', '.join(stage.prepares)}", function_text(stage.prepare)]
    return "\n".join(lines)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as lines of columns; the last cell of a row is not padded."""
    rows = [tuple(row) for row in rows]
    num_columns = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(num_columns)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def _edge(edge: Edge) -> str:
    return f"{edge.name}: {edge.source} -> {', '.join(str(stage) for stage in edge.destinations)}"


def _cells(node: fx.Node, value: Value | None, axes: tuple[str, ...]) -> tuple[str, ...]:
    name = "" if node.op == "output" else node.name
    if value is None:
        return (name, _computes(node))
    sizes = [str(size) for size in value.shape]
    shape = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
    made_of = f"{value.made_of} grad" if value.grad else value.made_of
    types = (f"{axis} {value.types[axis]}" if axis in value.types else "" for axis in axes)
    return (name, _computes(node), shape, str(value.dtype).removeprefix("torch."), made_of, *types)


def _computes(node: fx.Node) -> str:
    if node.op == "output":
        return f"output {', '.join(str(result) for result in node.args[0])}"  # type: ignore[union-attr]
    if node.op in _PLAIN:
        return "input" if node.op == "placeholder" else str(node.target)
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(argument)}" for key, argument in node.kwargs.items()]
    return f"{_callee(node.target)}({', '.join(arguments)})"


def _callee(target: Any) -> str:
    """``aten.linear`` without its overload, a function by its name, an instance by its path."""
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return target if isinstance(target, str) else target.__name__


def _argument(argument: Any) -> str:
    return repr(map_aggregate(argument, lambda leaf: _Bare(str(leaf)) if isinstance(leaf, fx.Node) else leaf))


class _Bare(str):
    """A node's name inside a list of arguments: shown without quotes."""

    def __repr__(self) -> str:
        return str(self)
