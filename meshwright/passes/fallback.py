"""Operators that no rule knows run whole: what that costs, and what to do about it."""

from collections.abc import Mapping

import sympy
from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.types import I
from meshwright.passes.cost import conversion_volumes
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import factors_by_node, operands, results
from meshwright.passes.rules import Rules, a_rule_for


def without_rule(
    typed: Blocks, rules: Rules, mesh: Mapping[str, int], symbols: Mapping[sympy.Symbol, int]
) -> tuple[str, ...]:
    """A message for each operator that no rule knows and that the mesh could have split: where it stands, what making
    its operands whole and cutting its results again sends per step and rank, and the line that would add a rule.

    typed: the blocks with their conversions. mesh: the sizes of the axes. symbols: the sizes of the example.
    """
    axes = {axis: size for axis, size in mesh.items() if axis != "pp" and size > 1}
    if not axes:
        return ()
    times = {block.name: len(block.instances) for block in typed.blocks}
    functions = {"": typed.main, **{block.name: block.function for block in typed.blocks}}
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for name, function in functions.items():
        for node, factors in factors_by_node(function, rules).items():
            outcome = results(function, node)
            if factors is not None or not outcome or not operands(node):
                continue
            if function.values[outcome[0]].made_of == "inputs":
                continue  # computed by everyone, and sent by nobody
            count = times.get(name, 1)
            forward, backward = _sent(function, node, axes, symbols)
            key = str(node.target), function.place(node)
            before = found.get(key, (0.0, 0.0))
            found[key] = before[0] + count * forward, before[1] + count * backward
    return tuple(_message(*key, *sent) for key, sent in found.items())


def _message(target: str, place: str, forward: float, backward: float) -> str:
    return (
        f"{target} {place} has no rule and runs whole: {forward + backward:,.0f} bytes per step and rank, "
        f"{forward:,.0f} forward and {backward:,.0f} backward\n"
        f"  {a_rule_for(target)}"
    )


def _sent(
    function: Function, node: fx.Node, axes: Mapping[str, int], symbols: Mapping[sympy.Symbol, int]
) -> tuple[float, float]:
    """The bytes that a rank sends forward and backward for the conversions next to an operator."""
    around: dict[fx.Node, None] = {}
    for operand in operands(node):
        while conversion_of(operand):
            around.setdefault(operand)
            operand = operand.all_input_nodes[0]
    following = list(results(function, node))
    while following:
        conversions = [user for user in following.pop().users if conversion_of(user)]
        around |= dict.fromkeys(conversions)
        following += conversions
    forward = backward = 0.0
    for conversion in around:
        axis, source = str(conversion.args[1]), function.values[conversion.all_input_nodes[0]]
        if axis in axes:
            types = source.types.get(axis, I), function.values[conversion].types.get(axis, I)
            num_bytes = _bytes(source, {a: n for a, n in axes.items() if a != axis}, symbols)
            sent = conversion_volumes(num_bytes, source.grad, *types, axes[axis])
            forward, backward = forward + sent[0], backward + sent[1]
    return forward, backward


def _bytes(value: Value, others: Mapping[str, int], symbols: Mapping[sympy.Symbol, int]) -> float:
    """Bytes of the piece of a value that the other axes leave, of all microbatches, at the example's sizes."""
    num_bytes = float(value.dtype.itemsize)
    for size in value.shape:
        num_bytes *= size if isinstance(size, int) else int(size.subs(symbols))
    for axis, pieces in others.items():
        if value.types.get(axis, I).is_split:
            num_bytes /= pieces
    return num_bytes
