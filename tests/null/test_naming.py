"""What values are called while lines are written: no line reads a name that another value took."""

from typing import Any

import torch
from torch import fx

from meshwright.codegen.writing import write
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.names import Origin

aten = torch.ops.aten


def _origin(name: str, line: int, *aliases: str) -> Origin:
    return Origin(
        name=name, statement=("model.py", line), outer=("", 0), module_path="", section="", aliases=aliases,
        is_name_of_statement=True,
    )  # fmt: skip


def _lines(*calls: tuple[Any, tuple[str, ...], str, tuple[str, ...]]) -> list[str]:
    """The lines for calls (operator, what it reads, preferred name, aliases); what is read is numbered, "x" first."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    origins = {}
    for line, (target, operands, name, aliases) in enumerate(calls):
        node = graph.call_function(target, tuple(nodes[int(i)] for i in operands))
        origins[node] = _origin(name, line, *aliases)
        nodes.append(node)
    graph.output((nodes[-1],))
    value = Value(shape=(4,), dtype=torch.float32, grad=True, made_of="data")
    function = Function(graph=graph, values=dict.fromkeys(nodes, value), origins=origins)
    body = write(function, {nodes[0]: "x"}, {}, {})
    return [line.code for line in body.lines]


MAXIMUM = aten.maximum.default


def test_an_alias_of_the_users_keeps_a_value_whose_name_is_taken() -> None:
    assert _lines(
        (MAXIMUM, ("0", "0"), "hidden", ("residual",)),
        (MAXIMUM, ("1", "0"), "hidden", ()),
        (MAXIMUM, ("2", "1"), "result", ()),
    ) == [
        "hidden = torch.maximum(x, x)",
        "residual = hidden",
        "hidden = torch.maximum(hidden, x)",
        "return torch.maximum(hidden, residual)",
    ]


def test_an_alias_is_not_written_above_a_line_that_reads_it_as_another_value() -> None:
    """A converted value has the aliases of the one before, which still went by that alias in the lines between."""
    assert _lines(
        (MAXIMUM, ("0", "0"), "hidden", ("residual",)),
        (MAXIMUM, ("1", "0"), "hidden", ("residual",)),
        (MAXIMUM, ("1", "0"), "hidden", ()),
        (MAXIMUM, ("2", "3"), "result", ()),
    ) == [
        "hidden = torch.maximum(x, x)",
        "residual = hidden",
        "hidden = torch.maximum(hidden, x)",
        "hidden_2 = torch.maximum(residual, x)",
        "return torch.maximum(hidden, hidden_2)",
    ]


def test_an_alias_is_not_written_above_a_line_that_makes_another_value_of_that_name() -> None:
    assert _lines(
        (MAXIMUM, ("0", "0"), "hidden", ("residual",)),
        (MAXIMUM, ("0", "0"), "residual", ()),
        (MAXIMUM, ("2", "2"), "other", ()),
        (MAXIMUM, ("3", "1"), "hidden", ()),
        (MAXIMUM, ("4", "1"), "result", ()),
    ) == [
        "hidden = torch.maximum(x, x)",
        "residual = torch.maximum(x, x)",
        "other = torch.maximum(residual, residual)",
        "hidden_2 = torch.maximum(other, hidden)",
        "return torch.maximum(hidden_2, hidden)",
    ]
