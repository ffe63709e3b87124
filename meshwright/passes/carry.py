"""The splits that values inherit from the batch, or the sequence: forward through the factors and the blocks."""

from collections.abc import Mapping

from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Function
from meshwright.compiler.types import S, Type
from meshwright.passes.axes import Axis
from meshwright.passes.factors import Factors
from meshwright.passes.rows import groups_of, operands, results

FactorTables = Mapping[str, Mapping[fx.Node, Factors | None]]
"""The factors of all operators, by the name of the block ("" is the main function)."""


def carried_splits(
    function: Function, axis: Axis, name: str, every: FactorTables, blocks: Blocks | None, given: Mapping[fx.Node, Type]
) -> dict[fx.Node, Type]:
    """The split of every value of ``function`` that has one. ``blocks``: for the main function, whose name is "".

    given: the types at the boundary of a block.
    """
    factors = every[name]
    carried: dict[fx.Node, Type] = {n: t for n, t in given.items() if t.is_split}
    for node in function.graph.nodes:
        if node.op == "placeholder" and blocks is not None and str(node.target) in axis.seeds:
            carried[node] = S(axis.seeds[str(node.target)])
        elif node.op == "call_module" and blocks is not None:
            block = blocks.of(str(node.target))
            inner = dict(zip(block.function.inputs(), operands(node), strict=True))
            start = {n: carried[outer] for n, outer in inner.items() if outer in carried}
            inside = _forward(block.function, every[block.name], start)
            for result, outer in zip(block.function.results(), results(function, node), strict=False):
                if result in inside:
                    carried[outer] = inside[result]
        else:
            _forward_node(function, node, factors.get(node), carried)
            if node in function.values and node not in carried:
                carried |= _as_long_as_seeds(function, axis, blocks, node)
    return carried


def _as_long_as_seeds(function: Function, axis: Axis, blocks: Blocks | None, node: fx.Node) -> dict[fx.Node, Type]:
    """The split of a value that the code makes as long as the batch, a mask of ones, say."""
    inputs = {str(n.target): function.values[n].shape for n in function.inputs()}
    sizes = {inputs[name][dim] for name, dim in axis.seeds.items() if name in inputs}
    shape = function.values[node].shape
    dims = [dim for dim, size in enumerate(shape) if not isinstance(size, int) and size in sizes]
    return {node: S(dims[0])} if dims and not axis.features and blocks is not None else {}


def _forward(
    function: Function, factors: Mapping[fx.Node, Factors | None], start: dict[fx.Node, Type]
) -> dict[fx.Node, Type]:
    carried = dict(start)
    for node in function.graph.nodes:
        _forward_node(function, node, factors.get(node), carried)
    return carried


def _forward_node(function: Function, node: fx.Node, factors: Factors | None, carried: dict[fx.Node, Type]) -> None:
    ins, outs = operands(node), results(function, node)
    for tensor, position in ((n, i) for i, n in enumerate(ins) if n in carried):
        for factor in factors.factors if factors is not None else ():
            inside = groups_of(factor, factor.operands[position], carried[tensor])
            if factor.whole or inside is None:
                continue
            for outer, place in zip(outs, factor.results, strict=True):
                if place is not None:
                    carried.setdefault(outer, place.split(inside))
        for outer in outs:
            if outer not in carried and (type_ := _alike(function, tensor, carried[tensor], outer)) is not None:
                carried[outer] = type_


def _alike(function: Function, source: fx.Node, type_: Type, result: fx.Node) -> Type | None:
    """Where no rule carries a split on, the result is split again along a dim of the same size, if it has one."""
    if source not in function.values or result not in function.values:
        return None
    size, shape = function.values[source].shape[type_.dim], function.values[result].shape
    same = [dim for dim, other in enumerate(shape) if other == size]
    if not same or type_.groups != 1:
        return None
    return S(type_.dim if type_.dim in same else same[0])
