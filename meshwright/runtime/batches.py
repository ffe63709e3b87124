"""A user's batch: named, cut over replicas and microbatches, and measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meshwright.runtime.errors import PlanError
from meshwright.runtime.layout import evaluate

Batch = Mapping[str, Any] | Sequence[Any]
"""What the model was compiled for: a dict by the names of forward, or a tuple in their order."""

Inputs = Mapping[str, Mapping[str, Any]]
"""The manifest's inputs, in the order of a tuple."""


def named(batch: Batch, inputs: Inputs) -> dict[str, Any]:
    """The values of a batch by name. Raises PlanError where they are not the program's inputs."""
    if isinstance(batch, Mapping):
        if set(batch) != set(inputs):
            raise PlanError(f"the batch has {', '.join(batch)}; the program was compiled for {', '.join(inputs)}")
        return dict(batch)
    if len(batch) != len(inputs):
        raise PlanError(f"the batch has {len(batch)} values; the program was compiled for {', '.join(inputs)}")
    return dict(zip(inputs, batch, strict=True))


def replica_part(
    values: Mapping[str, Any], inputs: Inputs, index: int, replicas: int, microbatches: int
) -> dict[str, Any]:
    """A replica's contiguous piece of what is batched, the rest as it is. Raises PlanError for uneven pieces."""
    part = dict(values)
    for name, value in values.items():
        if _is_cut(inputs[name], "dp"):
            pieces = replicas * microbatches
            if value.shape[0] % pieces:
                raise PlanError(
                    f"cannot cut the batch of {value.shape[0]} ({name!r}, dim 0) over dp={replicas} and "
                    f"{microbatches} microbatches\n  use a multiple of {pieces}"
                )
            part[name] = value.tensor_split(replicas)[index]
    return part


def microbatch_parts(values: Mapping[str, Any], inputs: Inputs, microbatches: int) -> list[dict[str, Any]]:
    """Contiguous pieces of what is batched, the rest as it is. Raises PlanError for uneven pieces."""
    parts: list[dict[str, Any]] = [dict(values) for _ in range(microbatches)]
    for name, value in values.items():
        if _is_cut(inputs[name], "mb"):
            if value.shape[0] % microbatches:
                raise PlanError(
                    f"cannot cut the part of {value.shape[0]} ({name!r}, dim 0) in {microbatches} microbatches\n"
                    f"  use a multiple of {microbatches}"
                )
            for part, piece in zip(parts, value.tensor_split(microbatches), strict=True):
                part[name] = piece
    return parts


def symbols_of(values: Mapping[str, Any], inputs: Inputs, replicas: int) -> dict[str, int]:
    """The symbolic sizes of the global batch, from a replica's part. Raises PlanError for sizes that contradict."""
    found: dict[str, int] = {}
    sizes: list[tuple[str, int, int | str, int]] = []
    for name, entry in inputs.items():
        value = values[name]
        if not isinstance(value, torch.Tensor):
            continue
        if value.ndim != len(entry["shape"]):
            raise PlanError(
                f"{name!r} has {value.ndim} dims; the program was compiled for {len(entry['shape'])}: {entry['shape']}"
            )
        for dim, (size, expected) in enumerate(zip(value.shape, entry["shape"], strict=True)):
            size = size * replicas if dim == 0 and _is_cut(entry, "dp") else size
            sizes.append((name, dim, expected, size))
            if isinstance(expected, str) and expected.isidentifier():
                found.setdefault(expected, size)
    for name, dim, expected, size in sizes:
        if evaluate(expected, found) != size:
            raise PlanError(
                f"{name!r} has size {size} in dim {dim} of the global batch, where the program expects "
                f"{evaluate(expected, found)}{f' ({expected})' if isinstance(expected, str) else ''}"
            )
    return found


def _is_cut(entry: Mapping[str, Any], axis: str) -> bool:
    return axis in entry.get("types", {})
