"""The integer program, and the types that propagation finds with it: the plans of the books, as text."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from meshwright import Plan, PlanError
from meshwright.compiler.text import blocks_text, function_text
from meshwright.compiler.types import I, P, R, S, Type
from meshwright.passes.rows import Row
from meshwright.passes.solve import Choice, Problem, solve
from tests.null.passes import Model, parameter, same, typed

X = torch.randn(4, 8)
Rows = Mapping[str, tuple[tuple[Row, float], ...]]
Costs = Mapping[tuple[Type, Type], float]


def _row(results: tuple[Type, ...], operands: tuple[Type, ...] = ()) -> Row:
    return Row(operands=operands, results=results)


def _problem(
    calls: Mapping[str, tuple[str, ...]], rows: Rows, costs: Costs, required: tuple[tuple[str, tuple[Type, ...]], ...]
) -> Problem:
    """Nodes by name with the names of their operands; every conversion costs the same for every value."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for name, operands in calls.items():
        nodes[name] = graph.create_node("call_function", len, tuple(nodes[n] for n in operands), name=name)
    return Problem(
        rows={nodes[name]: found for name, found in rows.items()},
        operands={nodes[name]: tuple(nodes[n] for n in operands) for name, operands in calls.items()},
        results={node: (node,) for node in nodes.values()},
        required=tuple((nodes[name], types) for name, types in required),
        conversion=lambda node, source, target: costs.get((source, target)),
    )


def _text(choice: Choice | None) -> str:
    assert choice is not None
    lines = [
        f"{node.name}: {', '.join(map(str, row.operands))} -> {', '.join(map(str, row.results))}"
        for node, row in choice.rows.items()
    ]
    lines += [f"{node.name} as {type_} from {source}" for (node, type_), source in choice.converted.items()]
    return "\n".join([*lines, *(f"{node.name} ends as {type_}" for node, type_ in choice.final.items())])


def test_the_cheapest_rows_win() -> None:
    rows = {"x": ((_row((I,)), 0.0),), "y": ((_row((I,), (I,)), 3.0), (_row((P,), (I,)), 1.0))}
    cheap, dear = {(P, I): 1.0}, {(P, I): 2.5}
    calls, required = {"x": (), "y": ("x",)}, (("y", (I,)),)
    same(
        _text(solve(_problem(calls, rows, cheap, required))),
        """
        x:  -> I
        y: I -> P
        y as I from P
        y ends as I
        """,
    )
    same(
        _text(solve(_problem(calls, rows, dear, required))),
        """
        x:  -> I
        y: I -> I
        y ends as I
        """,
    )


def test_a_conversion_is_paid_once_for_all_its_users() -> None:
    """Alone, each user is cheaper as I; together they share one conversion to R."""
    user = ((_row((I,), (I,)), 2.0), (_row((I,), (R,)), 0.0))
    rows = {"x": ((_row((I,)), 0.0),), "y": user, "z": user}
    calls = {"x": (), "y": ("x",), "z": ("x",)}
    costs, required = {(I, R): 3.0}, (("y", (I,)), ("z", (I,)))
    same(
        _text(solve(_problem(calls, rows, costs, required))),
        """
        x:  -> I
        y: R -> I
        z: R -> I
        x as R from I
        y ends as I
        z ends as I
        """,
    )
    alone = _problem({"x": (), "y": ("x",)}, {"x": rows["x"], "y": user}, costs, (("y", (I,)),))
    same(
        _text(solve(alone)),
        """
        x:  -> I
        y: I -> I
        y ends as I
        """,
    )


def test_a_way_of_two_conversions() -> None:
    rows = {"x": ((_row((P,)), 0.0),), "y": ((_row((I,), (R,)), 0.0),)}
    problem = _problem({"x": (), "y": ("x",)}, rows, {(P, I): 1.0, (I, R): 1.0}, (("y", (I,)),))
    same(
        _text(solve(problem)),
        """
        x:  -> P
        y: R -> I
        x as I from P
        x as R from I
        y ends as I
        """,
    )


