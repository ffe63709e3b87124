"""Blocks: layers that compute the same are one function, and nothing is cut that does not come apart."""

from typing import Any

import torch
from torch import nn

from meshwright import Plan
from meshwright.compiler.blocks import Blocks, find_blocks
from meshwright.compiler.text import blocks_text
from tests.null.passes import Model, captured, parameter, same

X = torch.randn(4, 8)


class Layer(nn.Module):
    def __init__(self, width: int = 8, inner: int = 16):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))


def _through(self: Any, x: torch.Tensor) -> Any:
    x = x * self.stem  # a gradient flows into the first layer as into all others
    for layer in self.layers:
        x = layer(x)
    return x.sum()


def _model(*layers: nn.Module, run: Any = _through, **members: Any) -> nn.Module:
    return Model(run, stem=parameter(8), layers=nn.ModuleList(layers), **members)


def _blocks(model: nn.Module, plan: Plan | None = None, parted: frozenset[str] = frozenset()) -> Blocks:
    return find_blocks(captured(model, X), plan or Plan(), parted)


def _instances(blocks: Blocks) -> dict[str, tuple[str, ...]]:
    return {block.name: block.instances for block in blocks.blocks}


def test_equal_layers_are_one_block() -> None:
    same(
        blocks_text(_blocks(_model(Layer(), Layer(), Layer()))),
        """
        main
        stem         stem                  (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, stem)     (B, 8)  float32  data grad
        layers_0     layers.0(mul_tensor)  (B, 8)  float32  data grad
        layers_1     layers.1(layers_0)    (B, 8)  float32  data grad
        layers_2     layers.2(layers_1)    (B, 8)  float32  data grad
        sum_default  aten.sum(layers_2)    ()      float32  data grad
                     output sum_default

        Layer: layers.0, layers.1, layers.2
        mul_tensor            input                                            (B, 8)   float32  data grad
        layers_0_up_weight    up.weight                                        (16, 8)  float32  parameters grad
        layers_0_down_weight  down.weight                                      (8, 16)  float32  parameters grad
        linear_default        aten.linear(mul_tensor, layers_0_up_weight)      (B, 16)  float32  data grad
        relu_default          aten.relu(linear_default)                        (B, 16)  float32  data grad
        linear_default_1      aten.linear(relu_default, layers_0_down_weight)  (B, 8)   float32  data grad
        add_tensor            aten.add(mul_tensor, linear_default_1)           (B, 8)   float32  data grad
                              output add_tensor
        """,
    )


def test_a_layer_whose_input_has_no_gradient_stands_alone() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return self.layers[2](self.layers[1](self.layers[0](x))).sum()

    assert _instances(_blocks(_model(Layer(), Layer(), Layer(), run=run))) == {"Layer": ("layers.1", "layers.2")}


def test_layers_of_other_shapes_are_other_blocks() -> None:
    blocks = _blocks(_model(Layer(), Layer(inner=32), Layer(), Layer(inner=32)))
    assert _instances(blocks) == {"Layer": ("layers.0", "layers.2"), "Layer2": ("layers.1", "layers.3")}


def test_layers_pinned_otherwise_are_other_blocks() -> None:
    plan = Plan(pins={"layers.[01].up.weight": {"tp": "I"}})
    blocks = _blocks(_model(Layer(), Layer(), Layer(), Layer()), plan)
    assert _instances(blocks) == {"Layer": ("layers.0", "layers.1"), "Layer2": ("layers.2", "layers.3")}


def test_frozen_layers_are_other_blocks() -> None:
    model = _model(Layer(), Layer(), Layer(), Layer())
    for layer in model.layers[:2]:  # type: ignore[index]
        layer.up.weight.requires_grad_(False)
    assert _instances(_blocks(model)) == {"Layer": ("layers.0", "layers.1"), "Layer2": ("layers.2", "layers.3")}


def test_a_constant_that_differs_makes_another_block() -> None:
    class Scaled(Layer):
        def __init__(self, by: float):
            super().__init__()
            self.by = by

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) * self.by

    blocks = _blocks(_model(Scaled(2.0), Scaled(3.0), Scaled(2.0), Scaled(3.0)))
    assert _instances(blocks) == {"Scaled": ("layers.0", "layers.2"), "Scaled2": ("layers.1", "layers.3")}


