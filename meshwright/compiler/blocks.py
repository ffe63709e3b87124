"""Blocks: the repeated structure of a model, found by module paths and compared node by node.

Afterwards the main function calls each instance as one node, and all work on the inside is done once per distinct
block.
"""

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from meshwright.compiler.frames import module_stack
from meshwright.compiler.graph import Block, Capture, Function
from meshwright.compiler.plan import Plan
from meshwright.compiler.written import writes

MIN_OPERATORS = 3
"""Smaller repeated modules (a lone activation in a Sequential) read better inline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The model as a main function that calls instances of distinct blocks."""

    main: Function
    blocks: tuple[Block, ...]

    def of(self, instance: str) -> Block:
        """The block that an instance is of."""
        return next(block for block in self.blocks if instance in block.instances)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instance:
    path: str
    class_name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find_blocks(capture: Capture, plan: Plan, parted: frozenset[str] = frozenset()) -> Blocks:
    """Find the outermost repeated modules of ``capture``.

    Instances whose parameters are pinned differently by ``plan`` are different blocks. ``parted`` names modules that
    must
    not become blocks because a stage begins inside them.
    """
    function = capture.function
    groups: dict[Any, list[_Instance]] = {}
    inside: dict[str, list[fx.Node]] = {}
    for node in function.graph.nodes:
        for path, _ in module_stack(node) if node.op == "call_function" else ():
            inside.setdefault(path, []).append(node)
    for path, class_name in _candidates(function):
        if path in parted or any(name.startswith(f"{path}.") for name in parted):
            continue
        instance = _instance(function, path, class_name, inside[path])
        if instance is not None:
            groups.setdefault(_signature(function, capture, plan, instance), []).append(instance)
    repeated = _without_circles(function, [group for group in groups.values() if len(group) > 1])
    names = _unique([group[0].class_name for group in repeated])
    blocks = tuple(
        Block(name=name, instances=tuple(i.path for i in group), function=_inside(function, group[0]))
        for name, group in zip(names, repeated, strict=True)
    )
    main = _outside(function, {i.path: i for group in repeated for i in group})
    return Blocks(main=main, blocks=blocks)


def _candidates(function: Function) -> list[tuple[str, str]]:
    """The outermost modules in numbered lists, with their class names, in order of first use."""
    found: dict[str, str] = {}
    for node in function.graph.nodes:
        for path, class_name in module_stack(node):
            if re.search(r"\.\d+$|^\d+$", path):
                found.setdefault(path, class_name)
                break
    return list(found.items())


def _instance(function: Function, path: str, class_name: str, inside: list[fx.Node]) -> _Instance | None:
    """The nodes of one module as a piece that can be cut out; None if it is small, interleaved with others, or writes
    to a buffer that others use too.
    """
    members = set(inside)
    attributes = [
        node
        for node in function.graph.nodes
        if node.op == "get_attr"
        and node.users
        and set(node.users) <= members
        and str(node.target).startswith(f"{path}.")
    ]
    if len(inside) < MIN_OPERATORS or not attributes:
        return None
    outside_after: set[fx.Node] = set()
    for node in function.graph.nodes:
        if node in members:
            if any(n in outside_after for n in node.all_input_nodes):
                return None
        elif any(n in members or n in outside_after for n in node.all_input_nodes):
            outside_after.add(node)
    own = {*members, *attributes}
    inputs = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in own)
    if any(buffer not in own for node in inside for buffer in writes(node)):
        return None
    outputs = tuple(node for node in inside if any(user not in members for user in node.users))
    if any(node not in function.values for node in (*inputs, *outputs)):
        return None
    return _Instance(
        path=path, class_name=class_name, nodes=(*attributes, *inside), inputs=tuple(inputs), outputs=outputs
    )