def test_two_ways_end_in_one_where_the_second_begins() -> None:
    """z needs the value as I, so y's R is one step further instead of two steps of its own."""
    rows = {"x": ((_row((P,)), 0.0),), "y": ((_row((I,), (R,)), 0.0),), "z": ((_row((I,), (I,)), 0.0),)}
    costs = {(P, I): 2.0, (I, R): 1.0, (P, S(0)): 1.0, (S(0), R): 1.5}
    problem = _problem({"x": (), "y": ("x",), "z": ("x",)}, rows, costs, (("y", (I,)), ("z", (I,))))
    same(
        _text(solve(problem)),
        """
        x:  -> P
        y: R -> I
        z: I -> I
        x as I from P
        x as R from I
        y ends as I
        z ends as I
        """,
    )


def test_the_results_end_in_one_of_the_types_that_are_required() -> None:
    rows = {"x": ((_row((S(0),)), 0.0),)}
    problem = _problem({"x": ()}, rows, {(S(0), I): 2.0, (S(0), R): 1.0}, (("x", (I, R)),))
    same(
        _text(solve(problem)),
        """
        x:  -> S(0)
        x as R from S(0)
        x ends as R
        """,
    )


def test_without_a_way_there_is_no_choice() -> None:
    rows = {"x": ((_row((S(0),)), 0.0),), "y": ((_row((I,), (I,)), 0.0),)}
    calls, required = {"x": (), "y": ("x",)}, (("y", (I,)),)
    assert solve(_problem(calls, rows, {}, required)) is None
    assert solve(_problem(calls, rows, {(S(0), R): 1.0, (R, P): 1.0, (P, I): 1.0}, required)) is None, "three steps"
    assert solve(_problem(calls, rows, {(S(0), I): 1.0}, required)) is not None


def test_no_way_is_taken_by_halves() -> None:
    """Half of each of the three first steps and half of each second one would be cheapest: 3.4 instead of 4.1."""
    a, b, c = S(0), S(1), S(2)
    rows = {"x": ((_row((P,)), 0.0),)} | {n: ((_row((I,), (t,)), 0.0),) for n, t in (("f", a), ("g", b), ("h", c))}
    calls = {"x": (), "f": ("x",), "g": ("x",), "h": ("x",)}
    costs = {(P, a): 2.0, (P, b): 2.0, (P, c): 2.5, (a, b): 0.1, (b, c): 0.1, (c, a): 0.1}
    same(
        _text(solve(_problem(calls, rows, costs, tuple((n, (I,)) for n in "fgh")))),
        """
        x:  -> P
        f: S(0) -> I
        g: S(1) -> I
        h: S(2) -> I
        x as S(0) from P
        x as S(1) from P
        x as S(2) from S(1)
        f ends as I
        g ends as I
        h ends as I
        """,
    )


def test_no_circle_of_conversions_feeds_itself() -> None:
    """I from R and R from I cost nothing and need each other: neither comes from what was made."""
    rows = {"x": ((_row((S(0),)), 0.0),), "y": ((_row((I,), (I,)), 0.0),), "z": ((_row((I,), (R,)), 0.0),)}
    problem = _problem(
        {"x": (), "y": ("x",), "z": ("x",)}, rows, {(I, R): 0.0, (R, I): 0.0}, (("y", (I,)), ("z", (I,)))
    )
    assert solve(problem) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_cheaper(seed: int) -> None:
    """Against all combinations of rows and ways on random problems."""
    random_ = random.Random(seed)
    kinds = [I, R, P, S(0)]
    costs = {(a, b): float(random_.randint(1, 6)) for a in kinds for b in kinds if a != b and random_.random() < 0.7}
    calls = {"x": (), "y": ("x",), "z": ("x", "y"), "w": ("y", "z")}

    def row(count: int) -> tuple[Row, float]:
        operands = tuple(random_.choice(kinds) for _ in range(count))
        return _row((random_.choice(kinds),), operands), float(random_.randint(0, 5))

    rows = {name: tuple(row(len(operands)) for _ in range(3)) for name, operands in calls.items()}
    problem = _problem(calls, rows, costs, (("w", (I,)),))
    combinations = (dict(zip(calls, picks, strict=True)) for picks in itertools.product(*rows.values()))
    best = min(_price(calls, rows, picks, costs) for picks in combinations)
    choice = solve(problem)
    if choice is None:
        assert best == float("inf")
        return
    made = {node.name: row for node, row in choice.rows.items()}
    price = sum(min(cost for row, cost in rows[name] if row == made[name]) for name in rows)
    ways = _ways(problem, choice)
    assert price + sum(costs[way] for _, way in ways) == pytest.approx(best)


