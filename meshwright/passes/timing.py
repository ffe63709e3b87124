"""Timing: how long every node of the main function takes on a rank, and from that what each stage of a cut costs.

Times are of one microbatch on one replica. Modelled ones count as ``cost.prices`` says, where a microbatch of a replica
is as large as its whole batch; with measured ones everything has the size of the example.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import sympy
from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.mesh import MICROBATCH_AXIS, Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.types import I, Types
from meshwright.passes.cost import (
    BYTES,
    LATENCY,
    LINK_BANDWIDTH,
    Prices,
    Times,
    compute_times,
    conversion_volumes,
    holding_time,
)
from meshwright.passes.measured import read_times
from meshwright.passes.partition import Partition, is_data
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import operands, results
from meshwright.passes.saved import Saved, saved
from meshwright.passes.schedules.pipeline import Costs, Edge

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds by node of the main function: ``times`` of a microbatch, ``updates`` of what it has to hold, per step.

    saved: what forwards keep. messages: the seconds that the value of a node takes to another rank.
    """

    num_microbatches: int
    times: Mapping[fx.Node, Times]
    updates: Mapping[fx.Node, float]
    messages: Mapping[fx.Node, float]
    saved: Saved

    @property
    def seconds(self) -> dict[fx.Node, float]:
        """What each node adds to the time of its stage for a microbatch; updates are shared by all of a step."""
        return {node: sum(times) + self.updates[node] / self.num_microbatches for node, times in self.times.items()}


def timing(blocks: Blocks, mesh: Mesh, plan: Plan, prices: Prices, symbols: Mapping[sympy.Symbol, int]) -> Timing:
    """The times of typed ``blocks``, measured ones where the plan has them.

    symbols: the sizes of the example's whole batch. Raises PlanError for measured times of another model.
    """
    sizes = {**dict(mesh.axes), MICROBATCH_AXIS: plan.num_microbatches(mesh.size("pp"))}
    sizes.pop("pp", None)
    measured = read_times(plan.times)
    cut = sizes.get("dp", 1) * sizes[MICROBATCH_AXIS]
    whole = {symbol: size * (cut if symbol == BATCH else 1) for symbol, size in prices.sizes.items()}
    prices = replace(prices, sizes=whole) if measured is None else replace(prices, sizes=symbols, scale=1.0)
    clock = _Clock(blocks, sizes, prices, plan.zero)
    nodes = [n for n in blocks.main.graph.nodes if n.op != "output" and is_data(blocks.main, n)]
    alone = _once_per_block(blocks, nodes, lambda node: clock.computing(node, sizes))
    updates = _once_per_block(blocks, nodes, clock.updating)
    converting = _once_per_block(blocks, nodes, clock.converting)
    if measured is not None:
        undivided = {axis: size for axis, size in sizes.items() if axis != "tp"}
        fitted = measured.fit(_once_per_block(blocks, nodes, lambda node: clock.computing(node, undivided)), alone)
        alone, updates = fitted.times, {node: fitted.ratio * update for node, update in updates.items()}
    return Timing(
        num_microbatches=sizes[MICROBATCH_AXIS],
        times={node: alone[node] + converting[node] for node in nodes},
        updates=updates,
        messages={node: clock.message(blocks.main.values[node]) for node in nodes if node in blocks.main.values},
        saved=saved(blocks, sizes, symbols),
    )


def _once_per_block(blocks: Blocks, nodes: list[fx.Node], of: Callable[[fx.Node], T]) -> Mapping[fx.Node, T]:
    """``of`` of every node, asked for one instance of each block."""
    names = {path: block.name for block in blocks.blocks for path in block.instances}
    known: dict[str | fx.Node, T] = {}
    found = {}
    for node in nodes:
        key = names.get(str(node.target), node) if node.op == "call_module" else node
        if key not in known:
            known[key] = of(node)
        found[node] = known[key]
    return found


