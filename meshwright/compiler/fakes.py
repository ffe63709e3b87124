"""Shapes that torch does not know without running an operator, and could."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import fake_impls

aten = torch.ops.aten


def _ctc_loss(mode: Any, function: Any, log_probs: Any, targets: Any, *rest: Any, **named: Any) -> Any:
    """The loss of each sample, and what its backward reads, which nobody sees while a model is captured."""
    samples = log_probs.shape[1] if log_probs.ndim == 3 else 1
    return log_probs.new_empty(samples), log_probs.new_empty(samples)


_SHAPES = {aten._ctc_loss.Tensor: _ctc_loss, aten._ctc_loss.default: _ctc_loss}


@contextmanager
def known_shapes() -> Iterator[None]:
    """Inside this context torch captures these operators too."""
    added = {
        operator: shape for operator, shape in _SHAPES.items() if operator not in fake_impls.op_implementations_dict
    }
    fake_impls.op_implementations_dict.update(added)
    try:
        yield
    finally:
        for operator in added:
            del fake_impls.op_implementations_dict[operator]
