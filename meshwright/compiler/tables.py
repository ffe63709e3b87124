"""From torch.export's graph to a Function: named attributes, symbolic sizes among the arguments, a Value per tensor."""

from collections.abc import Mapping, Set
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from meshwright.compiler.graph import Function, Segment, Value
from meshwright.compiler.names import origins
from meshwright.compiler.types import Size
from meshwright.runtime.random import rand_like, randn_like

WITHOUT_GRADIENT = {torch.ops.aten.detach.default, rand_like, randn_like}
"""What no gradient flows through, whatever it reads."""


def function_of(
    graph: fx.Graph,
    renaming: Mapping[sympy.Symbol, sympy.Symbol],
    inputs: Mapping[fx.Node, str],
    attributes: Mapping[fx.Node, str],
    trainable: Mapping[str, bool],
    segments: Mapping[str, tuple[str, Segment]],
    sites: Set[str] = frozenset(),
) -> Function:
    """Copy a normalized graph with symbols renamed; sizes become arguments instead of nodes; what is unused is left
    out.
    """
    result = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    values: dict[fx.Node, Value] = {}
    reads_inputs: dict[fx.Node, bool] = {}
    reads_parameters: dict[fx.Node, bool] = {}

    def size(expression: Any) -> Size:
        return simplify(expression, renaming)

    def argument(given: Any) -> Any:
        if isinstance(given, torch.SymInt):
            return size(given.node.expr)
        return copies[given] if isinstance(given, fx.Node) else given

    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, int)) and node.op == "call_function" and not isinstance(val, bool):
            copies[node] = size(val.node.expr) if isinstance(val, torch.SymInt) else val
            continue
        if node.op == "placeholder" and node not in inputs and node not in attributes:
            continue
        if node.op == "get_attr" and str(node.target) not in segments and str(node.target) not in sites:
            continue
        if node.op == "output":
            result.output(tuple(copies[n] for n in node.args[0]))
            continue
        if node in attributes and not node.users:
            continue
        if node in inputs:
            copy = result.create_node("placeholder", inputs[node], name=inputs[node])
        elif node in attributes or node.op == "get_attr":
            copy = result.create_node("get_attr", attributes.get(node, str(node.target)))
        else:
            arguments = map_aggregate((node.args, dict(node.kwargs)), argument)
            copy = result.create_node("call_function", node.target, *arguments)
        copy.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "name")}
        copies[node] = copy
        sources = copy.all_input_nodes
        name = str(copy.target)
        parameter = segments[name][0] if name in segments else name
        reads_inputs[copy] = node in inputs or any(reads_inputs[n] for n in sources)
        is_parameter = copy.op == "get_attr" and parameter in trainable
        learns = is_parameter and trainable[parameter]
        reads_parameters[copy] = is_parameter or any(reads_parameters[n] for n in sources)
        if isinstance(val, torch.Tensor):
            flows = learns or any(_gradient(values, n) for n in sources)
            values[copy] = Value(
                shape=tuple(size(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in val.shape),
                dtype=val.dtype,
                grad=flows and (val.is_floating_point() or val.is_complex()) and copy.target not in WITHOUT_GRADIENT,
                made_of="inputs" if not reads_parameters[copy] else "data" if reads_inputs[copy] else "parameters",
            )
    function = Function(graph=result, values=values, origins=origins(result))
    function.verify()
    return function


def _gradient(values: Mapping[fx.Node, Value], node: fx.Node) -> bool:
    if node in values:
        return values[node].grad
    return node.op == "call_function" and any(_gradient(values, n) for n in node.all_input_nodes)


def simplify(expression: Any, renaming: Mapping[sympy.Symbol, sympy.Symbol]) -> Size:
    """A size with our symbols: an int, or a sympy expression."""
    if isinstance(expression, sympy.Expr):
        expression = expression.xreplace(dict(renaming))
        return int(expression) if expression.is_number else expression
    return int(expression)