@dataclass(frozen=True, slots=True)
class _Clock:
    blocks: Blocks
    sizes: Mapping[str, int]
    prices: Prices
    zero: int

    def computing(self, node: fx.Node, sizes: Mapping[str, int]) -> Times:
        """Of all operators in a node, on a rank of axes of these sizes."""
        return sum((self._computing(f, n, sizes) for f, n in self._inside(node)), Times())

    def converting(self, node: fx.Node) -> Times:
        """Of all communication in a node."""
        return sum((self._converting(f, n) for f, n in self._inside(node)), Times())

    def updating(self, node: fx.Node) -> float:
        """Of the update of all parameters that a node uses."""
        held = {
            n: function.values[n]
            for function, inner in self._inside(node)
            for n in operands(inner)
            if n.op == "get_attr" and function.values[n].made_of == "parameters"
        }
        pieces, split = self.sizes.get("dp", 1), {"tp": self.sizes.get("tp", 1)}
        return sum(
            holding_time(self.prices, value, self.zero > 0, False, pieces) * _share([value.types], split)
            for value in held.values()
        )

    def message(self, value: Value) -> float:
        return LATENCY + self.prices.elements(value) * BYTES * _share([value.types], self.sizes) / LINK_BANDWIDTH

    def _inside(self, node: fx.Node) -> list[tuple[Function, fx.Node]]:
        if node.op != "call_module":
            return [(self.blocks.main, node)] if node.op == "call_function" else []
        function = self.blocks.of(str(node.target)).function
        return [(function, inner) for inner in function.graph.nodes if inner.op == "call_function"]

    def _computing(self, function: Function, node: fx.Node, sizes: Mapping[str, int]) -> Times:
        if conversion_of(node) is not None:
            return Times()
        given = tuple(function.values[n] for n in operands(node) if n in function.values)
        made = tuple(function.values[n] for n in results(function, node) if n in function.values)
        return compute_times(self.prices, node, given, made) * _share([v.types for v in (*given, *made)], sizes)

    def _converting(self, function: Function, node: fx.Node) -> Times:
        converted = conversion_of(node)
        if converted is None or converted[0] not in self.sizes or converted[0] == MICROBATCH_AXIS:
            return Times()
        axis, value = converted[0], function.values[node.all_input_nodes[0]]
        source, target = value.types.get(axis, I), function.values[node].types.get(axis, I)
        others = {name: size for name, size in self.sizes.items() if name != axis}
        size = self.prices.elements(value) * BYTES * _share([value.types], others)
        volumes = conversion_volumes(size, value.grad, source, target, self.sizes[axis])
        forward, backward = (LATENCY + volume / LINK_BANDWIDTH if volume else 0.0 for volume in volumes)
        return Times(forward, 0.0, backward) if value.made_of == "parameters" else Times(forward, backward)


def _share(types: list[Types], sizes: Mapping[str, int]) -> float:
    """The part of the work on tensors that is a rank's: a piece on every axis that splits one of them."""
    return 1 / math.prod(n for axis, n in sizes.items() if any(t.get(axis, I).is_split for t in types))


def costs(parts: Partition, timing: Timing) -> Costs:
    """What the stages of a cut cost: seconds and bytes of one microbatch on one rank.

    All messages take as long as the longest between two stages. Values that inputs alone give are made again in every
    stage that needs them, which takes no time here.
    """
    num_stages = len(parts.costs)
    stages = [[node for node, stage in parts.stage.items() if stage == k] for k in range(num_stages)]
    times = [sum((timing.times[node] for node in nodes), Times()) for nodes in stages]
    messages: dict[tuple[int, int], list[fx.Node]] = {}
    for node, (source, destinations) in crossing(parts).items():
        for destination in destinations:
            messages.setdefault((source, destination), []).append(node)
    return Costs(
        forward=tuple(t.forward for t in times),
        inputs=tuple(t.inputs for t in times),
        weights=tuple(t.weights for t in times),
        activations=tuple(float(timing.saved.of(nodes)) for nodes in stages),
        message=max(
            (LATENCY + sum(timing.messages[n] - LATENCY for n in nodes) for nodes in messages.values()), default=0.0
        ),
    )


def crossing(parts: Partition) -> dict[fx.Node, tuple[int, tuple[int, ...]]]:
    """The nodes whose values go to later stages: their own stage and those."""
    found = {}
    for node, stage in parts.stage.items():
        later = sorted({parts.stage[user] for user in node.users if parts.stage.get(user, stage) != stage})
        if later:
            found[node] = stage, tuple(later)
    return found


def edges(blocks: Blocks, parts: Partition) -> tuple[Edge, ...]:
    """The edges between the stages of a cut, as schedules take them."""
    return tuple(
        dict.fromkeys(
            (source, destination, blocks.main.values[node].grad)
            for node, (source, destinations) in crossing(parts).items()
            for destination in destinations
        )
    )
