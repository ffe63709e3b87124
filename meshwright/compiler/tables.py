"""From torch.export's graph to a Function: named attributes, symbolic sizes among the arguments, a Value per tensor."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._sympy.functions import FloatPow, FloatTrueDiv, FloorDiv, IntTrueDiv, ToFloat

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.graph import Function, Segment, Value
from meshwright.compiler.names import origins
from meshwright.compiler.rewriting import place
from meshwright.compiler.types import Size
from meshwright.runtime.random import rand_like, randn_like

aten = torch.ops.aten
WITHOUT_GRADIENT = {
    aten.detach.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, rand_like, randn_like,
}  # fmt: skip
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
        if isinstance(given, (torch.SymInt, torch.SymFloat)):
            return size(given.node.expr)
        return copies[given] if isinstance(given, fx.Node) else given

    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat, int, float)) and node.op == "call_function":
            copies[node] = argument(val)
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
            shape = tuple(size(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in val.shape)
            _check_known(node, shape, set(renaming.values()))
            values[copy] = Value(
                shape=shape,
                dtype=val.dtype,
                grad=flows and (val.is_floating_point() or val.is_complex()) and copy.target not in WITHOUT_GRADIENT,
                made_of="inputs" if not reads_parameters[copy] else "data" if reads_inputs[copy] else "parameters",
            )
    learning = _reached(result, values)
    for node in [node for node, value in values.items() if value.grad and node not in learning]:
        values[node] = replace(values[node], grad=False)
    function = Function(graph=result, values=values, origins=origins(result))
    function.verify()
    return function


def _check_known(node: fx.Node, shape: tuple[Size, ...], symbols: set[sympy.Symbol]) -> None:
    if any(isinstance(size, sympy.Expr) and size.free_symbols - symbols for size in shape):
        raise UnsupportedError(
            f"{node.target} {place(node)} gives a tensor whose size depends on the data, which no other rank knows\n"
            "  keep all elements and weight them, as in (x * mask).sum(), or read one place each: x.gather(dim, index)"
        )


def _reached(graph: fx.Graph, values: Mapping[fx.Node, Value]) -> set[fx.Node]:
    """What the loss sends a gradient to, and not only what depends on a parameter: a detach may be on the way."""
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in reached:
            reached.update(n for n in node.all_input_nodes if _gradient(values, n))
    return reached


def _gradient(values: Mapping[fx.Node, Value], node: fx.Node) -> bool:
    if node in values:
        return values[node].grad
    return node.op == "call_function" and any(_gradient(values, n) for n in node.all_input_nodes)


def simplify(expression: Any, renaming: Mapping[sympy.Symbol, sympy.Symbol]) -> Size:
    """A size, or a number computed from sizes, with our symbols: a plain number, or a sympy expression.

    Raises UnsupportedError for a number that plain arithmetic does not give.
    """
    if not isinstance(expression, sympy.Expr):
        return int(expression)
    expression = expression.xreplace(dict(renaming))
    for function, meaning in _ARITHMETIC.items():
        expression = expression.replace(function, meaning)
    if foreign := sorted(str(call.func) for call in expression.atoms(sympy.Function) if not call.is_integer):
        raise UnsupportedError(
            f"the model computes a number from its sizes with {', '.join(foreign)}, which is not supported\n"
            "  compute it from a tensor, or fix the size: give an example with one sample or a sequence of length 1"
        )
    if not expression.is_number:
        return expression
    return int(expression) if expression.is_integer else float(expression)


def _divided(size: Any, divisor: Any) -> Any:
    """``(B * T + T - 1) // T`` is B, as the number of runs of T that begin in B * T."""
    quotient, rest = sympy.div(size + 1 - divisor, divisor, *(divisor.free_symbols or size.free_symbols))
    whole = rest == 0 and all(factor.is_integer for factor in quotient.as_ordered_terms())
    return quotient if whole else FloorDiv(size, divisor)


_ARITHMETIC: Mapping[Any, Any] = {
    FloorDiv: _divided,
    ToFloat: lambda x: x,
    IntTrueDiv: lambda a, b: a / b,
    FloatTrueDiv: lambda a, b: a / b,
    FloatPow: lambda a, b: a**b,
}
"""What torch calls arithmetic otherwise than sympy."""
