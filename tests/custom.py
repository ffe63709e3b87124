"""Operators of a library of the user's own."""

from typing import Any

import torch


@torch.library.custom_op("meshwright_tests::halve", mutates_args=())
def halve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every row half of it times the weight."""
    return 0.5 * x * weight


@halve.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = ctx.saved_tensors
    return 0.5 * grad * weight, (0.5 * grad * x).sum(tuple(range(x.ndim - 1)))


halve.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("meshwright_tests::write", mutates_args=("x",))
def write(x: torch.Tensor) -> None:
    """Changes its argument."""
    x.add_(1.0)
