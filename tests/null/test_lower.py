"""Lowering: what each stage reads, receives, prepares, sends and holds."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Plan, PlanError
from meshwright.compiler.program import Lowered
from meshwright.compiler.text import stage_text
from tests.null.passes import Model, check_exact, lowered, parameter, same

X = torch.randn(4, 8)
TOKENS = torch.randint(10, (4, 6))


def _text(program: Lowered) -> str:
    return "\n\n".join(stage_text(stage) for stage in program.stages)


def _linears(run: Any, count: int, **members: Any) -> nn.Module:
    modules = {name: nn.Linear(8, 8, bias=False) for name in "abcd"[:count]}
    return Model(run, **modules, **members)


def _where(program: Lowered) -> dict[str, tuple[int, ...]]:
    return {name: placed.stages for name, placed in program.parameters.items()}


def test_an_edge_for_every_value_that_crosses() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        left = self.a(x)
        right = left.relu()
        return (self.b(left) * right).sum()

    same(
        _text(lowered(_linears(run, 2), (X,), Plan(split=("b",)), pp=2)),
        """
        stage 0
        inputs x
        sends linear_default: 0 -> 1
        sends relu_default: 0 -> 1
        a_weight        a.weight                   (8, 8)  float32  parameters grad  mb R
        x               input                      (B, 8)  float32  inputs           mb S(0)
        linear_default  aten.linear(x, a_weight)   (B, 8)  float32  data grad        mb S(0)
        relu_default    aten.relu(linear_default)  (B, 8)  float32  data grad        mb S(0)
                        output linear_default, relu_default

        stage 1
        receives linear_default: 0 -> 1
        receives relu_default: 0 -> 1
        linear_default    input                                     (B, 8)  float32  data grad        mb S(0)
        relu_default      input                                     (B, 8)  float32  data grad        mb S(0)
        b_weight          b.weight                                  (8, 8)  float32  parameters grad  mb R
        linear_default_1  aten.linear(linear_default, b_weight)     (B, 8)  float32  data grad        mb S(0)
        mul_tensor        aten.mul(linear_default_1, relu_default)  (B, 8)  float32  data grad        mb S(0)
        sum_default       aten.sum(mul_tensor)                      ()      float32  data grad        mb P
                          output sum_default
        """,
    )


def test_a_value_that_skips_a_stage_goes_straight() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        first = self.a(x)
        return self.c(self.b(first).relu() + first).mul(first).sum()

    program = lowered(_linears(run, 3), (X,), Plan(split=("b", "c"), schedule="gpipe"), pp=3)
    edges = [(e.name, e.source, e.destinations) for stage in program.stages for e in stage.sends]
    assert edges == [("linear_default", 0, (1, 2)), ("add_tensor", 1, (2,))]
    assert [[e.name for e in stage.receives] for stage in program.stages] == [
        [],
        ["linear_default"],
        ["linear_default", "add_tensor"],
    ]
    assert program.warnings == ()


def test_what_the_inputs_alone_give_is_made_in_every_stage_that_reads_it() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        mask = x.abs().cos()
        return (self.b(self.a(x) * mask) * mask).sum()

    same(
        _text(lowered(_linears(run, 2), (X,), Plan(split=("b",)), pp=2)),
        """
        stage 0
        inputs x
        sends mul_tensor: 0 -> 1
        a_weight        a.weight                               (8, 8)  float32  parameters grad  mb R
        x               input                                  (B, 8)  float32  inputs           mb S(0)
        abs_default     aten.abs(x)                            (B, 8)  float32  inputs           mb S(0)
        cos_default     aten.cos(abs_default)                  (B, 8)  float32  inputs           mb S(0)
        linear_default  aten.linear(x, a_weight)               (B, 8)  float32  data grad        mb S(0)
        mul_tensor      aten.mul(linear_default, cos_default)  (B, 8)  float32  data grad        mb S(0)
                        output mul_tensor

        stage 1
        inputs x
        receives mul_tensor: 0 -> 1
        mul_tensor        input                                    (B, 8)  float32  data grad        mb S(0)
        b_weight          b.weight                                 (8, 8)  float32  parameters grad  mb R
        x                 input                                    (B, 8)  float32  inputs           mb S(0)
        abs_default       aten.abs(x)                              (B, 8)  float32  inputs           mb S(0)
        cos_default       aten.cos(abs_default)                    (B, 8)  float32  inputs           mb S(0)
        linear_default_1  aten.linear(mul_tensor, b_weight)        (B, 8)  float32  data grad        mb S(0)
        mul_tensor_1      aten.mul(linear_default_1, cos_default)  (B, 8)  float32  data grad        mb S(0)
        sum_default       aten.sum(mul_tensor_1)                   ()      float32  data grad        mb P
                          output sum_default
        """,
    )


def test_a_parameter_tied_over_stages_is_held_by_both() -> None:
    table, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = table.weight

    def run(self: Any, tokens: torch.Tensor) -> Any:
        return self.head(self.a(self.table(tokens))).pow(2).sum()

    program = lowered(_linears(run, 1, table=table, head=head), (TOKENS,), Plan(split=("head",)), pp=2)
    assert _where(program) == {"a.weight": (0,), "table.weight": (0, 1)}
    assert program.parameters["table.weight"].parameter.aliases == ("head.weight",)


def test_what_parameters_alone_give_is_made_in_every_stage_that_reads_it() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        scale = self.scale.exp()
        return (self.b(self.a(x) * scale) * scale).sum()

    program = lowered(_linears(run, 2, scale=parameter(8)), (X,), Plan(split=("b",)), pp=2)
    assert _where(program) == {"scale": (0, 1), "a.weight": (0,), "b.weight": (1,)}
    assert [edge.name for stage in program.stages for edge in stage.sends] == ["mul_tensor"]


def test_a_count_over_the_batch_is_prepared_once_per_step() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.cross_entropy(self.b(self.a(x).relu()), labels)

    batch = (X, torch.randint(8, (4,)))
    same(
        _text(lowered(_linears(run, 2), batch, Plan(split=("b",), microbatches=2), dp=2, pp=2)),
        """
        stage 0
        inputs x
        sends relu_default: 0 -> 1
        a_weight        a.weight                   (8, 8)  float32  parameters grad  dp R     mb R
        x               input                      (B, 8)  float32  inputs           dp S(0)  mb S(0)
        linear_default  aten.linear(x, a_weight)   (B, 8)  float32  data grad        dp S(0)  mb S(0)
        relu_default    aten.relu(linear_default)  (B, 8)  float32  data grad        dp S(0)  mb S(0)
                        output relu_default

        stage 1
        inputs labels
        receives relu_default: 0 -> 1
        relu_default      input                                                     (B, 8)  float32  data grad        dp S(0)  mb S(0)
        b_weight          b.weight                                                  (8, 8)  float32  parameters grad  dp R     mb R
        labels            input                                                     (B,)    int64    inputs           dp S(0)  mb S(0)
        linear_default_1  aten.linear(relu_default, b_weight)                       (B, 8)  float32  data grad        dp S(0)  mb S(0)
        cross_entropy     cross_entropy(linear_default_1, labels, reduction='sum')  ()      float32  data grad        dp P     mb P
        num_valid         input                                                     ()      int64    inputs           dp I     mb I
        div_tensor        aten.div(cross_entropy, num_valid)                        ()      float32  data grad        dp P     mb P
                          output div_tensor
        prepares num_valid
        labels       input                          (B,)  int64  inputs  dp S(0)
        ne_scalar    aten.ne(labels, -100)          (B,)  bool   inputs  dp S(0)
        sum_default  aten.sum(ne_scalar)            ()    int64  inputs  dp P
        all_reduce   all_reduce(sum_default, 'dp')  ()    int64  inputs  dp I
                     output all_reduce
        """,  # noqa: E501
    )


def test_a_mean_over_the_batch_is_prepared_whole() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.a(x).sum() / labels.mean()

    program = lowered(_linears(run, 1), (X, torch.rand(4)), Plan(microbatches=2), dp=2)
    (stage,) = program.stages
    assert stage.prepare is not None
    same(
        stage_text(stage).partition("prepares ")[2],
        """
        mean
        labels        input                             (B,)  float32  inputs  dp S(0)
        mean_default  aten.mean(labels)                 ()    float32  inputs  dp P
        part_of_mean  part_of_mean(mean_default, 'dp')  ()    float32  inputs  dp P
        all_reduce    all_reduce(part_of_mean, 'dp')    ()    float32  inputs  dp I
                      output all_reduce
        """,
    )


def test_two_counts_have_names_of_their_own() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.a(x)
        one = F.cross_entropy(logits, labels)
        return one + F.cross_entropy(logits * 2, labels, ignore_index=3)

    program = lowered(_linears(run, 1), (X, torch.randint(8, (4,))), Plan(microbatches=2))
    (stage,) = program.stages
    assert stage.prepares == ("num_valid", "num_valid_1") and stage.prepare is not None
    assert len(stage.prepare.results()) == 2
    assert {node.name for node in stage.function.inputs()} == {"x", "labels", *stage.prepares}


def test_a_sum_named_like_an_input_takes_another_name() -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        loss = (self.a(x) * labels[:, None]).sum()
        labels = labels.sum()
        return loss / labels

    program = lowered(_linears(run, 1), (X, torch.rand(4)), Plan(microbatches=2))
    (stage,) = program.stages
    assert stage.prepares == ("labels_1",)
    assert [node.name for node in stage.function.inputs()] == ["x", "labels", "labels_1"]


def test_what_no_stage_reads_is_nowhere() -> None:
    model = _linears(lambda self, x: self.a(x).sum(), 2)
    assert _where(lowered(model, (X,), dp=2)) == {"a.weight": (0,)}


def test_types_at_rest_and_in_use() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return self.b(self.a(x).relu()).softmax(-1).pow(2).mul(self.scale).sum()

    def held(**plan: Any) -> dict[str, dict[str, str]]:
        program = lowered(_linears(run, 2, scale=parameter(8)), (X,), Plan(**plan), dp=2, tp=2)
        return {name: {axis: str(h) for axis, h in p.held.items()} for name, p in program.parameters.items()}

    pins = {"a.weight": {"tp": "S(0)"}}
    assert held(pins=pins) == {
        "scale": {"dp": "I -> R", "tp": "I"},
        "a.weight": {"dp": "I -> R", "tp": "S(0)"},
        "b.weight": {"dp": "I -> R", "tp": "S(1)"},
    }
    assert held(pins=pins, zero=3)["a.weight"] == {"dp": "S(0) -> R", "tp": "S(0)"}
    assert held(pins={"scale": {"dp": "S(0)"}})["scale"]["dp"] == "S(0) -> R"


def test_a_pin_on_dp_along_another_dim() -> None:
    with pytest.raises(PlanError) as error:
        lowered(_linears(lambda self, x: self.a(x).sum(), 1), (X,), Plan(pins={"a.*": {"dp": "S(1)"}}), dp=2)
    assert str(error.value) == (
        "the pin 'a.*' wants dp=S(1) for 'a.weight': over dp parameters are whole (I) or split as S(0)"
    )


def test_numbers_of_the_samples_are_cut_over_replicas_and_refused_in_time() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return (self.a(x) * torch.arange(x.shape[0])[:, None]).sum()

    check_exact(_linears(run, 1), (X,), dp=2)
    with pytest.raises(PlanError, match="^the batch cannot be cut into microbatches without changing the result"):
        lowered(_linears(run, 1), (X,), Plan(microbatches=2))


def test_buffers_are_held_where_they_are_read() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return (self.b(self.a(x) + self.early) * self.late * self.early).sum()

    members = {"early": nn.Buffer(torch.ones(8)), "late": nn.Buffer(torch.ones(8), persistent=False)}
    program = lowered(_linears(run, 2, **members), (X,), Plan(split=("b",)), pp=2)
    assert {name: kept.stages for name, kept in program.buffers.items()} == {"early": (0, 1), "late": (1,)}


def test_blocks_hold_the_parameters_of_their_instances() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)])

    def run(self: Any, x: torch.Tensor) -> Any:
        return self.layers[1](self.layers[0](x * self.scale)).sum()

    program = lowered(Model(run, scale=parameter(8), layers=layers), (X,), Plan(split=("layers.1",)), pp=2)
    assert _where(program) == {
        "scale": (0,),
        **{f"layers.{i}.{j}.{name}": (i,) for i in (0, 1) for j in (0, 2) for name in ("weight", "bias")},
    }
    assert sorted(program.blocks) == ["layers.0", "layers.1"] and program.blocks["layers.0"].name == "Sequential"
