"""The sites of random operators: numbered by the model's calls, drawn again by one device; and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import BundleError, Mesh, Plan, PlanError, UnsupportedError, compile_parallel
from meshwright.api import Program
from meshwright.codegen.bundle import verify_bundle
from meshwright.testing import exact_random
from tests import noisy


def test_one_device_draws_again_what_it_drew() -> None:
    model, batch = noisy.build(), noisy.batch()
    losses = []
    for seed, step in [(0, 0), (0, 0), (1, 0), (0, 1)]:
        with exact_random(seed=seed, step=step):
            losses.append(model(**batch).item())
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_one_device_refuses_what_a_program_cannot_have() -> None:
    with pytest.raises(UnsupportedError, match=r"^aten.randperm.default draws random numbers in a way"), exact_random():
        torch.randperm(4)


def _compile(forward: Callable[[nn.Linear, torch.Tensor], torch.Tensor], **plan: Any) -> Program:
    return compile_parallel(
        nn.Linear(4, 4),
        Mesh(dp=2),
        example_inputs=(torch.randn(4, 4),),
        loss_fn=lambda model, batch: forward(model, batch[0]).sum(),  # type: ignore[arg-type]
        plan=Plan(**plan),
    )


def test_other_random_operators_are_refused_by_name_and_line() -> None:
    with pytest.raises(UnsupportedError) as error:
        _compile(lambda linear, x: linear(x)[torch.randperm(4)])
    assert str(error.value).splitlines()[0].startswith("aten.randperm.default at test_sites.py:")
    assert str(error.value).endswith(
        " draws random numbers in a way that is not supported: dropout, bernoulli, rand, randn, uniform_ and normal_ "
        "are\n  write it with one of these"
    )


def test_the_generators_of_python_and_numpy_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^the model draws random numbers with numpy.random in its forward"):
        _compile(lambda linear, x: linear(x) * float(numpy.random.rand()))


@pytest.mark.parametrize(
    ("noise", "operator"),
    [
        (lambda x: torch.empty(4, 4).bernoulli_(), "rand"),
        (lambda x: torch.empty_like(x).bernoulli_(torch.full((4, 4), 0.5)), "rand"),
        (lambda x: torch.bernoulli(x.sigmoid()), "rand"),
        (lambda x: x.new_zeros(4, 1).uniform_(1, 2), "rand"),
        (lambda x: torch.rand(4), "rand"),
        (lambda x: torch.randn_like(x), "randn"),
        (lambda x: torch.zeros_like(x).normal_(1, 2), "randn"),
        (lambda x: torch.normal(1.0, 2.0, (4,)), "randn"),
        (lambda x: torch.native_dropout(x, 0.5, True)[0], "dropout"),
        (lambda x: F.dropout2d(x[None, None], 0.5)[0, 0], "feature_dropout"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "attention_with_dropout"),
    ],
)
def test_every_way_to_draw_has_a_site(noise: Callable[[torch.Tensor], torch.Tensor], operator: str) -> None:
    """And one device draws for each as often as a program does."""
    program = _compile(lambda linear, x: linear(x) * noise(linear(x)))
    (drawn,) = program.lowered.random.values()
    assert (drawn.site.number, drawn.site.operator) == (0, operator)
    first, second = torch.randn(2, 4, 4)
    with exact_random():
        noise(first)
        before = noise(second)
    with exact_random():
        torch.rand(1)
        assert torch.equal(noise(second), before)


def test_the_mask_of_a_dropout_is_not_read() -> None:
    with pytest.raises(UnsupportedError, match=r"^the mask of native_dropout at test_sites.py:\d+ is read"):
        _compile(lambda linear, x: linear(x) * torch.native_dropout(linear(x), 0.5, True)[1])


def test_what_does_not_draw_needs_no_site() -> None:
    program = _compile(
        lambda linear, x: F.dropout(F.dropout(F.dropout(linear(x), 0.0), 0.5, training=False), 1.0) + linear(x)
    )
    assert not program.lowered.random


def test_sites_do_not_depend_on_the_mesh() -> None:
    programs = [
        compile_parallel(noisy.build(), mesh, example_inputs=noisy.batch(), plan=Plan(microbatches=2))
        for mesh in (Mesh(dp=1), Mesh(pp=2), Mesh(tp=2))
    ]
    one, *others = [{name: drawn.site for name, drawn in p.lowered.random.items()} for p in programs]
    assert all(sites == one for sites in others)
    numbers = [site.number for site in one.values()]
    assert numbers == [n for n in range(len(numbers) + 1) if n != 14], "what nobody reads has a number all the same"


def test_unknown_choice() -> None:
    with pytest.raises(PlanError, match="^random='slow': random numbers are drawn 'fast' or 'exact'$"):
        Plan(random="slow")  # type: ignore[arg-type]


def test_a_call_with_many_arguments_has_one_on_a_line(tmp_path: Path) -> None:
    def forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        query_with_a_long_name = linear(x) * 2
        key_with_a_long_name = linear(x) + query_with_a_long_name
        value_with_a_long_name = linear(x) - key_with_a_long_name
        mask_with_a_long_name = (x > -9).float()
        return F.scaled_dot_product_attention(
            query_with_a_long_name, key_with_a_long_name, value_with_a_long_name, mask_with_a_long_name, 0.5, scale=0.1
        )

    lines = (_compile(forward).emit(tmp_path / "bundle") / "stages" / "stage_0.py").read_text().splitlines()
    assert "            key_with_a_long_name," in lines and "            scale=0.1," in lines
    assert max(map(len, lines)) <= 120


def test_an_edited_split_is_found(tmp_path: Path) -> None:
    directory = _compile(lambda linear, x: F.dropout(linear(x), 0.5)).emit(tmp_path / "bundle")
    verify_bundle(directory)
    stage = directory / "stages" / "stage_0.py"
    assert 'self.dropout = param.random("dropout", dp="S(0)")' in stage.read_text()
    stage.write_text(stage.read_text().replace('param.random("dropout", dp="S(0)")', 'param.random("dropout")'))
    with pytest.raises(BundleError, match="draws from 'dropout', split as {}, which the manifest does not have"):
        verify_bundle(directory)
