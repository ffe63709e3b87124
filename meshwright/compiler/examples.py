"""Example inputs for models that know their own."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshwright.compiler.errors import PlanError
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan


def example_of(
    model: nn.Module, given: Mapping[str, Any] | Sequence[Any] | None, mesh: Mesh, plan: Plan
) -> Mapping[str, Any] | Sequence[Any]:
    """``given``, or the model's ``example_input_array`` (Lightning) or ``dummy_inputs`` (Transformers) as a global
    batch.

    The model's own inputs are repeated to a batch that dp and the microbatches divide; labels are added where forward
    takes
    them. Raises PlanError when there are none.
    """
    if isinstance(given, torch.Tensor):
        return (given,)
    if given is not None:
        return given
    pieces = 2 * mesh.size("dp") * plan.num_microbatches(mesh.size("pp"))
    own = getattr(model, "example_input_array", None)
    if isinstance(own, torch.Tensor):
        return (_repeated(own, pieces),)
    if isinstance(own, (tuple, list)):
        return tuple(_repeated(tensor, pieces) for tensor in own)
    dummy = own if isinstance(own, dict) else getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict) and dummy:
        batch = {name: _repeated(value, pieces) for name, value in dummy.items()}
        if "labels" in inspect.signature(model.forward).parameters and "input_ids" in batch:
            batch.setdefault("labels", batch["input_ids"].clone())
        return batch
    raise PlanError(
        f"example_inputs is missing, and {type(model).__name__} has neither example_input_array nor dummy_inputs\n"
        "  give the global batch of one step: example_inputs={'input_ids': ..., 'labels': ...}"
    )


def _repeated(value: Any, pieces: int) -> Any:
    """A tensor repeated along dim 0 until its size is a multiple of ``pieces``."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    times = pieces if value.shape[0] % pieces else 1
    return value.repeat(times, *[1] * (value.ndim - 1))
