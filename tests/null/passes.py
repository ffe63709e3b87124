"""The passes run one by one on small models, and their texts compared: text in, text out, without processes."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from meshwright import Mesh, Plan
from meshwright.compiler.blocks import Blocks, find_blocks
from meshwright.compiler.capture import capture
from meshwright.compiler.graph import Capture
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.program import Lowered
from meshwright.passes.auto import choose
from meshwright.passes.axes import axes_of, pins_of
from meshwright.passes.cost import prices
from meshwright.passes.lower import lower
from meshwright.passes.partition import Partition, partition
from meshwright.passes.propagate import factor, propagate
from meshwright.passes.reshard import reshard
from meshwright.passes.rules import DEFAULT_RULES, is_pointwise
from meshwright.passes.schedules.planned import planned
from meshwright.passes.timing import Timing, costs, timing
from tests.null.simulate import simulate

Batch = Mapping[str, Any] | tuple[Any, ...]


class Model(nn.Module):
    """A forward as a plain function of the model and its inputs, over the given parameters, buffers and modules."""

    def __init__(self, run: Callable[..., torch.Tensor], **members: Any):
        super().__init__()
        self.run = run
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(self, x) if labels is None else self.run(self, x, labels)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def captured(model: nn.Module, *batch: Any) -> Capture:
    """What the compiler captures for a mesh with tp."""
    return capture(model, batch, segment=True, is_known=is_known)


def is_known(target: Any) -> bool:
    """Whether an operator has a rule, and stays as it is."""
    return target in DEFAULT_RULES or is_pointwise(target)


def typed(model: nn.Module, batch: Batch, plan: Plan | None = None, **mesh: int) -> Blocks:
    """The blocks with types and conversions."""
    return _typed(capture(model, batch, segment=True, is_known=is_known), Mesh(**mesh), plan or Plan())


def parted(model: nn.Module, batch: Batch, plan: Plan | None = None, **mesh: int) -> tuple[Blocks, Partition]:
    """The typed blocks and the stage of every node."""
    chosen, captured = plan or Plan(), capture(model, batch, segment=True, is_known=is_known)
    blocks = _typed(captured, Mesh(**mesh), chosen)
    return blocks, partition(blocks, mesh.get("pp", 1), chosen.split, timed(captured, blocks, chosen, **mesh).seconds)


def timed_blocks(model: nn.Module, batch: Batch, plan: Plan | None = None, **mesh: int) -> tuple[Blocks, Timing]:
    """The typed blocks and their times."""
    chosen, captured = plan or Plan(), capture(model, batch, segment=True, is_known=is_known)
    blocks = _typed(captured, Mesh(**mesh), chosen)
    return blocks, timed(captured, blocks, chosen, **mesh)


def timed(captured: Capture, blocks: Blocks, plan: Plan, **mesh: int) -> Timing:
    """The times of typed blocks."""
    priced = prices(captured.function, BATCH, captured.symbols)
    return timing(blocks, Mesh(**mesh), plan, priced, captured.symbols)


def lowered(model: nn.Module, batch: Batch, plan: Plan | None = None, **mesh: int) -> Lowered:
    """The whole program."""
    chosen, captured = plan or Plan(), capture(model, batch, segment=True, is_known=is_known)
    blocks = _typed(captured, Mesh(**mesh), chosen)
    times = timed(captured, blocks, chosen, **mesh)
    pipeline = planned(chosen, mesh.get("pp", 1)) or choose(blocks, Mesh(**mesh), chosen, times)
    parts = partition(blocks, pipeline.num_stages, chosen.split, times.seconds)
    return lower(captured, blocks, parts, costs(parts, times), Mesh(**mesh), chosen, pipeline)


def _typed(captured: Capture, mesh: Mesh, plan: Plan) -> Blocks:
    blocks = find_blocks(captured, plan)
    priced = prices(captured.function, BATCH, captured.symbols)
    factors = factor(blocks, DEFAULT_RULES)
    axes = axes_of(captured, mesh, plan)
    return reshard(
        blocks, tuple(propagate(blocks, axis, factors, priced, pins_of(captured, plan, axis.name)) for axis in axes)
    )


def check_exact(model: nn.Module, batch: tuple[torch.Tensor, ...], plan: Plan | None = None, **sizes: int) -> Blocks:
    """Run the typed program on all ranks of ``sizes`` (dp, mb, tp), and compare with one device: loss and gradients."""
    chosen = replace(plan or Plan(), microbatches=sizes.get("mb", 1))
    captured = capture(model, batch, precision="fp64", segment=True, is_known=is_known)
    blocks = _typed(captured, Mesh(**{axis: size for axis, size in sizes.items() if axis != "mb"}), chosen)
    whole = copy.deepcopy(model).double()
    doubled = tuple(leaf.double() if leaf.is_floating_point() else leaf for leaf in batch)
    loss = whole(*doubled)
    loss.backward()
    named = {leaf.name: tensor for leaf, tensor in zip(captured.inputs, doubled, strict=True)}
    got, gradients = simulate(captured, blocks, sizes, named, captured.tensors)
    torch.testing.assert_close(got, loss.detach(), rtol=1e-9, atol=1e-12, equal_nan=True)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12, equal_nan=True)
    return blocks


def same(text: str, expected: str) -> None:
    """Compare a text with a literal one, which may be indented as the code around it."""
    assert text == inspect.cleandoc(expected)
