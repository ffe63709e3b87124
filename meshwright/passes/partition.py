"""Partition: cut the main function into pipeline stages of balanced time, at module boundaries."""

import difflib
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import PlanError
from meshwright.compiler.frames import module_stack
from meshwright.compiler.graph import Function
from meshwright.compiler.written import writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The stage of every node of the main function that depends on data; the others are made where they are needed."""

    stage: Mapping[fx.Node, int]
    costs: tuple[float, ...]


def partition(
    blocks: Blocks, num_stages: int, split: tuple[str, ...] | None, seconds: Mapping[fx.Node, float]
) -> Partition:
    """Cut at ``split`` (the modules where the 2nd, 3rd, ... stage begins), else where the largest time is least.

    seconds: by node, of one microbatch; everything with data counts, what is outside of blocks too. The best cut is
    found by dynamic programming over the boundaries. It is the largest stage that counts also where a rank has several:
    a schedule of v stages on each of p ranks hands every microbatch from stage to stage, so that each waits for the
    slowest, and no rank has more than v times that. Raises PlanError for an unknown module and for more stages than
    there are boundaries.
    """
    main = blocks.main
    units = _units(main)
    times = [seconds[node] for node in units]
    if split is not None:
        if len(split) != num_stages - 1:
            raise PlanError(
                f"split names {len(split)} modules for {num_stages} stages: it takes one for each stage after the first"
            )
        cuts = [_start_of(units, name) for name in split]
        if cuts != sorted(set(cuts)) or 0 in cuts:
            raise PlanError(
                f"split={list(split)} is not in the order in which the model runs these modules, or leaves "
                f"a stage empty"
            )
    else:
        allowed = _boundaries(main, units)
        if len(allowed) < num_stages - 1:
            raise PlanError(
                f"the plan asks for {num_stages} stages, but the model has {len(allowed)} places to cut it\n"
                "  use a smaller pp, or fewer stages per rank"
            )
        cuts = _balance(times, allowed, num_stages)
    edges = [0, *cuts, len(units)]
    stage = {node: k for k in range(num_stages) for node in units[edges[k] : edges[k + 1]]}
    return Partition(stage=stage, costs=tuple(sum(times[a:b]) for a, b in zip(edges, edges[1:], strict=False)))


def cut_places(blocks: Blocks) -> int:
    """How many places there are to cut a model: there may be as many stages and one more."""
    return len(_boundaries(blocks.main, _units(blocks.main)))


def _units(main: Function) -> list[fx.Node]:
    return [node for node in main.graph.nodes if node.op != "output" and is_data(main, node)]


def is_data(main: Function, node: fx.Node) -> bool:
    """Whether a node belongs to one stage: what inputs or parameters alone give is made again wherever it is needed."""
    if node in main.values:
        return main.values[node].made_of == "data"
    return any(is_data(main, n) for n in node.all_input_nodes)


def _start_of(units: list[fx.Node], name: str) -> int:
    known: dict[str, None] = {}
    for position, node in enumerate(units):
        paths = [path for path, _ in module_stack(node)]
        if node.op == "call_module":
            paths.append(str(node.target))
        if name in paths:
            return position
        known.update(dict.fromkeys(paths))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"\n  near it: {', '.join(near)}" if near else ""
    raise PlanError(f"split names {name!r}, which is no module that the model runs{hint}")


def _boundaries(main: Function, units: list[fx.Node]) -> list[int]:
    """Positions before which a stage may begin: at the edges of blocks, else wherever another module begins."""
    safe = [p for p in range(1, len(units)) if _can_cross(main, units, p)]
    at_blocks = [p for p in safe if "call_module" in (units[p].op, units[p - 1].op)]
    if at_blocks:
        return at_blocks
    return [p for p in safe if [x for x, _ in module_stack(units[p])] != [x for x, _ in module_stack(units[p - 1])]]


def _can_cross(main: Function, units: list[fx.Node], position: int) -> bool:
    """Whether everything that crosses is whole or split: partial and replicated values stay in a stage, and so does a
    buffer with all that use it, if one writes to it.
    """
    before, after = set(units[:position]), set(units[position:])
    for buffer in {buffer for node in units for buffer in writes(node)}:
        if before.intersection(buffer.users) and after.intersection(buffer.users):
            return False
    for node in before:
        if any(user in after for user in node.users):
            if node not in main.values or any(t.kind in "PR" for t in main.values[node].types.values()):
                return False
    return True


def _balance(times: list[float], allowed: list[int], num_stages: int) -> list[int]:
    """The cuts with the least largest sum, and among those the least sum of squares."""
    prefix = [0.0, *itertools.accumulate(times)]
    pairs = itertools.combinations((0, *allowed, len(times)), 2)
    costs = {(start, stop): round(prefix[stop] - prefix[start], 12) for start, stop in pairs}
    largest, _ = _cheapest(costs, num_stages, len(times), max)
    squares = {pair: cost * cost for pair, cost in costs.items() if cost <= largest}
    return _cheapest(squares, num_stages, len(times), operator.add)[1][:-1]


def _cheapest(
    costs: Mapping[tuple[int, int], float], num_stages: int, end: int, join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least of all ways from 0 to ``end`` in ``num_stages`` steps that have a cost, and where its steps end."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(num_stages):
        reached: dict[int, tuple[float, list[int]]] = {}
        for (start, stop), cost in costs.items():
            if start in best:
                total = join(best[start][0], cost)
                if stop not in reached or total < reached[stop][0]:
                    reached[stop] = (total, [*best[start][1], stop])
        best = reached
    return best[end]
