"""Propagate: a type for every value on every axis, one axis at a time, by cost; the user's pins first.

Each distinct block is solved once, with the types at its boundary fixed: batched values split over dp and mb,
everything
else invariant, except that the sequence is split over tp where that is permitted.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.types import I, P, R, S, Type
from meshwright.compiler.written import ONCE_PER_STEP, is_writer, is_written, only_stored
from meshwright.passes.axes import Axis
from meshwright.passes.carry import FactorTables, carried_splits
from meshwright.passes.cost import Prices, compute_times, conversion_time, holding_time, is_conversion
from meshwright.passes.refusals import mixed, no_types, where
from meshwright.passes.rows import (
    Row,
    candidates,
    factors_by_node,
    has_pieces,
    operands,
    results,
    rows_of,
    uneven,
)  # fmt: skip
from meshwright.passes.rules import Rules
from meshwright.passes.solve import Choice, Problem, solve

Boundary = Mapping[fx.Node, Type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Typing:
    """The choices on one axis: for the main function, and for each block by name."""

    axis: Axis
    main: Choice
    blocks: Mapping[str, Choice]


def factor(blocks: Blocks, rules: Rules) -> FactorTables:
    """The factors of all operators, by the name of the block ("" is the main function): once for all axes."""
    functions = {"": blocks.main, **{block.name: block.function for block in blocks.blocks}}
    return {name: factors_by_node(function, rules) for name, function in functions.items()}


def propagate(
    blocks: Blocks, axis: Axis, factors: FactorTables, prices: Prices, pins: Mapping[str, tuple[str, Type]]
) -> Typing:
    """Types on one axis. ``pins``: parameter (by the name the graphs use) -> pattern and type at rest.

    Raises PlanError where a pin cannot be kept, and where the batch cannot be cut into microbatches.
    """
    main = _Solver(blocks.main, axis, "", factors, prices, pins, blocks, {})
    choices: dict[str, Choice] = {}
    for block in blocks.blocks:
        node = next(n for n in blocks.main.graph.nodes if n.op == "call_module" and n.target in block.instances)
        own = {
            relative: pins[name]
            for relative in block.function.attributes()
            if (name := f"{block.instances[0]}.{relative}") in pins
        }
        boundary = dict(zip(block.function.inputs(), (main.boundary(n) for n in operands(node)), strict=True))
        choices[block.name] = _Solver(block.function, axis, block.name, factors, prices, own, None, boundary).solve()
    return Typing(axis=axis, main=main.solve(), blocks=choices)


class _Solver:
    """One function on one axis."""

    def __init__(
        self,
        function: Function,
        axis: Axis,
        name: str,
        every: FactorTables,
        prices: Prices,
        pins: Mapping[str, tuple[str, Type]],
        blocks: Blocks | None,
        boundary: Boundary,
    ):
        self.function, self.axis, self.prices, self.pins, self.blocks = function, axis, prices, pins, blocks
        self.given = dict(boundary)
        self.factors = every[name]
        self.by_itself = only_stored(function.graph) if axis.by_microbatch else set()
        self.carried = carried_splits(function, axis, name, every, blocks, self.given)
        self.found = candidates(function, self.factors, self._seeds(), axis.size)

    # What is fixed beforehand

    def boundary(self, node: fx.Node) -> Type:
        """The type of a value where it enters or leaves a function."""
        if node in self.given:
            return self.given[node]
        value = self.function.values[node]
        if self.axis.features and not value.grad:
            return I
        if node in self.carried and _splittable(value, self.carried[node], self.axis.size):
            return self.carried[node]
        if value.made_of == "parameters" and value.grad and not self.axis.features:
            return R
        return I

    def _seeds(self) -> dict[fx.Node, set[Type]]:
        seeds: dict[fx.Node, set[Type]] = {}
        for node, value in self.function.values.items():
            if node.op == "placeholder":
                type_ = self.boundary(node)
                seeds[node] = {type_} if type_.is_split else set()
            elif node.op == "get_attr" and self.axis.features and value.made_of == "parameters":
                pin = self.pins.get(str(node.target))
                if pin is not None:
                    self._check_pin(node, value, *pin)
                    seeds[node] = {pin[1]} if pin[1].is_split else set()
                elif value.grad:
                    dims = (dim for dim, size in enumerate(value.shape) if has_pieces(size, self.axis.size))
                    seeds[node] = {S(dim) for dim in dims}
            if node in self.carried and (node.op == "placeholder" or not self.axis.features):
                seeds.setdefault(node, set()).add(self.carried[node])
        for node in self._crossing():
            if (type_ := self.boundary(node)).is_split:
                seeds.setdefault(node, set()).add(type_)
        return seeds

    def _crossing(self) -> list[fx.Node]:
        """The values that go into blocks and come out of them, whose types are fixed there."""
        if self.blocks is None:
            return list(self.function.results())
        calls = [node for node in self.function.graph.nodes if node.op == "call_module"]
        return [value for call in calls for value in (*operands(call), *results(self.function, call))]

    def _check_pin(self, node: fx.Node, value: Value, pattern: str, type_: Type) -> None:
        if type_.is_split and (type_.dim >= len(value.shape) or not _cuttable(value, type_, self.axis.size)):
            shape = tuple(value.shape)
            size, groups = shape[type_.dim] if type_.dim < len(shape) else None, type_.groups
            why = f"{size} has no {self.axis.size} pieces of which only the last is shorter"
            if size is None:
                why = f"it has {len(shape)} dims"
            elif groups != 1:
                why = f"{size} is not a multiple of {groups * self.axis.size}"
            raise PlanError(
                f"cannot split '{node.target}' as {type_} over {self.axis.name}={self.axis.size}: its "
                f"shape is {shape} and {why}\n"
                f"  asked for by the pin {pattern!r}\n"
                f'  pin it whole, {{"{pattern}": {{"{self.axis.name}": "I"}}}}, or leave the choice to the compiler'
            )

    # The problem

    def solve(self) -> Choice:
        """The cheapest choice; where samples meet and no sum joins them again, with parts computed whole everywhere."""
        choice = self._solved(self._replicable())
        if choice is None and not (self.axis.features or self.axis.in_time):
            choice = self._solved(set(self.function.values))
        if choice is None:
            raise self._refusal()
        for node in self.by_itself:
            self._check_stored(node, choice)
        return choice

    def _solved(self, replicable: set[fx.Node]) -> Choice | None:
        rows: dict[fx.Node, tuple[tuple[Row, float], ...]] = {}
        ins: dict[fx.Node, tuple[fx.Node, ...]] = {}
        outs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in self.function.graph.nodes:
            if node.op == "output" or node.target is operator.getitem:
                continue
            ins[node], outs[node] = () if node in self.by_itself else operands(node), results(self.function, node)
            rows[node] = tuple(self._priced(node, row) for row in self._rows(node, replicable))
        required = tuple((node, self._required(node)) for node in self.function.results())
        return solve(Problem(rows=rows, operands=ins, results=outs, required=required, conversion=self._conversion))

    def _rows(self, node: fx.Node, replicable: set[fx.Node]) -> tuple[Row, ...]:
        if node.op == "placeholder":
            return (Row(operands=(), results=(self.boundary(node),)),)
        if node.op == "call_module":
            return (
                Row(
                    operands=tuple(self.boundary(n) for n in operands(node)),
                    results=tuple(self.boundary(n) for n in results(self.function, node)),
                ),
            )
        if node.op == "get_attr":
            return tuple(Row(operands=(), results=(type_,)) for type_ in self._held(node))
        if node in self.by_itself:
            # What has no batch dim is R: each microbatch has its own.
            made = tuple(self.carried.get(n, R) for n in results(self.function, node))
            return (Row(operands=(), results=made, as_is=True),)
        rows = rows_of(self.function, node, self.factors.get(node), self.found, replicable, self.axis.size)
        if self.axis.in_time and not self.axis.by_microbatch:
            if any(row.synchronized for row in rows) or (is_writer(node) and node.target not in ONCE_PER_STEP):
                raise mixed(f"batch statistics are taken {where(self.function, node)}")
        return rows

    def _check_stored(self, node: fx.Node, choice: Choice) -> None:
        """What a microbatch stores is of itself alone: raises PlanError for a part of what is summed over them."""
        for used in operands(node):
            maker = used.all_input_nodes[0] if used.target is operator.getitem else used
            if choice.rows[maker].results[results(self.function, maker).index(used)] == P:
                origin = self.function.origins.get(used)
                name = origin.name if origin else used.name
                raise PlanError(
                    f"cannot store a value of each microbatch by itself: {name!r}, which is stored "
                    f"{where(self.function, node)}, is also a part of the loss, which is summed over microbatches\n"
                    "  compute what is stored apart from what the loss reads, or use microbatches=1"
                )

    def _held(self, node: fx.Node) -> list[Type]:
        """The types in use that a parameter or buffer may have."""
        value = self.function.values[node]
        if not value.grad and value.made_of != "parameters":
            split = sorted((t for t in self.found[node] if _splittable(value, t, self.axis.size)), key=str)
            return [I, *split] if self.axis.features and is_written(node) else [I]
        if not self.axis.features:
            return [R if value.grad else I]
        whole = [I, R] if value.grad else [I]
        split = sorted((t for t in self.found[node] if _cuttable(value, t, self.axis.size)), key=str)
        pin = self.pins.get(str(node.target))
        if pin is not None:
            return [pin[1]] if pin[1].is_split else whole
        return whole + split

    def _required(self, node: fx.Node) -> tuple[Type, ...]:
        if self.blocks is None:
            return (self.boundary(node),)
        return (I,) if self.axis.features else (P, I)

    def _replicable(self) -> set[fx.Node]:
        """Data worth computing whole on every rank: what small projections give, until it meets split data."""
        found: set[fx.Node] = set()
        if not self.axis.features:
            return found
        for node, here in self.factors.items():
            ins = operands(node)
            values = [self.function.values[n] for n in ins]
            if here is None or node not in self.function.values or self.function.values[node].made_of != "data":
                continue
            if any(n.op == "get_attr" for n in ins) and any(f.results == (None,) and not f.whole for f in here.factors):
                wide = max((f.size for f in here.factors if f.results == (None,)), key=str)
                shape = self.function.values[node].shape
                narrow = shape[-1] if shape else 1
                if isinstance(wide, int) and isinstance(narrow, int) and 2 * narrow <= wide and len(here.factors) > 2:
                    found.add(node)
            elif all(not v.grad or n in found or v.made_of == "parameters" for n, v in zip(ins, values, strict=True)):
                found.add(node)
        return found

    def _priced(self, node: fx.Node, row: Row) -> tuple[Row, float]:
        values = self.function.values
        ins, outs = (tuple(values[n] for n in nodes) for nodes in (operands(node), results(self.function, node)))
        if node.op == "get_attr":
            (held,) = row.results
            if ins or not values[node].grad:
                return row, 0.0
            split, pending = held.is_split, held == R and self.axis.features
            return row, holding_time(self.prices, values[node], split, pending, self.axis.size)
        if node.op != "call_function":
            return row, 0.0
        return row, sum(compute_times(self.prices, node, ins, outs)) * row.share

    def _conversion(self, node: fx.Node, source: Type, target: Type) -> float | None:
        value = self.function.values[node]
        if not is_conversion(source, target) or is_written(node):
            return None  # what is written to is the buffer itself
        if target.is_split and target not in self.found[node]:
            return None
        if source.is_split and target.is_split and any(uneven(value, t, self.axis.size) for t in (source, target)):
            return None  # only equal pieces are exchanged
        if (source, target) == (R, P):
            allowed = value.grad and node.op != "get_attr" and not self.axis.features
        elif value.made_of == "parameters" and value.grad:
            allowed = self.axis.features and node.op == "get_attr" and (source, target) == (I, R)
        elif value.grad:
            allowed = not self.axis.in_time
        elif self.axis.in_time:
            allowed = (source, target) == (P, I) and value.made_of == "inputs"  # known before the first microbatch
        else:
            allowed = target == I or source != P
        return conversion_time(self.prices, value, source, target, self.axis.size) if allowed else None

    def _refusal(self) -> Exception:
        blamed = self._unstorable() if self.axis.in_time else None
        return no_types(self.function, self.axis, self.factors, self.carried, self.pins, blamed)

    def _unstorable(self) -> fx.Node | None:
        """The first store but for which, and others like it, there would be types."""
        graph = self.function.graph
        stores: list[fx.Node] = [node for node in graph.nodes if is_writer(node) and not node.users]
        self.by_itself = only_stored(graph)
        if not stores or self._solved(self._replicable()) is None:
            return None
        for node in stores:
            self.by_itself = only_stored(graph, set(stores) - {node})
            if self._solved(self._replicable()) is None:
                return node
        return None


def _splittable(value: Value, type_: Type, pieces: int) -> bool:
    """Whether there are equal pieces."""
    size = value.shape[type_.dim]
    if not isinstance(size, int) or not isinstance(type_.groups, int):
        return True
    return size % (type_.groups * pieces) == 0


def _cuttable(value: Value, type_: Type, pieces: int) -> bool:
    """Whether there are pieces, equal ones where they are of groups."""
    return _splittable(value, type_, pieces) or (type_.groups == 1 and has_pieces(value.shape[type_.dim], pieces))
