"""Reshard: the types become values of the graph, and the conversions between them become nodes.

A conversion is made once for all users that need it, right before the first of them; its name is that of the value.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Block, Function, Value
from meshwright.compiler.types import P, Type
from meshwright.compiler.written import ONCE_PER_STEP
from meshwright.passes.axes import Axis
from meshwright.passes.cost import is_conversion
from meshwright.passes.pieces import PIECES, Piece
from meshwright.passes.propagate import Typing
from meshwright.passes.rows import Row, operands, results, uneven
from meshwright.passes.solve import Choice
from meshwright.runtime.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    invariant_to_replicated,
    part_of_mean,
    reduce_scatter,
    replicated_to_partial,
    shard,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    axis: Axis
    choice: Choice

    @property
    def name(self) -> str:
        return self.axis.name

    @property
    def size(self) -> int:
        return self.axis.size


@dataclass(slots=True)
class Builder:
    """A function in the making: nodes with their values, types and origins."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    origins: dict[fx.Node, Any] = field(default_factory=dict)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        value: Value | None,
        origin: Any,
        like: fx.Node,
    ) -> fx.Node:
        """A new call with its value (None for what is no tensor) and the source of ``like``."""
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        if value is not None:
            self.values[node] = value
        if origin is not None:
            self.origins[node] = origin
        return node

    def function(self) -> Function:
        result = Function(graph=self.graph, values=self.values, origins=self.origins)
        result.verify()
        return result


def reshard(blocks: Blocks, typings: tuple[Typing, ...]) -> Blocks:
    """The same blocks with typed values and explicit conversions."""
    main = _Resharder(blocks.main, tuple(_Axis(axis=t.axis, choice=t.main) for t in typings)).run()
    inner = tuple(
        Block(
            name=block.name,
            instances=block.instances,
            function=_Resharder(
                block.function,
                tuple(_Axis(axis=t.axis, choice=t.blocks[block.name]) for t in typings),
            ).run(),
        )
        for block in blocks.blocks
    )
    return Blocks(main=main, blocks=inner)