def test_a_single_layer_is_no_block() -> None:
    assert _instances(_blocks(_model(Layer()))) == {}


def test_modules_of_one_or_two_operators_stay_inline() -> None:
    def linear() -> nn.Module:
        return nn.Linear(8, 8, bias=False)

    assert _instances(_blocks(_model(linear(), nn.ReLU(), linear(), nn.ReLU()))) == {}


def test_the_outermost_repeated_module_is_the_block() -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor) -> Any:
            return self.parts[1](self.parts[0](x))

    assert _instances(_blocks(_model(Group(), Group()))) == {"Group": ("layers.0", "layers.1")}


class Halves(Layer):
    def forward(self, x: torch.Tensor, second: bool = False) -> Any:
        return torch.relu(self.down(x)) * 2 if second else torch.relu(self.up(x)) * 2


def test_a_module_that_waits_for_what_reads_it_is_not_cut() -> None:
    """What stands between the halves of a layer reads the first and is read by the second."""

    def run(self: Any, x: torch.Tensor) -> Any:
        x = x * self.stem
        for layer in self.layers:
            x = layer(layer(x).cos(), second=True)
        return x.sum()

    assert _instances(_blocks(_model(Halves(), Halves(), run=run))) == {}


def test_one_that_is_not_cut_keeps_no_other_from_it() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        x, total = x * self.stem, x.sum()
        for layer, waits in zip(self.layers, (False, True, False), strict=True):
            first, wide = layer(x), torch.cat([x, x], 1)
            total = total + layer(first.cos() if waits else wide.cos(), second=True).sum() + first.sum()
        return total

    model = _model(Halves(), Halves(), Halves(), run=run)
    assert _instances(_blocks(model)) == {"Halves": ("layers.0", "layers.2")}


def test_modules_that_wait_for_each_other_are_not_cut() -> None:
    """Each layer's second half reads the other's first: neither can be called before the other."""

    def run(self: Any, x: torch.Tensor) -> Any:
        one, two = self.layers
        x = x * self.stem
        first, second = one(x), two(x)
        return (one(second, second=True) + two(first, second=True)).sum()

    assert _instances(_blocks(_model(Halves(), Halves(), run=run))) == {}


def test_a_layer_that_is_called_twice_in_a_row_is_one_call() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        x = x * self.stem
        for layer in self.layers:
            x = layer(layer(x))
        return x.sum()

    same(
        blocks_text(_blocks(_model(Layer(), Layer(), run=run))),
        """
        main
        stem         stem                  (8,)    float32  parameters grad
        x            input                 (B, 8)  float32  inputs
        mul_tensor   aten.mul(x, stem)     (B, 8)  float32  data grad
        layers_0     layers.0(mul_tensor)  (B, 8)  float32  data grad
        layers_1     layers.1(layers_0)    (B, 8)  float32  data grad
        sum_default  aten.sum(layers_1)    ()      float32  data grad
                     output sum_default

        Layer: layers.0, layers.1
        mul_tensor            input                                              (B, 8)   float32  data grad
        layers_0_up_weight    up.weight                                          (16, 8)  float32  parameters grad
        layers_0_down_weight  down.weight                                        (8, 16)  float32  parameters grad
        linear_default        aten.linear(mul_tensor, layers_0_up_weight)        (B, 16)  float32  data grad
        relu_default          aten.relu(linear_default)                          (B, 16)  float32  data grad
        linear_default_1      aten.linear(relu_default, layers_0_down_weight)    (B, 8)   float32  data grad
        add_tensor            aten.add(mul_tensor, linear_default_1)             (B, 8)   float32  data grad
        linear_default_2      aten.linear(add_tensor, layers_0_up_weight)        (B, 16)  float32  data grad
        relu_default_1        aten.relu(linear_default_2)                        (B, 16)  float32  data grad
        linear_default_3      aten.linear(relu_default_1, layers_0_down_weight)  (B, 8)   float32  data grad
        add_tensor_1          aten.add(add_tensor, linear_default_3)             (B, 8)   float32  data grad
                              output add_tensor_1
        """,
    )


