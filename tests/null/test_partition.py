"""The cut into pipeline stages: balanced by cost, or as the user says, and only where values may cross."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Plan, PlanError
from meshwright.compiler.text import function_text
from meshwright.passes.partition import _balance
from tests.null.passes import Model, parameter, parted, same

X = torch.randn(4, 8)


def _layers(*inner: int) -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> Any:
        x = x * self.stem
        for layer in self.h:
            x = layer(x)
        return x.sum()

    layers = [nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in inner]
    return Model(run, stem=parameter(8), h=nn.ModuleList(layers))


def _stages(model: nn.Module, plan: Plan | None = None, **mesh: int) -> str:
    """The nodes of the main function that belong to one stage, with its number before them."""
    blocks, parts = parted(model, (X,), plan, **mesh)
    return function_text(blocks.main, {node: str(stage) for node, stage in parts.stage.items()})


def test_equal_layers_are_dealt_out_evenly() -> None:
    same(
        _stages(_layers(16, 16, 16, 16), pp=2),
        """
        0  mul_tensor   aten.mul(x, stem)  (B, 8)  float32  data grad  mb S(0)
        0  h_0          h.0(mul_tensor)    (B, 8)  float32  data grad  mb S(0)
        0  h_1          h.1(h_0)           (B, 8)  float32  data grad  mb S(0)
        1  h_2          h.2(h_1)           (B, 8)  float32  data grad  mb S(0)
        1  h_3          h.3(h_2)           (B, 8)  float32  data grad  mb S(0)
        1  sum_default  aten.sum(h_3)      ()      float32  data grad  mb P
        """,
    )


def test_costs_count_and_not_the_number_of_layers() -> None:
    """One layer as large as the six others together."""
    blocks, parts = parted(_layers(96, 96, 16, 16, 16, 16, 16, 16), (X,), pp=3)
    stages = {str(node.target): stage for node, stage in parts.stage.items() if node.op == "call_module"}
    assert stages == {"h.0": 0, "h.1": 1, "h.2": 2, "h.3": 2, "h.4": 2, "h.5": 2, "h.6": 2, "h.7": 2}
    assert len(parts.costs) == 3 and max(parts.costs) == pytest.approx(parts.costs[1], rel=0.1)


@pytest.mark.parametrize(
    ("times", "allowed", "stages", "cuts"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1, 2, 3], 2, [2]),
        ([4.0, 1.0, 1.0, 1.0, 1.0], [1, 2, 3, 4], 2, [1]),
        ([4.0, 1.0, 1.0, 1.0, 1.0], [2, 3, 4], 2, [2]),
        ([1.0, 9.0, 1.0, 1.0, 1.0, 1.0], [1, 2, 3, 4, 5], 3, [1, 2]),
        ([2.0, 4.0, 6.0, 1.0, 8.0], [1, 2, 3, 4], 4, [1, 2, 4]),
        ([3.0], [], 1, []),
        ([0.0, 0.0, 1.0, 0.0, 1.0, 0.0], [1, 2, 3, 4, 5], 3, [1, 3]),
    ],
    ids=[
        "even",
        "one large",
        "not allowed there",
        "a large one alone",
        "even behind the largest",
        "one stage",
        "free nodes",
    ],
)
def test_cuts_by_hand(times: list[float], allowed: list[int], stages: int, cuts: list[int]) -> None:
    assert _balance(times, allowed, stages) == cuts


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_is_better(seed: int) -> None:
    """Against all cuts: first the largest stage counts, then the sum of squares."""
    random_ = random.Random(seed)
    times = [float(random_.choice([0, 1, 1, 2, 3, 8])) for _ in range(random_.randint(4, 10))]
    allowed = sorted(random_.sample(range(1, len(times)), random_.randint(3, len(times) - 1)))
    num_stages = random_.randint(2, min(4, len(allowed) + 1))

    def badness(cuts: tuple[int, ...]) -> tuple[float, float]:
        sums = [sum(times[a:b]) for a, b in itertools.pairwise([0, *cuts, len(times)])]
        return max(sums), sum(s * s for s in sums)

    found = tuple(_balance(times, allowed, num_stages))
    assert len(found) == num_stages - 1 and set(found) <= set(allowed)
    best = min(badness(cuts) for cuts in itertools.combinations(allowed, num_stages - 1))
    assert badness(found) == best


def test_the_users_split_is_followed() -> None:
    plan = Plan(split=("h.1", "h.3"))
    blocks, parts = parted(_layers(16, 16, 16, 16), (X,), plan, pp=3)
    assert [stage for node, stage in parts.stage.items() if node.op == "call_module"] == [0, 1, 1, 2]


def test_a_split_may_begin_at_a_module_that_is_no_block() -> None:
    model = Model(lambda self, x: self.down(torch.relu(self.up(x))).sum(), up=nn.Linear(8, 16), down=nn.Linear(16, 8))
    same(
        _stages(model, Plan(split=("down",)), pp=2),
        """
        0  linear_default    aten.linear(x, up_weight)               (B, 16)  float32  data grad  mb S(0)
        0  add_tensor        aten.add(linear_default, up_bias)       (B, 16)  float32  data grad  mb S(0)
        0  relu_default      aten.relu(add_tensor)                   (B, 16)  float32  data grad  mb S(0)
        1  linear_default_1  aten.linear(relu_default, down_weight)  (B, 8)   float32  data grad  mb S(0)
        1  add_tensor_1      aten.add(linear_default_1, down_bias)   (B, 8)   float32  data grad  mb S(0)
        1  sum_default       aten.sum(add_tensor_1)                  ()       float32  data grad  mb P
        """,
    )


def test_a_model_without_layers_is_cut_between_modules() -> None:
    model = Model(lambda self, x: self.down(torch.relu(self.up(x))).sum(), up=nn.Linear(8, 16), down=nn.Linear(16, 8))
    same(
        _stages(model, pp=2),
        """
        0  linear_default    aten.linear(x, up_weight)               (B, 16)  float32  data grad  mb S(0)
        0  add_tensor        aten.add(linear_default, up_bias)       (B, 16)  float32  data grad  mb S(0)
        0  relu_default      aten.relu(add_tensor)                   (B, 16)  float32  data grad  mb S(0)
        1  linear_default_1  aten.linear(relu_default, down_weight)  (B, 8)   float32  data grad  mb S(0)
        1  add_tensor_1      aten.add(linear_default_1, down_bias)   (B, 8)   float32  data grad  mb S(0)
        1  sum_default       aten.sum(add_tensor_1)                  ()       float32  data grad  mb P
        """,
    )


def test_what_inputs_or_parameters_alone_give_belongs_to_no_stage() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        mask, weight = x.abs().cos(), self.first.weight.tanh()
        return (self.second(F.linear(x, weight) * mask) * mask).sum()

    model = Model(run, first=nn.Linear(8, 8, bias=False), second=nn.Linear(8, 8))
    same(
        _stages(model, Plan(split=("second",)), pp=2),
        """
        0  linear_default    aten.linear(x, tanh_default)             (B, 8)  float32  data grad  mb S(0)
        0  mul_tensor        aten.mul(linear_default, cos_default)    (B, 8)  float32  data grad  mb S(0)
        1  linear_default_1  aten.linear(mul_tensor, second_weight)   (B, 8)  float32  data grad  mb S(0)
        1  add_tensor        aten.add(linear_default_1, second_bias)  (B, 8)  float32  data grad  mb S(0)
        1  mul_tensor_1      aten.mul(add_tensor, cos_default)        (B, 8)  float32  data grad  mb S(0)
        1  sum_default       aten.sum(mul_tensor_1)                   ()      float32  data grad  mb P
        """,
    )


def test_no_stage_begins_inside_of_a_sum() -> None:
    """Between first and second would be even, but there the value is partial over tp."""

    def run(self: Any, x: torch.Tensor) -> Any:
        return self.third(self.second(self.first(x)).softmax(-1)).softmax(-1).sum()

    first, second, third = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False), nn.Linear(8, 8, bias=False)
    plan = Plan(pins={"first.weight": {"tp": "S(1)"}, "second.weight": {"tp": "I"}, "third.weight": {"tp": "I"}})
    same(
        _stages(Model(run, first=first, second=second, third=third), plan, pp=2, tp=2),
        """
        0  linear_default    aten.linear(shard, first_weight)                      (B, 64)  float32  data grad  mb S(0)  tp P
        0  linear_default_1  aten.linear(linear_default, invariant_to_replicated)  (B, 8)   float32  data grad  mb S(0)  tp P
        0  all_reduce        all_reduce(linear_default_1, 'tp')                    (B, 8)   float32  data grad  mb S(0)  tp I
        0  softmax_int       aten.softmax(all_reduce, -1)                          (B, 8)   float32  data grad  mb S(0)  tp I
        1  linear_default_2  aten.linear(softmax_int, third_weight)                (B, 8)   float32  data grad  mb S(0)  tp I
        1  softmax_int_1     aten.softmax(linear_default_2, -1)                    (B, 8)   float32  data grad  mb S(0)  tp I
        1  sum_default       aten.sum(softmax_int_1)                               ()       float32  data grad  mb P     tp I
        """,  # noqa: E501
    )


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (("h.1",), "split names 1 modules for 3 stages: it takes one for each stage after the first"),
        (("h.2", "h.1"), "split=['h.2', 'h.1'] is not in the order in which the model runs these modules, or leaves a "
         "stage empty"),
        (("h.1", "h.1"), "split=['h.1', 'h.1'] is not in the order in which the model runs these modules, or leaves a "
         "stage empty"),
        (("h.1", "h.9"), "split names 'h.9', which is no module that the model runs\n  near it: h.3, h.2, h.1"),
    ],
)  # fmt: skip
def test_splits_that_are_none(split: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError) as error:
        parted(_layers(16, 16, 16, 16), (X,), Plan(split=split), pp=3)
    assert str(error.value) == message


def test_a_stage_that_would_begin_with_the_model_is_empty() -> None:
    model = Model(lambda self, x: self.down(self.up(x)).sum(), up=nn.Linear(8, 8), down=nn.Linear(8, 8))
    with pytest.raises(PlanError, match=r"^split=\['up'\] is not in the order .* or leaves a stage empty$"):
        parted(model, (X,), Plan(split=("up",)), pp=2)


def test_more_stages_than_places_to_cut() -> None:
    with pytest.raises(PlanError) as error:
        parted(_layers(16, 16), (X,), pp=8)
    assert str(error.value) == (
        "the plan asks for 8 stages, but the model has 3 places to cut it\n  use a smaller pp, or fewer stages per rank"
    )