def _ways(problem: Problem, choice: Choice) -> set[tuple[fx.Node, tuple[Type, Type]]]:
    """The conversions that a choice really needs, followed back from every user."""
    needs = [
        (n, t) for user, row in choice.rows.items() for n, t in zip(problem.operands[user], row.operands, strict=True)
    ]
    ways = set()
    for value, type_ in (*needs, *choice.final.items()):
        while type_ != choice.rows[value].results[0]:
            ways.add((value, (choice.converted[value, type_], type_)))
            type_ = choice.converted[value, type_]
    return ways


def _price(
    calls: Mapping[str, tuple[str, ...]], rows: Rows, picks: Mapping[str, tuple[Row, float]], costs: Costs
) -> float:
    """What some rows cost with the cheapest conversions of each value."""
    total = sum(cost for _, cost in picks.values())
    for value in calls:
        places = [(user, i) for user, operands in calls.items() for i, name in enumerate(operands) if name == value]
        wanted = {picks[user][0].operands[i] for user, i in places} | ({I} if value == "w" else set())
        known = {row.operands[i] for user, i in places for row, _ in rows[user]} | {I, P}
        (made,) = picks[value][0].results
        total += _tree(made, wanted - {made}, known - {made}, costs)
    return total


def _tree(made: Type, wanted: set[Type], known: set[Type], costs: Costs) -> float:
    """The cheapest way to all ``wanted`` types: first from what was made, then from those that came first."""
    infinite = best = float("inf")
    for count in range(len(known) + 1):
        for firsts in itertools.combinations(sorted(known, key=str), count):
            price = sum(costs.get((made, first), infinite) for first in firsts)
            seconds = (min((costs.get((f, t), infinite) for f in firsts), default=infinite) for t in wanted - {*firsts})
            best = min(best, price + sum(seconds))
    return best


# The plans of the books


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = parameter(8)
        self.up = nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x.softmax(-1) * self.scale)))


def _text_of_layer(plan: Plan | None = None, **mesh: int) -> str:
    """One of two equal layers."""

    def run(self: Any, tokens: torch.Tensor) -> Any:
        return self.h[1](self.h[0](self.embed(tokens))).pow(2).sum()

    model = Model(run, embed=nn.Embedding(10, 8), h=nn.ModuleList([MLP(), MLP()]))
    return blocks_text(typed(model, (torch.randint(10, (4, 6)),), plan, **mesh)).partition("\n\n")[2]


def test_the_columns_of_the_first_matrix_and_the_rows_of_the_second() -> None:
    same(
        _text_of_layer(tp=2),
        """
        MLP: h.0, h.1
        embedding_default        input                                                (B, T, 8)   float32  data grad        tp I
        h_0_scale                scale                                                (8,)        float32  parameters grad  tp I
        h_0_up_weight            up.weight                                            (32, 8)     float32  parameters grad  tp S(0)
        h_0_down_weight          down.weight                                          (8, 32)     float32  parameters grad  tp S(1)
        softmax_int              aten.softmax(embedding_default, -1)                  (B, T, 8)   float32  data grad        tp I
        mul_tensor               aten.mul(softmax_int, h_0_scale)                     (B, T, 8)   float32  data grad        tp I
        invariant_to_replicated  invariant_to_replicated(mul_tensor, 'tp')            (B, T, 8)   float32  data grad        tp R
        linear_default           aten.linear(invariant_to_replicated, h_0_up_weight)  (B, T, 32)  float32  data grad        tp S(2)
        relu_default             aten.relu(linear_default)                            (B, T, 32)  float32  data grad        tp S(2)
        linear_default_1         aten.linear(relu_default, h_0_down_weight)           (B, T, 8)   float32  data grad        tp P
        all_reduce               all_reduce(linear_default_1, 'tp')                   (B, T, 8)   float32  data grad        tp I
        add_tensor               aten.add(embedding_default, all_reduce)              (B, T, 8)   float32  data grad        tp I
                                 output add_tensor
        """,  # noqa: E501
    )


