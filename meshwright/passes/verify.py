"""Verify: the types of a program checked anew, operator by operator, apart from the solver that chose them."""

from functools import partial

from torch import fx

from meshwright.compiler.errors import InternalError, PlanError
from meshwright.compiler.graph import Function
from meshwright.compiler.plan import SCHEDULES
from meshwright.compiler.program import Lowered
from meshwright.compiler.types import I, R, Type
from meshwright.passes.cost import is_conversion
from meshwright.passes.prove import prove
from meshwright.passes.reshard import conversion, conversion_of
from meshwright.passes.rows import factors_by_node, operands, results, rows_of
from meshwright.passes.rules import Rules
from meshwright.runtime.actions import forwards


def verify(lowered: Lowered, rules: Rules) -> None:
    """Prove types and schedule. Raises InternalError with the node or the action that does not fit, PlanError for an
    action of a user's own schedule.
    """
    sizes = {axis: size for axis, size in lowered.mesh.axes if axis != "pp" and size > 1}
    blocks = {block.name: block for block in lowered.blocks.values()}
    for stage in lowered.stages:
        _check(stage.function, sizes, rules, f"stage {stage.index}")
    for block in blocks.values():
        _check(block.function, sizes, rules, block.name)
    for stage in lowered.stages:
        for node in stage.function.graph.nodes:
            if node.op == "call_module":
                _check_call(stage.function, node, lowered.blocks[str(node.target)].function, sizes)
    edges = [(e.source, d, e.value.grad) for stage in lowered.stages for e in stage.sends for d in e.destinations]
    step, own = lowered.step, isinstance(lowered.plan.schedule, str) and lowered.step.name in SCHEDULES
    proven = partial(
        prove,
        num_microbatches=lowered.microbatches,
        edges=edges,
        placement=step.placement,
        ascending=own,
        error=InternalError if own else PlanError,
    )
    proven(step.rows, peaks=step.peaks)
    proven(list(map(forwards, step.rows)), forward_only=True)


def _check(function: Function, sizes: dict[str, int], rules: Rules, where: str) -> None:
    """Every operator's types on every axis are a row of its rule; every conversion is one of the table."""
    factors = factors_by_node(function, rules)
    values = function.values
    for node in function.graph.nodes:
        if node.op != "call_function":
            continue
        converted = conversion_of(node)
        if converted is not None:
            axis, _ = converted
            before, after = _of(function, node.args[0], axis), _of(function, node, axis)
            value, size = values[node], sizes.get(axis, 1)
            made = conversion(value, before, after, size) if is_conversion(before, after) else None
            if (node.target, node.kwargs) != made:
                raise InternalError(f"{where}: {node.format_node()} converts {before} to {after} on {axis}")
            continue
        outs = results(function, node)
        if node not in factors or not outs or outs[0] not in values:
            continue
        told: set[str] = set()
        for axis, size in sizes.items():
            ins = tuple(_of(function, n, axis) for n in operands(node))
            got = tuple(_of(function, n, axis) for n in outs)
            found = {n: {t for t in [_of(function, n, axis)] if t.is_split} for n in values}
            rows = rows_of(function, node, factors[node], found, set(outs), size)
            fitting = [r for r in rows if _same(r.operands, ins, function, operands(node)) and r.results == got]
            told |= {axis for row in fitting if row.synchronized}
            if not fitting:
                have = ", ".join(str(t) for t in ins)
                raise InternalError(
                    f"{where}: {node.format_node()} takes ({have}) and gives {', '.join(map(str, got))} on {axis}, "
                    "which its rule does not allow"
                )
        if told != set(node.kwargs.get("over", ())):
            raise InternalError(f"{where}: {node.format_node()} has to synchronize over {', '.join(told) or 'no axis'}")


def _of(function: Function, node: fx.Node, axis: str) -> Type:
    return function.values[node].types.get(axis, I)


def _same(row: tuple[Type, ...], have: tuple[Type, ...], function: Function, nodes: tuple[fx.Node, ...]) -> bool:
    """Equal, where without gradient R and I are the same."""
    return all(
        a == b or (not function.values[n].grad and {a, b} == {I, R}) for a, b, n in zip(row, have, nodes, strict=True)
    )


def _check_call(function: Function, node: fx.Node, block: Function, sizes: dict[str, int]) -> None:
    for outer, inner in zip(operands(node), block.inputs(), strict=True):
        for axis in sizes:
            if _of(function, outer, axis) != _of(block, inner, axis):
                raise InternalError(
                    f"{node.target} takes {inner.name} as {_of(block, inner, axis)} on {axis}, "
                    f"and is given {_of(function, outer, axis)}"
                )
