"""The leaves of a batch: their names, and which of their dims are sizes that stay symbolic."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import sympy
import torch
from torch import nn

from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Input

BATCH = sympy.Symbol("B", positive=True, integer=True)
SEQUENCE = sympy.Symbol("T", positive=True, integer=True)


def leaves_of(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any]
) -> tuple[tuple[str, ...], tuple[Any, ...], Callable[[tuple[Any, ...]], Any], Literal["dict", "tuple"]]:
    """Names and values of the leaves of a batch, each tensor an object of its own, and how to build the batch again."""
    if isinstance(batch, Mapping):
        names = tuple(batch)
        values = tuple(batch.values())
    elif isinstance(batch, (tuple, list)):
        arguments = list(inspect.signature(model.forward).parameters)
        names = tuple(arguments[i] if i < len(arguments) else f"input_{i}" for i in range(len(batch)))
        values = tuple(batch)
    else:
        raise PlanError(
            f"example_inputs is a dict of forward's keyword arguments or a tuple, not {type(batch).__name__}"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(name, str) or not name.isidentifier():
            raise PlanError(f"the name {name!r} in example_inputs is no identifier")
        if not isinstance(value, (torch.Tensor, int, float, bool, str, type(None))):
            raise PlanError(
                f"example_inputs[{name!r}] is a {type(value).__name__}: leaves are tensors or plain scalars"
            )
    # torch.export takes two arguments that are one tensor for one input.
    values = tuple(value.detach().clone() if isinstance(value, torch.Tensor) else value for value in values)
    if isinstance(batch, Mapping):
        return names, values, lambda leaves: dict(zip(names, leaves, strict=True)), "dict"
    return names, values, tuple, "tuple"


def batch_size_of(leaves: tuple[Any, ...]) -> int:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise PlanError("example_inputs has no tensor with a batch dimension (dim 0)")


def sizes_of(leaves: tuple[Any, ...], batch_size: int) -> dict[sympy.Symbol, int]:
    sizes = {BATCH: batch_size}
    for leaf in leaves:
        tokens = isinstance(leaf, torch.Tensor) and not leaf.is_floating_point() and leaf.ndim >= 2
        if tokens and leaf.shape[0] == batch_size and SEQUENCE not in sizes:
            sizes[SEQUENCE] = leaf.shape[1]
    return sizes


def symbolic_dims(leaf: Any, batch_size: int, sizes: Mapping[sympy.Symbol, int]) -> dict[int, sympy.Symbol]:
    """Which dims of one leaf carry which symbol."""
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
        return {}
    dims = {0: BATCH} if leaf.shape[0] == batch_size else {}
    if SEQUENCE in sizes:
        exact = 2 if leaf.is_floating_point() else leaf.ndim
        dims |= {dim: SEQUENCE for dim in range(1, exact) if dim < leaf.ndim and leaf.shape[dim] == sizes[SEQUENCE]}
    return dims


def input_of(name: str, leaf: Any, batch_size: int, function: Any) -> Input:
    if not isinstance(leaf, torch.Tensor):
        return Input(name=name, shape=(), dtype=torch.int64, batched=False, example=leaf)
    batched = leaf.ndim > 0 and leaf.shape[0] == batch_size
    for node, value in function.values.items():
        if node.op == "placeholder" and node.target == name:
            return Input(name=name, shape=value.shape, dtype=leaf.dtype, batched=batched, example=leaf)
    return Input(name=name, shape=tuple(leaf.shape), dtype=leaf.dtype, batched=batched, example=leaf)
