"""Resharding: conversions as nodes, made once for all users, right before the first, under the name of their value."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Plan
from meshwright.compiler.errors import InternalError
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.text import function_text
from meshwright.compiler.types import I, P, R, S, Type
from meshwright.passes.cost import COLLECTIVES
from meshwright.passes.reshard import conversion, conversion_of
from meshwright.passes.rules import DEFAULT_RULES
from meshwright.passes.verify import verify
from meshwright.runtime.collectives import invariant_to_replicated
from tests.null.passes import Model, check_exact, lowered, parameter, same, typed

X = torch.randn(4, 8)


def _matrices(**shapes: tuple[int, int]) -> dict[str, nn.Parameter]:
    return {name: parameter(*shape) for name, shape in shapes.items()}


def _columns(*names: str) -> Plan:
    return Plan(pins={f"*{name}": {"tp": "S(0)"} for name in names})


class Layer(nn.Module):
    def __init__(self, run: Any, **shapes: tuple[int, int]):
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            setattr(self, name, parameter(*shape))

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def _layer(plan: Plan, run: Any, **shapes: tuple[int, int]) -> Function:
    """One of two equal layers, which take and give invariant values: as a layer inside of a model does."""
    layers = nn.ModuleList([Layer(run, **shapes), Layer(run, **shapes)])
    model = Model(lambda self, x: self.h[1](self.h[0](x * self.scale)).sum(), scale=parameter(8), h=layers)
    (block,) = typed(model, (X,), plan, tp=2).blocks
    return block.function


def test_one_converted_input_for_all_who_read_it() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        q, k, v = F.linear(x, self.q), F.linear(x, self.k), F.linear(x, self.v)
        return x + F.linear(q * k * v, self.o)

    shapes = {"q": (16, 8), "k": (16, 8), "v": (16, 8), "o": (8, 16)}
    same(
        function_text(_layer(_columns("q", "k", "v"), run, **shapes)),
        """
        mul_tensor               input                                        (B, 8)   float32  data grad        tp I
        h_0_q                    q                                            (16, 8)  float32  parameters grad  tp S(0)
        h_0_k                    k                                            (16, 8)  float32  parameters grad  tp S(0)
        h_0_v                    v                                            (16, 8)  float32  parameters grad  tp S(0)
        h_0_o                    o                                            (8, 16)  float32  parameters grad  tp S(1)
        invariant_to_replicated  invariant_to_replicated(mul_tensor, 'tp')    (B, 8)   float32  data grad        tp R
        linear_default           aten.linear(invariant_to_replicated, h_0_q)  (B, 16)  float32  data grad        tp S(1)
        linear_default_1         aten.linear(invariant_to_replicated, h_0_k)  (B, 16)  float32  data grad        tp S(1)
        linear_default_2         aten.linear(invariant_to_replicated, h_0_v)  (B, 16)  float32  data grad        tp S(1)
        mul_tensor_1             aten.mul(linear_default, linear_default_1)   (B, 16)  float32  data grad        tp S(1)
        mul_tensor_2             aten.mul(mul_tensor_1, linear_default_2)     (B, 16)  float32  data grad        tp S(1)
        linear_default_3         aten.linear(mul_tensor_2, h_0_o)             (B, 8)   float32  data grad        tp P
        all_reduce               all_reduce(linear_default_3, 'tp')           (B, 8)   float32  data grad        tp I
        add_tensor               aten.add(mul_tensor, all_reduce)             (B, 8)   float32  data grad        tp I
                                 output add_tensor
        """,
    )


def test_a_conversion_stands_before_its_first_user() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        wide = F.linear(x, self.up)
        other = (x * self.scale).cos().softmax(-1)
        return (F.linear(wide.relu(), self.down).softmax(-1) * other).sum()

    model = Model(run, scale=parameter(8), **_matrices(up=(32, 8), down=(8, 32)))
    same(
        function_text(typed(model, (X,), _columns("up"), tp=2).main),
        """
        scale             scale                                 (8,)     float32  parameters grad  tp I
        up                up                                    (32, 8)  float32  parameters grad  tp S(0)
        down              down                                  (8, 32)  float32  parameters grad  tp S(1)
        x                 input                                 (B, 8)   float32  inputs           tp I
        linear_default    aten.linear(x, up)                    (B, 32)  float32  data grad        tp S(1)
        mul_tensor        aten.mul(x, scale)                    (B, 8)   float32  data grad        tp I
        cos_default       aten.cos(mul_tensor)                  (B, 8)   float32  data grad        tp I
        softmax_int       aten.softmax(cos_default, -1)         (B, 8)   float32  data grad        tp I
        relu_default      aten.relu(linear_default)             (B, 32)  float32  data grad        tp S(1)
        linear_default_1  aten.linear(relu_default, down)       (B, 8)   float32  data grad        tp P
        all_reduce        all_reduce(linear_default_1, 'tp')    (B, 8)   float32  data grad        tp I
        softmax_int_1     aten.softmax(all_reduce, -1)          (B, 8)   float32  data grad        tp I
        mul_tensor_1      aten.mul(softmax_int_1, softmax_int)  (B, 8)   float32  data grad        tp I
        sum_default       aten.sum(mul_tensor_1)                ()       float32  data grad        tp I
                          output sum_default
        """,
    )


def test_axes_are_converted_one_after_the_other() -> None:
    model = Model(lambda self, x: (x * self.scale).sum(0).pow(2).sum() / x.sum(), scale=parameter(8))
    same(
        function_text(typed(model, (X,), Plan(pins={"scale": {"tp": "S(0)"}}), dp=2, tp=2).main),
        """
        scale              scale                                 (8,)    float32  parameters grad  dp R     tp S(0)
        x                  input                                 (B, 8)  float32  inputs           dp S(0)  tp I
        shard              shard(x, 'tp', dim=1, of='I')         (B, 8)  float32  inputs           dp S(0)  tp S(1)
        mul_tensor         aten.mul(shard, scale)                (B, 8)  float32  data grad        dp S(0)  tp S(1)
        sum_dim_int_list   aten.sum(mul_tensor, [0])             (8,)    float32  data grad        dp P     tp S(0)
        all_reduce         all_reduce(sum_dim_int_list, 'dp')    (8,)    float32  data grad        dp I     tp S(0)
        pow_tensor_scalar  aten.pow(all_reduce, 2)               (8,)    float32  data grad        dp I     tp S(0)
        sum_default        aten.sum(pow_tensor_scalar)           ()      float32  data grad        dp I     tp P
        sum_default_1      aten.sum(x)                           ()      float32  inputs           dp P     tp I
        all_reduce_1       all_reduce(sum_default, 'tp')         ()      float32  data grad        dp I     tp I
        all_reduce_2       all_reduce(sum_default_1, 'dp')       ()      float32  inputs           dp I     tp I
        div_tensor         aten.div(all_reduce_1, all_reduce_2)  ()      float32  data grad        dp I     tp I
                           output div_tensor
        """,
    )


def test_conversions_take_the_name_of_their_value() -> None:
    def run(self: Any, features: torch.Tensor) -> Any:
        widened = F.linear(features, self.up).relu()
        projected = F.linear(widened, self.down)
        return features + projected

    layer = _layer(_columns("up"), run, up=(32, 8), down=(8, 32))
    names = {node.name: layer.origins[node].name for node in layer.graph.nodes if conversion_of(node)}
    inputs = [layer.origins[node].name if node in layer.origins else node.name for node in layer.inputs()]
    assert names == {"invariant_to_replicated": inputs[0], "all_reduce": "projected"}


def test_pieces_of_groups_are_gathered_and_cut_again() -> None:
    """S(1) is not S(1/3): an exchange along the one dim would leave every rank what it had."""

    def run(self: Any, x: torch.Tensor) -> Any:
        q, k, v = F.linear(x, self.w).split(4, -1)
        return (q.sin() * k.cos() * v * self.u).pow(2).sum()

    model = Model(run, w=parameter(12, 8), u=parameter(4))
    same(
        function_text(check_exact(model, (X,), _columns("w", "u"), tp=2).main),
        """
        w                  w                                                (12, 8)  float64  parameters grad  tp S(0)
        u                  u                                                (4,)     float64  parameters grad  tp S(0)
        x                  input                                            (B, 8)   float64  inputs           tp I
        linear_default     aten.linear(x, w)                                (B, 12)  float64  data grad        tp S(1)
        all_gather         all_gather(linear_default, 'tp', dim=1, to='I')  (B, 12)  float64  data grad        tp I
        split_tensor       aten.split(all_gather, 4, -1)
        getitem            getitem(split_tensor, 0)                         (B, 4)   float64  data grad        tp I
        getitem_1          getitem(split_tensor, 1)                         (B, 4)   float64  data grad        tp I
        getitem_2          getitem(split_tensor, 2)                         (B, 4)   float64  data grad        tp I
        sin_default        aten.sin(getitem)                                (B, 4)   float64  data grad        tp I
        cos_default        aten.cos(getitem_1)                              (B, 4)   float64  data grad        tp I
        mul_tensor         aten.mul(sin_default, cos_default)               (B, 4)   float64  data grad        tp I
        mul_tensor_1       aten.mul(mul_tensor, getitem_2)                  (B, 4)   float64  data grad        tp I
        shard              shard(mul_tensor_1, 'tp', dim=1, of='I')         (B, 4)   float64  data grad        tp S(1)
        mul_tensor_2       aten.mul(shard, u)                               (B, 4)   float64  data grad        tp S(1)
        pow_tensor_scalar  aten.pow(mul_tensor_2, 2)                        (B, 4)   float64  data grad        tp S(1)
        sum_default        aten.sum(pow_tensor_scalar)                      ()       float64  data grad        tp P
        all_reduce         all_reduce(sum_default, 'tp')                    ()       float64  data grad        tp I
                           output all_reduce
        """,
    )


def test_a_mean_of_a_piece_is_divided_before_it_is_read() -> None:
    model = Model(lambda self, x: (x * self.scale).mean(0).pow(2).sum(), scale=parameter(8))
    same(
        function_text(typed(model, (X,), dp=2).main),
        """
        scale              scale                           (8,)    float32  parameters grad  dp R
        x                  input                           (B, 8)  float32  inputs           dp S(0)
        mul_tensor         aten.mul(x, scale)              (B, 8)  float32  data grad        dp S(0)
        mean_dim           aten.mean(mul_tensor, [0])      (8,)    float32  data grad        dp P
        part_of_mean       part_of_mean(mean_dim, 'dp')    (8,)    float32  data grad        dp P
        all_reduce         all_reduce(part_of_mean, 'dp')  (8,)    float32  data grad        dp I
        pow_tensor_scalar  aten.pow(all_reduce, 2)         (8,)    float32  data grad        dp I
        sum_default        aten.sum(pow_tensor_scalar)     ()      float32  data grad        dp I
                           output sum_default
        """,
    )


VALUE = Value(shape=(12, 12, 12, 7), dtype=torch.float32, grad=True, made_of="data")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (I, R, "invariant_to_replicated {}"),
        (P, I, "all_reduce {}"),
        (S(1), R, "all_gather {'dim': 1, 'to': 'R'}"),
        (S(1, 3), I, "all_gather {'dim': 1, 'groups': 3, 'to': 'I'}"),
        (I, S(0), "shard {'dim': 0, 'of': 'I'}"),
        (R, S(0, 2), "shard {'dim': 0, 'groups': 2, 'of': 'R'}"),
        (P, S(2), "reduce_scatter {'dim': 2}"),
        (S(0), S(1), "all_to_all {'split_dim': 1, 'concat_dim': 0}"),
        (S(3), I, "all_gather {'dim': 3, 'size': 7, 'to': 'I'}"),
        (I, S(3), "shard {'dim': 3, 'size': 7, 'of': 'I'}"),
        (P, S(3), "reduce_scatter {'dim': 3, 'size': 7}"),
    ],
    ids=str,
)
def test_each_conversion_has_its_collective(source: Type, target: Type, expected: str) -> None:
    function, options = conversion(VALUE, source, target, 2)
    assert f"{function.__name__} {options}" == expected
    assert (source.kind, target.kind) in COLLECTIVES


def test_every_conversion_with_a_price_has_a_collective() -> None:
    types = {"I": I, "R": R, "P": P, "S": S(0)}
    for source, target in COLLECTIVES:
        conversion(VALUE, types[source], S(1) if source == target == "S" else types[target], 2)


@pytest.mark.parametrize(
    ("source", "target"), [(R, I), (I, P), (S(0), P), (P, R), (S(1), S(1, 3)), (S(0, 2), S(1))], ids=str
)
def test_no_other_conversion_exists(source: Type, target: Type) -> None:
    with pytest.raises(
        KeyError, match=f"{source} -> {target} is no conversion".replace("(", r"\(").replace(")", r"\)")
    ):
        conversion(VALUE, source, target, 2)


def test_a_conversion_that_does_not_do_what_its_types_say_is_found() -> None:
    program = lowered(
        Model(lambda self, x: F.linear(x, self.up).sum(), up=parameter(16, 8)), (X,), _columns("up"), tp=2
    )
    verify(program, DEFAULT_RULES)
    graph = program.stages[0].function.graph
    (node,) = (node for node in graph.nodes if conversion_of(node))
    node.target = invariant_to_replicated
    with pytest.raises(InternalError, match="^stage 0: .*invariant_to_replicated.* converts P to I on tp$"):
        verify(program, DEFAULT_RULES)
