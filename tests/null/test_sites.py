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


def test_an_edited_split_is_found(tmp_path: Path) -> None:
    directory = _compile(lambda linear, x: F.dropout(linear(x), 0.5)).emit(tmp_path / "bundle")
    verify_bundle(directory)
    stage = directory / "stages" / "stage_0.py"
    assert 'self.dropout = param.random("dropout", dp="S(0)")' in stage.read_text()
    stage.write_text(stage.read_text().replace('param.random("dropout", dp="S(0)")', 'param.random("dropout")'))
    with pytest.raises(BundleError, match="draws from 'dropout', split as {}, which the manifest does not have"):
        verify_bundle(directory)
