"""The choice of one row per node and of the conversions between them, as an integer program solved by HiGHS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import fx

from meshwright.compiler.types import I, P, Type
from meshwright.passes.rows import Row

Conversion = tuple[fx.Node, Type, Type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The row of every node, from which type each further type of a value is converted, the types of the results."""

    rows: Mapping[fx.Node, Row]
    converted: Mapping[tuple[fx.Node, Type], Type]
    final: Mapping[fx.Node, Type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Rows with their costs for every node in order; ``operands`` and ``results`` give a row's types their values.

    conversion: the cost of a conversion of a value, None where it is not allowed. required: the types that the
    function's
    results may have.
    """

    rows: Mapping[fx.Node, tuple[tuple[Row, float], ...]]
    operands: Mapping[fx.Node, tuple[fx.Node, ...]]
    results: Mapping[fx.Node, tuple[fx.Node, ...]]
    required: tuple[tuple[fx.Node, tuple[Type, ...]], ...]
    conversion: Callable[[fx.Node, Type, Type], float | None]


class _Program:
    """Columns of 0 or 1 with costs, and rows ``sum of coefficients <= bound``.

    Conversions are whole too: half of one way and half of another can be cheaper than each, and is no way.
    """

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def column(self, cost: float) -> int:
        self.costs.append(cost)
        return len(self.costs) - 1

    def constraint(self, plus: list[int], minus: list[int], lower: float, upper: float) -> None:
        row = len(self.lower)
        self.entries += [(row, column, 1.0) for column in plus] + [(row, column, -1.0) for column in minus]
        self.lower.append(lower)
        self.upper.append(upper)

    def solve(self) -> np.ndarray | None:
        rows, columns, data = zip(*self.entries, strict=True)
        shape = (len(self.lower), len(self.costs))
        matrix = sparse.csr_array((data, (rows, columns)), shape=shape)
        scale = max(self.costs) or 1.0
        answer = milp(
            np.array(self.costs) / scale * 1e3,
            integrality=np.ones(len(self.costs)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self.lower, self.upper),
            options={"mip_rel_gap": 0.0},
        )
        return answer.x  # type: ignore[no-any-return]


def solve(problem: Problem) -> Choice | None:
    """The cheapest consistent choice; None if there is none."""
    program = _Program()
    made: dict[fx.Node, dict[Type, list[int]]] = {}
    picks: list[tuple[fx.Node, Row, int]] = []
    needs: dict[tuple[fx.Node, Type], list[list[int]]] = {}
    for node, rows in problem.rows.items():
        columns = [program.column(cost) for _, cost in rows]
        program.constraint(columns, [], 1, 1)
        for (row, _), column in zip(rows, columns, strict=True):
            picks.append((node, row, column))
            for value, type_ in zip(problem.results[node], row.results, strict=True):
                made.setdefault(value, {}).setdefault(type_, []).append(column)
        for position, value in enumerate(problem.operands[node]):
            wanted: dict[Type, list[int]] = {}
            for (row, _), column in zip(rows, columns, strict=True):
                wanted.setdefault(row.operands[position], []).append(column)
            for type_, users in wanted.items():
                needs.setdefault((value, type_), []).append(users)
    finals: list[tuple[fx.Node, Type, int]] = []
    for value, types in problem.required:
        columns = [program.column(0.0) for _ in types]
        finals += [(value, type_, column) for type_, column in zip(types, columns, strict=True)]
        program.constraint(columns, [], 1, 1)
        for type_, column in zip(types, columns, strict=True):
            needs.setdefault((value, type_), []).append([column])
    conversions = _conversions(program, problem, made, needs)
    for (value, type_), users in needs.items():  # type: ignore[assignment]
        sources = made.get(value, {}).get(type_, []) + [c for _, c in conversions.get((value, type_), [])]
        for columns in users:  # type: ignore[assignment]
            program.constraint(columns, sources, -np.inf, 0)
    answer = program.solve()
    if answer is None:
        return None
    chosen = {node: row for node, row, column in picks if answer[column] > 0.5}
    converted = {key: source for key, ways in conversions.items() for source, column in ways if answer[column] > 0.5}
    final = {value: type_ for value, type_, column in finals if answer[column] > 0.5}
    return Choice(rows=chosen, converted=converted, final=final)


def _conversions(
    program: _Program,
    problem: Problem,
    made: Mapping[fx.Node, Mapping[Type, list[int]]],
    needs: Mapping[tuple[fx.Node, Type], object],
) -> dict[tuple[fx.Node, Type], list[tuple[Type, int]]]:
    """Columns for conversions in up to two hops, the first from what was made, the second from a first."""
    wanted: dict[fx.Node, list[Type]] = {}
    for value, type_ in needs:
        wanted.setdefault(value, []).append(type_)
    found: dict[tuple[fx.Node, Type], list[tuple[Type, int]]] = {}
    for value, targets in wanted.items():
        firsts: dict[Type, list[int]] = {}
        middle = list(dict.fromkeys([*targets, I, P]))
        for target in middle:
            for source, columns in made.get(value, {}).items():
                cost = problem.conversion(value, source, target) if source != target else None
                if cost is not None:
                    column = program.column(cost)
                    program.constraint([column], columns, -np.inf, 0)
                    firsts.setdefault(target, []).append(column)
                    found.setdefault((value, target), []).append((source, column))
        for target in targets:
            for source, columns in firsts.items():
                cost = problem.conversion(value, source, target) if source != target else None
                if cost is not None:
                    column = program.column(cost)
                    program.constraint([column], columns, -np.inf, 0)
                    found.setdefault((value, target), []).append((source, column))
    return found
