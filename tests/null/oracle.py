"""What DTensor says of our rules: one call on a mesh of two ranks, in one process on torch's fake process group.

Where DTensor takes the operands as they lie, redistributing none and without communication, the placements that it
derives are compared with the types of a row. Where it does not, it says nothing.
"""

import contextlib
import operator as python
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import ExplicitRedistributionContext
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map_only

from meshwright.compiler.graph import Function, Value, is_multiple
from meshwright.compiler.types import I, P, R, S, Type
from meshwright.passes.rows import Row, candidates, factors_by_node, rows_of
from meshwright.passes.rules import Rules

RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One call. ``tensors`` are those among its arguments; they and the results are whole, and require a gradient where
    they have one.
    """

    operator: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    results: list[torch.Tensor]


def example(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], fixed: Sequence[int] = ()) -> Example:
    """``fixed``: operands, by position, that the operator has no gradient for."""
    tensors: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, tensors.append, (list(args), kwargs))
    tensors = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point() and i not in fixed)
        for i, tensor in enumerate(tensors)
    ]
    results = _called(operator, *_with(args, kwargs, tensors))
    return Example(operator=operator, args=args, kwargs=kwargs, tensors=tensors, results=results)


def rows(case: Example, rules: Rules) -> tuple[Row, ...]:
    """The compiler's rows of a call, every dim of its operands split over the ranks as it is and in two groups."""
    graph = fx.Graph()
    operands = [graph.placeholder(f"operand_{i}") for i in range(len(case.tensors))]
    node = graph.call_function(case.operator, *_with(case.args, case.kwargs, operands))
    results = [node]
    if is_multiple(node):
        results = [graph.call_function(python.getitem, (node, i)) for i in range(len(case.results))]
    values = {
        node: Value(shape=tuple(t.shape), dtype=t.dtype, grad=t.requires_grad, made_of="data")
        for node, t in zip((*operands, *results), (*case.tensors, *case.results), strict=True)
    }
    function = Function(graph=graph, values=values, origins={})
    factors = factors_by_node(function, rules)
    seeds = {o: {S(dim, groups) for dim in range(len(values[o].shape)) for groups in (1, 2)} for o in operands}
    found = candidates(function, factors, seeds, RANKS)
    return rows_of(function, node, factors.get(node), found, set(results), RANKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What DTensor says otherwise than a row, a line for each result and each gradient; None where it says nothing."""

    results: list[str] | None = None
    gradients: list[str] | None = None

    @property
    def contradictions(self) -> list[str]:
        return [*(self.results or ()), *(self.gradients or ())]


def answer(case: Example, row: Row, mesh: DeviceMesh) -> Answer:
    """DTensor's answer to a row, forward and backward."""
    tensors = [_placed(t, type_, mesh) for t, type_ in zip(case.tensors, row.operands, strict=True)]
    results = derive(case, tensors)
    if results is None:
        return Answer()
    said = [
        f"{_text(row)}: result {i} is {result.placements[0]}"
        for i, (result, whole, type_) in enumerate(zip(results, case.results, row.results, strict=True))
        if not _alike(result, whole, _placement(type_, mean=row.mean))
    ]
    learning = [
        (result, _placed(torch.randn_like(whole), _gradient(type_), mesh))
        for result, whole, type_ in zip(results, case.results, row.results, strict=True)
        if result.requires_grad
    ]
    if said or not learning:
        return Answer(results=said)
    try:
        with _refusing():
            torch.autograd.backward([result for result, _ in learning], [upstream for _, upstream in learning])
    except RuntimeError:
        return Answer(results=said)
    gradients = [
        f"{_text(row)}: the gradient of operand {i} is {tensor.grad.placements[0]}"
        for i, (tensor, whole, type_) in enumerate(zip(tensors, case.tensors, row.operands, strict=True))
        if isinstance(tensor.grad, DTensor) and not _alike(tensor.grad, whole, _placement(_gradient(type_)))
    ]
    return Answer(results=said, gradients=gradients)


def derive(case: Example, tensors: Sequence[DTensor]) -> list[DTensor] | None:
    """The results for operands that lie like ``tensors``; None where DTensor does not take them so, or takes pieces
    that do not fit each other.
    """
    try:
        with _refusing():
            return _called(case.operator, *_with(case.args, case.kwargs, tensors))
    except (RuntimeError, IndexError):
        return None


def distributed(case: Example, types: Sequence[Type], mesh: DeviceMesh) -> list[DTensor]:
    """The operands without a gradient, as the first of the ranks has them."""
    return [_placed(t.detach(), type_, mesh) for t, type_ in zip(case.tensors, types, strict=True)]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raises RuntimeError where DTensor would redistribute or communicate, as it does where it has no rule."""
    with ExplicitRedistributionContext(strict=True), CommDebugMode() as communication:
        yield
    if communication.get_total_counts():
        raise RuntimeError("DTensor communicates")


def _with(args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments with others in the place of the tensors."""
    others = iter(tensors)
    new_args, new_kwargs = tree_map_only(torch.Tensor, lambda _: next(others), (list(args), kwargs))
    return tuple(new_args), new_kwargs


def _called(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    result = operator(*args, **kwargs)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _gradient(type_: Type) -> Type:
    return {"R": P, "I": I, "P": R}.get(type_.kind, type_)


def _placement(type_: Type, *, mean: bool = False) -> Placement:
    if type_.is_split:
        return Shard(type_.dim) if type_.groups == 1 else _StridedShard(type_.dim, split_factor=int(type_.groups))
    return Partial("avg" if mean else "sum") if type_ == P else Replicate()


def _placed(tensor: torch.Tensor, type_: Type, mesh: DeviceMesh) -> DTensor:
    piece = tensor.detach()
    if type_.is_split:
        blocks = piece.chunk(int(type_.groups), type_.dim)
        piece = torch.cat([block.chunk(RANKS, type_.dim)[0] for block in blocks], type_.dim)
    placed = DTensor.from_local(
        piece.clone(), mesh, [_placement(type_)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    placed.requires_grad_(tensor.requires_grad)
    return placed


def _alike(got: DTensor, whole: torch.Tensor, expected: Placement) -> bool:
    """Whether both can be true: of a tensor that is whole everywhere, as after an expand, a piece is no other thing."""
    (placement,) = got.placements
    if isinstance(placement, Replicate) and isinstance(expected, Shard | _StridedShard):
        return got.to_local().shape == whole.shape
    return bool(placement == expected)


def _text(row: Row) -> str:
    return f"{', '.join(map(str, row.operands))} -> {', '.join(map(str, row.results))}"
