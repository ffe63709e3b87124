"""Types alone, without runtime and emission: all ranks as threads of one process equal one device."""

import copy
from typing import Any

import pytest
import torch

from meshwright import Mesh, Plan
from meshwright.compiler.blocks import find_blocks
from meshwright.compiler.capture import capture
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.precision import float64
from meshwright.passes.axes import axes_of, pins_of
from meshwright.passes.cost import prices
from meshwright.passes.propagate import factor, propagate
from meshwright.passes.reshard import reshard
from meshwright.passes.rules import DEFAULT_RULES
from tests import models
from tests.null.simulate import simulate

CASES: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("mlp", {"dp": 2, "mb": 3, "tp": 2}, {}, "plain"),
    ("llama", {"dp": 2, "mb": 2, "tp": 2}, {"sequence_parallel": True}, "padded"),
    ("gpt2", {"mb": 3, "tp": 2}, {}, "uneven"),
    ("falcon", {"dp": 3, "tp": 4}, {}, "uneven"),
]


@pytest.mark.parametrize(("name", "sizes", "plan", "kind"), CASES)
def test_types_are_exact(name: str, sizes: dict[str, int], plan: dict[str, Any], kind: str) -> None:
    model, batch = models.build(name), models.batch(name, kind)
    mesh = Mesh(**{axis: size for axis, size in sizes.items() if axis != "mb"})
    chosen = Plan(microbatches=sizes.get("mb", 1), **plan)
    captured = capture(model, batch, precision="fp64", segment=True)
    blocks = find_blocks(captured, chosen)
    priced = prices(captured.function, BATCH, captured.symbols)
    tables = factor(blocks, DEFAULT_RULES)
    typed = reshard(
        blocks,
        tuple(
            propagate(blocks, a, tables, priced, pins_of(captured, chosen, a.name))
            for a in axes_of(captured, mesh, chosen)
        ),
    )
    reference = copy.deepcopy(model).double()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with float64():
        result = reference(**doubled)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    loss.backward()
    got, gradients = simulate(captured, typed, sizes, doubled, captured.tensors)
    assert abs(got.item() - loss.item()) <= 1e-9 * abs(loss.item())
    for parameter_name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        difference = (gradients[parameter_name] - parameter.grad).norm() / (parameter.grad.norm() + 1e-12)
        assert difference <= 1e-9, f"{parameter_name}: {difference:.1e}"