def _without_circles(function: Function, groups: list[list[_Instance]]) -> list[list[_Instance]]:
    """The groups whose instances can be called one after the other; in a circle each would wait for the next."""
    while True:
        owner: dict[fx.Node, Any] = {n: instance.path for group in groups for instance in group for n in instance.nodes}
        order: TopologicalSorter[Any] = TopologicalSorter()
        for node in function.graph.nodes:
            unit = owner.get(node, node)
            order.add(unit, *(other for n in node.all_input_nodes if (other := owner.get(n, n)) != unit))
        try:
            order.prepare()
        except CycleError as error:
            circle = set(error.args[1])
            groups = [group for group in groups if circle.isdisjoint(instance.path for instance in group)]
        else:
            return groups


def _signature(function: Function, capture: Capture, plan: Plan, instance: _Instance) -> Any:
    """Equal for instances that compute the same from their inputs and parameters."""
    number = {node: f"%{i}" for i, node in enumerate((*instance.inputs, *instance.nodes))}
    lines: list[Any] = [instance.class_name]
    for node in instance.inputs:
        value = function.values[node]
        lines.append((value.shape, value.dtype, value.grad, value.made_of))
    for node in instance.nodes:
        found = function.values.get(node)
        kind = (found.shape, found.dtype, found.grad) if found else None
        if node.op == "get_attr":
            name = str(node.target)
            names = (name, *(capture.parameters[name].aliases if name in capture.parameters else ()))
            pinned = tuple(plan.pinned(names, axis) for axis in ("dp", "tp"))
            lines.append((name.removeprefix(instance.path), kind, pinned))
        else:
            arguments = map_aggregate(
                (node.args, dict(node.kwargs)), lambda a: number.get(a, a) if isinstance(a, fx.Node) else a
            )
            lines.append((str(node.target), repr(arguments), kind))
    lines.append(tuple(number[node] for node in instance.outputs))
    return repr(lines)


def _unique(names: list[str]) -> list[str]:
    """Class names made unique by numbering those that occur again."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}{seen[name]}")
    return result


def _inside(function: Function, instance: _Instance) -> Function:
    """The function of a block, from its first instance; attributes are relative to it."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in instance.inputs:
        copies[node] = graph.create_node("placeholder", node.name, name=node.name)
    for node in instance.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "get_attr":
            copies[node].target = str(node.target).removeprefix(f"{instance.path}.")
    graph.output(tuple(copies[node] for node in instance.outputs))
    return _tables(function, graph, copies)


def _outside(function: Function, instances: Mapping[str, _Instance]) -> Function:
    """The main function: every instance becomes one call, placed at its first node."""
    owner = {node: instance for instance in instances.values() for node in instance.nodes}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    called: set[str] = set()

    def call(instance: _Instance) -> None:
        called.add(instance.path)
        for node in instance.inputs:
            visit(node)
        node = graph.call_module(instance.path, tuple(copies[n] for n in instance.inputs))
        node.meta = {k: v for k, v in instance.nodes[-1].meta.items() if k == "nn_module_stack"}
        if len(instance.outputs) == 1:
            copies[instance.outputs[0]] = node
            return
        for i, output in enumerate(instance.outputs):
            copies[output] = graph.call_function(operator.getitem, (node, i))
            copies[output].meta = dict(output.meta)

    def visit(node: fx.Node) -> None:
        if node in copies:
            return
        instance = owner.get(node)
        if instance is not None:
            if instance.path not in called:
                call(instance)
            return
        for used in node.all_input_nodes:
            visit(used)
        copies[node] = graph.node_copy(node, lambda n: copies[n])

    for node in function.graph.nodes:
        if not (node in owner and node.op == "get_attr"):
            visit(node)
    return _tables(function, graph, copies)


def _tables(function: Function, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> Function:
    """The tables of ``function`` for the copies of its nodes."""
    result = Function(
        graph=graph,
        values=_of_copies(function.values, copies.items()),
        origins=_of_copies(function.origins, copies.items()),
    )
    result.verify()
    return result


def _of_copies(table: Mapping[fx.Node, Any], copies: Iterable[tuple[fx.Node, fx.Node]]) -> dict[fx.Node, Any]:
    return {copy: table[node] for node, copy in copies if node in table}
