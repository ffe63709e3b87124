"""Many tensors as one: flat tensors and the views of them."""

from collections.abc import Sequence

import torch
from torch import nn


def flatten(parameters: Sequence[nn.Parameter], pieces: int) -> torch.Tensor:
    """One flat tensor of which the parameters become views, padded with zeros to a multiple of ``pieces``."""
    total = sum(p.numel() for p in parameters)
    first = parameters[0]
    flat = torch.empty(-(-total // pieces) * pieces, dtype=first.dtype, device=first.device)
    flat[total:].zero_()
    for parameter, view in zip(parameters, views(flat, [p.shape for p in parameters]), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return flat


def views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Tensors of the given shapes, one after the other in ``flat``."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    padding = flat.numel() - sum(sizes)
    parts = flat.split([*sizes, padding])
    return [part.view(*shape) if len(shape) else part.view(()) for part, shape in zip(parts, shapes, strict=False)]
