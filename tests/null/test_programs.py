"""Random programs typed for random meshes equal one device; and those that once did not, each by its reason."""

from typing import Any

import pytest
import torch
from hypothesis import given
from torch.nn import functional as F

from meshwright import Plan
from tests.null.passes import Model, captured, check_exact, parameter
from tests.programs.checking import check_types, holds, property_settings
from tests.programs.drawing import Case, cases


@property_settings(examples=12)
@given(cases())
def test_random_programs_have_exact_types(case: Case) -> None:
    holds(check_types, case)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.out(memory))


def test_what_no_rule_splits_is_split_where_it_enters_a_block() -> None:
    """A row of the sequence written in place: whole on every rank, but the layers take pieces of sequences."""

    def run(model: Any, tokens: torch.Tensor) -> Any:
        x, memory = model.embed(tokens), model.table(tokens)
        memory = memory.clone()
        memory[:, 0] += 1.0
        for layer in model.layers:
            x = layer(x, memory)
        return x.square().mean()

    layers = torch.nn.ModuleList(Layer() for _ in range(2))
    embed, table = torch.nn.Embedding(5, 4), torch.nn.Embedding(5, 6)
    model = Model(run, layers=layers, embed=embed, table=table)
    check_exact(model, (torch.randint(5, (2, 6)),), Plan(sequence_parallel=True), tp=3)


@pytest.mark.parametrize("used", [0, 2])
def test_a_part_of_an_uneven_split_is_whole(used: int) -> None:
    """10 in parts of 4, 4 and 2: the last alone looks like a fifth."""

    def run(model: Any, x: torch.Tensor) -> Any:
        return (x @ model.weight).split(4, dim=1)[used].square().mean()

    check_exact(Model(run, weight=parameter(6, 10)), (torch.randn(4, 6),), tp=2)


def test_views_that_torch_composes_are_taken_apart() -> None:
    """movedim, narrow, tensor_split, expand_as: without a rule they ran whole, and were refused in microbatches."""

    def run(model: Any, x: torch.Tensor) -> Any:
        y = (x @ model.weight).movedim(0, 1).narrow(0, 1, 3).movedim(0, 1)
        left, right = y.tensor_split([1], dim=1)
        return (F.normalize(right, dim=-1) * left.expand_as(right)).sum()

    check_exact(Model(run, weight=parameter(6, 4)), (torch.randn(4, 6),), dp=2, mb=2)


def test_soft_targets_in_microbatches() -> None:
    """The mean is over rows, whose number is no value with a gradient that would have to be summed in time."""

    def run(model: Any, x: torch.Tensor) -> Any:
        logits = x @ model.weight
        weights, targets = torch.linspace(0.5, 2.0, 4), x[:, :4].softmax(-1)
        weighted = F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.1)
        return weighted + F.cross_entropy(logits, logits.detach().softmax(-1), reduction="sum")

    check_exact(Model(run, weight=parameter(6, 4)), (torch.randn(4, 6),), dp=2, mb=2, tp=2)


def test_a_size_that_the_model_takes_for_another_is_fixed() -> None:
    """torch would check at run time that there are as many labels as patches; the program relies on it."""

    def run(model: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        patches = (x.unflatten(-1, (3, 2)) @ model.weight).sum(-1)
        return (patches.flatten() * labels.flatten()).mean()

    found = captured(Model(run, weight=parameter(2, 4)), torch.randn(4, 6), torch.randint(5, (4, 3)))
    assert found.fixed == ("T = 3: the model needs 3*B to be B*T",)
    assert [leaf.shape[1] for leaf in found.inputs] == [6, 3]


def test_what_is_read_through_a_detach_alone_does_not_learn() -> None:
    def run(model: Any, x: torch.Tensor) -> Any:
        y = x @ model.weight
        return (y * (y @ model.aside).detach()).mean()

    found = captured(Model(run, weight=parameter(6, 4), aside=parameter(4, 4)), torch.randn(4, 6))
    assert {name: p.trainable for name, p in found.parameters.items()} == {"weight": True, "aside": False}