class _Resharder:
    def __init__(self, function: Function, axes: tuple[_Axis, ...]):
        self.function, self.axes = function, axes
        self.builder = Builder()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.made: dict[tuple[fx.Node, tuple[Type, ...]], fx.Node] = {}

    def run(self) -> Function:
        for node in self.function.graph.nodes:
            if node.op == "output":
                needed = [tuple(self._final(n, axis) for axis in self.axes) for n in node.args[0]]
                found = [self._as(n, types, node) for n, types in zip(node.args[0], needed, strict=True)]
                self.builder.graph.output(tuple(found))
            else:
                self._copy(node)
        return self.builder.function()

    def _produced(self, node: fx.Node) -> tuple[Type, ...]:
        maker = node.all_input_nodes[0] if _is_getitem(node) else node
        position = results(self.function, maker).index(node)
        return tuple(axis.choice.rows[maker].results[position] for axis in self.axes)

    def _final(self, node: fx.Node, axis: _Axis) -> Type:
        """The type of a result: what it was made as, unless the choice converts it for the output."""
        return axis.choice.final[node]

    def _as(self, node: fx.Node, types: tuple[Type | None, ...], user: fx.Node) -> fx.Node:
        """``node`` with the given types (None: as it is), converted axis by axis along the chosen ways."""
        current = self._produced(node)
        for i, axis in enumerate(self.axes):
            way = [types[i] or current[i]]
            while way[-1] != current[i]:
                way.append(axis.choice.converted[node, way[-1]])
            for source, target in zip(way[::-1], way[-2::-1], strict=False):
                before, current = current, (*current[:i], target, *current[i + 1 :])
                if (node, current) not in self.made:
                    value = self.made.get((node, before), self.copies[node])
                    self.made[node, current] = self._convert(value, axis.name, source, target, user)
        return self.made.get((node, current), self.copies[node])

    def _convert(self, node: fx.Node, axis: str, source: Type, target: Type, user: fx.Node) -> fx.Node:
        before = self.builder.values[node]
        value = before.typed(axis, target)
        function, kwargs = conversion(before, source, target, next(a.size for a in self.axes if a.name == axis))
        origin, place = self.builder.origins.get(node), self.function.origins.get(user)
        if origin is not None and place is not None and source != P:
            # What is converted for a user stands in the user's section; a sum belongs to what it completes.
            origin = replace(origin, section=place.section, module_path=place.module_path, statement=place.statement)
        return self.builder.call(function, (node, axis), kwargs, value, origin, like=user)

    def _copy(self, node: fx.Node) -> None:
        if _is_getitem(node):
            types = dict(zip((axis.name for axis in self.axes), self._produced(node), strict=True))
            self._put(node, self.builder.graph.node_copy(node, lambda n: self.copies[n]), types)
            return
        rows = [axis.choice.rows[node] for axis in self.axes]
        converted = [
            self._as(n, tuple(None if row.as_is else row.operands[i] for row in rows), node)
            for i, n in enumerate(operands(node))
        ]
        pieces = [(axis.name, row.pieces) for axis, row in zip(self.axes, rows, strict=True) if row.pieces]
        outcome = results(self.function, node)
        types = {axis.name: row.results[0] for axis, row in zip(self.axes, rows, strict=True)} if outcome else {}
        queue = list(converted)
        if pieces:
            axis, name = pieces[0]
            value = self.function.values[node]
            copy = PIECES[name](
                Piece(
                    builder=self.builder, node=node, operands=tuple(queue), axis=axis, value=_typed(value, types),
                    size=next(a.size for a in self.axes if a.name == axis), origin=self.function.origins.get(node),
                )
            )  # fmt: skip
        else:
            arguments = fx.node.map_aggregate(
                (node.args, dict(node.kwargs)), lambda a: queue.pop(0) if isinstance(a, fx.Node) else a
            )
            copy = self.builder.graph.create_node(node.op, node.target, *arguments, name=node.name)
            copy.kwargs = {**copy.kwargs, **self._options(node, rows)}
            copy.meta = dict(node.meta)
        means = [axis.name for axis, row in zip(self.axes, rows, strict=True) if row.mean]
        self._put(node, copy, types)
        if means:
            part = self.builder.call(part_of_mean, (copy, *means), None, None, None, like=node)
            self._put(node, part, types)

    def _options(self, node: fx.Node, rows: Sequence[Row]) -> dict[str, Any]:
        """What an operator is told of the axes: those that it synchronizes over, that it writes once per step."""
        over = [a.name for a, row in zip(self.axes, rows, strict=True) if row.synchronized and not a.axis.in_time]
        once = any(a.axis.in_time and not a.axis.by_microbatch for a in self.axes)
        told = ONCE_PER_STEP.get(node.target, {}) if once else {}
        return {**told, **({"over": tuple(over)} if over else {})}

    def _put(self, node: fx.Node, copy: fx.Node, types: Mapping[str, Type]) -> None:
        self.copies[node] = copy
        if node in self.function.values:
            self.builder.values[copy] = _typed(self.function.values[node], types)
        if node in self.function.origins:
            self.builder.origins.setdefault(copy, self.function.origins[node])


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _typed(value: Value, types: Mapping[str, Type]) -> Value:
    for axis, type_ in types.items():
        value = value.typed(axis, type_)
    return value


_TARGETS: Mapping[Any, str] = {
    invariant_to_replicated: "R",
    all_reduce: "I",
    all_gather: "RI",
    reduce_scatter: "S",
    replicated_to_partial: "P",
    shard: "S",
    all_to_all: "S",
}


def conversion_of(node: fx.Node) -> tuple[str, str] | None:
    """The axis of a conversion and the kinds of type that it can give, or None for another node."""
    return (str(node.args[1]), _TARGETS[node.target]) if node.target in _TARGETS else None


def conversion(value: Value, source: Type, target: Type, pieces: int) -> tuple[Any, dict[str, Any]]:
    """The runtime function of a conversion of ``value`` on an axis of ``pieces`` ranks and its keyword arguments beside
    the axis. Raises KeyError for none.
    """

    def split(type_: Type) -> dict[str, Any]:
        size = uneven(value, type_, pieces)
        return (
            {"dim": type_.dim}
            | ({"groups": type_.groups} if type_.groups != 1 else {})
            | ({"size": size} if size is not None else {})
        )

    if not is_conversion(source, target):
        raise KeyError(f"{source} -> {target} is no conversion")
    match source.kind, target.kind:
        case "I", "R":
            return invariant_to_replicated, {}
        case "R", "P":
            return replicated_to_partial, {}
        case "P", "I":
            return all_reduce, {}
        case "S", ("R" | "I"):
            return all_gather, split(source) | {"to": target.kind}
        case (("I" | "R"), "S"):
            return shard, split(target) | {"of": source.kind}
        case "P", "S":
            return reduce_scatter, split(target)
    return all_to_all, {"split_dim": target.dim, "concat_dim": source.dim}