def test_the_sequence_is_split_between_the_matrices() -> None:
    same(
        _text_of_layer(Plan(sequence_parallel=True), tp=2),
        """
        MLP: h.0, h.1
        embedding_default  input                                          (B, T, 8)   float32  data grad        tp S(1)
        h_0_scale          scale                                          (8,)        float32  parameters grad  tp R
        h_0_up_weight      up.weight                                      (32, 8)     float32  parameters grad  tp S(0)
        h_0_down_weight    down.weight                                    (8, 32)     float32  parameters grad  tp S(1)
        softmax_int        aten.softmax(embedding_default, -1)            (B, T, 8)   float32  data grad        tp S(1)
        mul_tensor         aten.mul(softmax_int, h_0_scale)               (B, T, 8)   float32  data grad        tp S(1)
        all_gather         all_gather(mul_tensor, 'tp', dim=1, to='R')    (B, T, 8)   float32  data grad        tp R
        linear_default     aten.linear(all_gather, h_0_up_weight)         (B, T, 32)  float32  data grad        tp S(2)
        relu_default       aten.relu(linear_default)                      (B, T, 32)  float32  data grad        tp S(2)
        linear_default_1   aten.linear(relu_default, h_0_down_weight)     (B, T, 8)   float32  data grad        tp P
        reduce_scatter     reduce_scatter(linear_default_1, 'tp', dim=1)  (B, T, 8)   float32  data grad        tp S(1)
        add_tensor         aten.add(embedding_default, reduce_scatter)    (B, T, 8)   float32  data grad        tp S(1)
                           output add_tensor
        """,
    )


def test_the_batch_is_split_over_replicas_and_in_time() -> None:
    model = Model(lambda self, x, labels: F.cross_entropy(self.up(x), labels), up=nn.Linear(8, 10))
    blocks = typed(model, (X, torch.randint(10, (4,))), Plan(microbatches=2), dp=2)
    same(
        function_text(blocks.main),
        """
        up_weight       up.weight                                           (10, 8)  float32  parameters grad  dp R     mb R
        up_bias         up.bias                                             (10,)    float32  parameters grad  dp R     mb R
        x               input                                               (B, 8)   float32  inputs           dp S(0)  mb S(0)
        labels          input                                               (B,)     int64    inputs           dp S(0)  mb S(0)
        linear_default  aten.linear(x, up_weight)                           (B, 10)  float32  data grad        dp S(0)  mb S(0)
        add_tensor      aten.add(linear_default, up_bias)                   (B, 10)  float32  data grad        dp S(0)  mb S(0)
        cross_entropy   cross_entropy(add_tensor, labels, reduction='sum')  ()       float32  data grad        dp P     mb P
        ne_scalar       aten.ne(labels, -100)                               (B,)     bool     inputs           dp S(0)  mb S(0)
        sum_default     aten.sum(ne_scalar)                                 ()       int64    inputs           dp P     mb P
        all_reduce      all_reduce(sum_default, 'dp')                       ()       int64    inputs           dp I     mb P
        all_reduce_1    all_reduce(all_reduce, 'mb')                        ()       int64    inputs           dp I     mb I
        div_tensor      aten.div(cross_entropy, all_reduce_1)               ()       float32  data grad        dp P     mb P
                        output div_tensor
        """,  # noqa: E501
    )