def test_a_weight_shared_by_layers_is_an_input_of_theirs() -> None:
    first, second = Layer(), Layer()
    second.up.weight = first.up.weight
    same(
        blocks_text(_blocks(_model(first, second))),
        """
        main
        stem                stem                                      (8,)     float32  parameters grad
        layers_0_up_weight  layers.0.up.weight                        (16, 8)  float32  parameters grad
        x                   input                                     (B, 8)   float32  inputs
        mul_tensor          aten.mul(x, stem)                         (B, 8)   float32  data grad
        layers_0            layers.0(mul_tensor, layers_0_up_weight)  (B, 8)   float32  data grad
        layers_1            layers.1(layers_0, layers_0_up_weight)    (B, 8)   float32  data grad
        sum_default         aten.sum(layers_1)                        ()       float32  data grad
                            output sum_default

        Layer: layers.0, layers.1
        mul_tensor            input                                            (B, 8)   float32  data grad
        layers_0_up_weight    input                                            (16, 8)  float32  parameters grad
        layers_0_down_weight  down.weight                                      (8, 16)  float32  parameters grad
        linear_default        aten.linear(mul_tensor, layers_0_up_weight)      (B, 16)  float32  data grad
        relu_default          aten.relu(linear_default)                        (B, 16)  float32  data grad
        linear_default_1      aten.linear(relu_default, layers_0_down_weight)  (B, 8)   float32  data grad
        add_tensor            aten.add(mul_tensor, linear_default_1)           (B, 8)   float32  data grad
                              output add_tensor
        """,
    )


def test_several_inputs_and_results() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            x = torch.relu(self.up(x))
            return x + y, x * y

    def run(self: Any, x: torch.Tensor) -> Any:
        x = y = x * self.stem
        x = x.relu()
        for layer in self.layers:
            x, y = layer(x, y)
        return (x + y).sum()

    same(
        blocks_text(_blocks(_model(Pair(), Pair(), run=run))),
        """
        main
        stem          stem                            (8,)    float32  parameters grad
        x             input                           (B, 8)  float32  inputs
        mul_tensor    aten.mul(x, stem)               (B, 8)  float32  data grad
        relu_default  aten.relu(mul_tensor)           (B, 8)  float32  data grad
        layers_0      layers.0(relu_default, mul_tensor)
        getitem       getitem(layers_0, 0)            (B, 8)  float32  data grad
        getitem_1     getitem(layers_0, 1)            (B, 8)  float32  data grad
        layers_1      layers.1(getitem, getitem_1)
        getitem_2     getitem(layers_1, 0)            (B, 8)  float32  data grad
        getitem_3     getitem(layers_1, 1)            (B, 8)  float32  data grad
        add_tensor_4  aten.add(getitem_2, getitem_3)  (B, 8)  float32  data grad
        sum_default   aten.sum(add_tensor_4)          ()      float32  data grad
                      output sum_default

        Pair: layers.0, layers.1
        relu_default        input                                          (B, 8)  float32  data grad
        mul_tensor          input                                          (B, 8)  float32  data grad
        layers_0_up_weight  up.weight                                      (8, 8)  float32  parameters grad
        layers_0_up_bias    up.bias                                        (8,)    float32  parameters grad
        linear_default      aten.linear(relu_default, layers_0_up_weight)  (B, 8)  float32  data grad
        add_tensor          aten.add(linear_default, layers_0_up_bias)     (B, 8)  float32  data grad
        relu_default_1      aten.relu(add_tensor)                          (B, 8)  float32  data grad
        add_tensor_1        aten.add(relu_default_1, mul_tensor)           (B, 8)  float32  data grad
        mul_tensor_1        aten.mul(relu_default_1, mul_tensor)           (B, 8)  float32  data grad
                            output add_tensor_1, mul_tensor_1
        """,
    )


def test_modules_that_a_stage_begins_in_are_not_closed() -> None:
    layers = Layer(), Layer(), Layer()
    assert _instances(_blocks(_model(*layers), parted=frozenset({"layers.1.down"}))) == {
        "Layer": ("layers.0", "layers.2")
    }
