"""Buffers that forward writes to: storing values in them, and batch normalization over the pieces of a batch."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from meshwright.runtime.groups import current


def store(
    buffer: torch.Tensor,
    value: torch.Tensor,
    training: bool,
    *,
    every: Literal["microbatch", "step"] = "microbatch",
) -> None:
    """In training ``buffer`` holds ``value`` from now on; in evaluation it stays as it is.

    every: "step" stores once per step, at the last microbatch, so that all of them read what was there before.
    """
    if training and (every == "microbatch" or current().microbatch == current().microbatches - 1):
        with torch.no_grad():
            buffer.copy_(value)


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    *,
    momentum: float = 0.0,
    num_batches: torch.Tensor | None = None,
    eps: float,
    over: Sequence[str] = (),
) -> torch.Tensor:
    """``F.batch_norm`` of (samples, channels, ...) whose samples or places are split over the axes ``over``.

    In training the statistics are those of all pieces together, and the running ones move towards them by
    ``momentum``, or become the average of ``num_batches`` batches where that is given; else the running ones
    normalize. The backward is that of the whole: one gather forward and one sum backward for each axis.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if num_batches is not None:
        momentum = 1.0 / float(num_batches)
    axes = tuple(axis for axis in over if current().size(axis) > 1)
    if not axes:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    count, mean, squares = _statistics(x.detach(), axes)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((squares / (count - 1)).to(running_var.dtype), momentum)
    return _normalized(x, weight, bias, count, mean, squares / count, eps, axes)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *statistics: Any
) -> torch.Tensor:
    operands = [t for t in (x, weight, bias) if t is not None]
    if has_torch_function(operands):  # a mode would not see an autograd function
        return handle_torch_function(_normalized, operands, x, weight, bias, *statistics)
    result: torch.Tensor = _Normalization.apply(x, weight, bias, *statistics)  # type: ignore[no-untyped-call]
    return result


def _statistics(x: torch.Tensor, axes: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements of a channel, their mean and the sum of their squared distances from it, over all pieces.

    In float32 where ``x`` is shorter.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    found = torch.stack([count, mean, variance * count])
    for axis in axes:
        parts = found.new_empty((current().size(axis), *found.shape))
        current().group([axis]).begin_all_gather(parts.view(-1), found.view(-1))()
        found = _joined(parts)
    return found[0], found[1], found[2]


def _joined(parts: torch.Tensor) -> torch.Tensor:
    """Statistics of pieces (pieces, 3, channels) as those of the whole (Chan, Golub and LeVeque, 1983)."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return torch.stack([count, mean, (squares + counts * (means - mean).square()).sum(0)])


def _all_but_channels(x: torch.Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


class _Normalization(torch.autograd.Function):
    """Batch normalization by given statistics of all pieces, which depend on ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        count: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
        axes: tuple[str, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, count, mean, (variance + eps).rsqrt())
        # Groups are looked up now: backwards may run on another thread.
        ctx.groups = [current().group([axis]) for axis in axes]
        weight, bias = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        return F.batch_norm(x.to(mean.dtype), mean, variance, weight, bias, False, 0.0, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, count, mean, scale = ctx.saved_tensors
        dims, channels = _all_but_channels(x), (1, -1, *(1,) * (x.ndim - 2))
        normal = (x - mean.view(channels)) * scale.view(channels)
        local = torch.stack([grad.sum(dims, dtype=mean.dtype), (grad * normal).sum(dims)])
        total = local
        for group in ctx.groups:
            total = group.summed(total)
        shift, slope = (total / count).unbind()
        factor = scale if weight is None else scale * weight
        inside = (grad - shift.view(channels) - normal * slope.view(channels)) * factor.view(channels)
        to_bias, to_weight = local.unbind()
        needed = ctx.needs_input_grad
        gradients = (
            inside.to(x.dtype),
            to_weight.to(weight.dtype) if needed[1] else None,
            to_bias.to(grad.dtype if weight is None else weight.dtype) if needed[2] else None,
        )
        return *gradients, None, None, None, None, None