def test_a_mean_over_samples_is_made_a_part_of_the_whole_mean() -> None:
    model = Model(lambda self, x: self.up(x).pow(2).mean(), up=nn.Linear(8, 4, bias=False))
    same(
        function_text(typed(model, (X,), dp=2).main),
        """
        up_weight          up.weight                         (4, 8)  float32  parameters grad  dp R
        x                  input                             (B, 8)  float32  inputs           dp S(0)
        linear_default     aten.linear(x, up_weight)         (B, 4)  float32  data grad        dp S(0)
        pow_tensor_scalar  aten.pow(linear_default, 2)       (B, 4)  float32  data grad        dp S(0)
        mean_default       aten.mean(pow_tensor_scalar)      ()      float32  data grad        dp P
        part_of_mean       part_of_mean(mean_default, 'dp')  ()      float32  data grad        dp P
                           output part_of_mean
        """,
    )


def test_a_pin_moves_the_split() -> None:
    model = Model(lambda self, x: self.down(torch.relu(self.up(x))).sum(), up=nn.Linear(8, 32), down=nn.Linear(32, 8))
    same(
        function_text(typed(model, (X,), Plan(pins={"up.weight": {"tp": "S(1)"}}), tp=2).main),
        """
        up_weight         up.weight                                      (32, 8)  float32  parameters grad  tp S(1)
        up_bias           up.bias                                        (32,)    float32  parameters grad  tp S(0)
        down_weight       down.weight                                    (8, 32)  float32  parameters grad  tp S(1)
        down_bias         down.bias                                      (8,)     float32  parameters grad  tp S(0)
        x                 input                                          (B, 8)   float32  inputs           tp I
        shard             shard(x, 'tp', dim=1, of='I')                  (B, 8)   float32  inputs           tp S(1)
        linear_default    aten.linear(shard, up_weight)                  (B, 32)  float32  data grad        tp P
        reduce_scatter    reduce_scatter(linear_default, 'tp', dim=1)    (B, 32)  float32  data grad        tp S(1)
        add_tensor        aten.add(reduce_scatter, up_bias)              (B, 32)  float32  data grad        tp S(1)
        relu_default      aten.relu(add_tensor)                          (B, 32)  float32  data grad        tp S(1)
        linear_default_1  aten.linear(relu_default, down_weight)         (B, 8)   float32  data grad        tp P
        reduce_scatter_1  reduce_scatter(linear_default_1, 'tp', dim=1)  (B, 8)   float32  data grad        tp S(1)
        add_tensor_1      aten.add(reduce_scatter_1, down_bias)          (B, 8)   float32  data grad        tp S(1)
        sum_default       aten.sum(add_tensor_1)                         ()       float32  data grad        tp P
        all_reduce        all_reduce(sum_default, 'tp')                  ()       float32  data grad        tp I
                          output all_reduce
        """,
    )


def test_a_loss_that_mixes_samples_is_whole_on_every_replica() -> None:
    model = Model(lambda self, x: self.up(x).mean(0).pow(2).sum(), up=nn.Linear(8, 4, bias=False))
    same(
        function_text(typed(model, (X,), dp=2).main),
        """
        up_weight          up.weight                       (4, 8)  float32  parameters grad  dp R
        x                  input                           (B, 8)  float32  inputs           dp S(0)
        linear_default     aten.linear(x, up_weight)       (B, 4)  float32  data grad        dp S(0)
        mean_dim           aten.mean(linear_default, [0])  (4,)    float32  data grad        dp P
        part_of_mean       part_of_mean(mean_dim, 'dp')    (4,)    float32  data grad        dp P
        all_reduce         all_reduce(part_of_mean, 'dp')  (4,)    float32  data grad        dp I
        pow_tensor_scalar  aten.pow(all_reduce, 2)         (4,)    float32  data grad        dp I
        sum_default        aten.sum(pow_tensor_scalar)     ()      float32  data grad        dp I
                           output sum_default
        """,
    )


def test_a_loss_that_mixes_samples_has_no_microbatches() -> None:
    model = Model(lambda self, x: self.up(x).mean(0).pow(2).sum(), up=nn.Linear(8, 4, bias=False))
    with pytest.raises(PlanError) as error:
        typed(model, (X,), Plan(microbatches=2))
    assert str(error.value) == (
        "the batch cannot be cut into microbatches without changing the result: the loss mixes samples of the batch\n"
        "  use microbatches=1"
    )
