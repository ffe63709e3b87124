"""Proof of an operator rule by brute force: the operator whole against the pieces that the rule promises.

For every factor that may be split, and for every set of operands that the call is linear in, the operator runs on each
rank's pieces; what the results' types say is put together and compared with the whole, and so are the gradients.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Value
from meshwright.passes.factors import Factor, Place, Rule
from meshwright.passes.rows import is_cuttable
from meshwright.passes.rules import Call, RuleFunction, by_overload, factors_of

TOLERANCE = 1e-10


def check_rule(
    operator: Any,
    rule: Rule | RuleFunction | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    pieces: int = 2,
    fixed: Collection[int] = (),
) -> int:
    """Prove ``rule`` for one call of ``operator`` on float64 inputs; returns how many splits were proven.

    rule: a Rule, a function of the Call, or None for the rule of a pointwise operator. args: the call's arguments; the
    sizes of dims to be split are multiples of ``pieces``, or what the rule allows to be cut unevenly, which is proven
    with one piece more. Factors that name ``pieces`` lines of their own are left to them, and synchronized ones to the
    operator.
    fixed: operands, by position, that the operator has no gradient for.
    Raises PlanError that names the factor where the pieces do not give the whole.
    """
    kwargs = dict(kwargs or {})
    ((operator, rule),) = by_overload({operator: rule}).items()  # type: ignore[dict-item]
    tensors = _tensors(args, kwargs)
    learning = [t.is_floating_point() and i not in fixed for i, t in enumerate(tensors)]
    whole = _results(operator(*args, **kwargs))
    call = Call(
        target=operator,
        args=tuple(tree_map_only(torch.Tensor, _value, list(args))),
        kwargs=tree_map_only(torch.Tensor, _value, kwargs),
        operands=tuple(_value(t) for t in tensors),
        results=tuple(_value(t) for t in whole),
    )
    factors = factors_of(call, {operator: rule} if rule is not None else {})
    if factors is None:
        raise PlanError(f"{operator} has no rule")
    upstream = [_small(t) if t.is_floating_point() else None for t in whole]
    proven = 0
    values = (*(value for value in call.operands if value is not None), *call.results)
    for factor in factors.factors:
        if factor.whole or factor.pieces is not None or factor.synchronized:
            continue
        for count in (pieces, pieces + 1):
            if (count == pieces or factor.size % count) and is_cuttable(factor, 1, count, values):
                _check_factor(operator, args, kwargs, tensors, learning, whole, upstream, factor, count)
                proven += 1
    for group in factors.linear:
        _check_linear(operator, args, kwargs, tensors, whole, group)
        proven += 1
    return proven


def _check_factor(
    operator: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: list[torch.Tensor],
    learning: list[bool],
    whole: list[torch.Tensor],
    upstream: list[torch.Tensor | None],
    factor: Factor,
    pieces: int,
) -> None:
    gradients = _gradients(operator, args, kwargs, tensors, learning, upstream)
    parts: list[list[torch.Tensor]] = []
    part_gradients: list[list[torch.Tensor | None]] = []
    for index in range(pieces):
        local = [_piece(t, place, index, pieces) for t, place in zip(tensors, factor.operands, strict=True)]
        local_upstream = [
            None if u is None else _piece(u, place, index, pieces) / (pieces if factor.mean and place is None else 1)
            for u, place in zip(upstream, factor.results, strict=True)
        ]
        local_args, local_kwargs = _with_tensors(_localized(args, factor, whole, index, pieces), kwargs, local)
        try:
            results = _results(operator(*local_args, **local_kwargs))
        except RuntimeError as error:
            raise PlanError(f"{_wrong(operator, factor)}: its pieces do not fit together: {error}") from error
        parts.append(
            [r / pieces if factor.mean and p is None else r for r, p in zip(results, factor.results, strict=True)]
        )
        part_gradients.append(_gradients(operator, local_args, local_kwargs, local, learning, local_upstream))
    for position, (result, place) in enumerate(zip(whole, factor.results, strict=True)):
        got = _together([p[position] for p in parts], place)
        _compare(got, result, f"result {position}", factor, operator)
    for position, (gradient, place) in enumerate(zip(gradients, factor.operands, strict=True)):
        found = [p[position] for p in part_gradients]
        if gradient is not None and all(f is not None for f in found):
            _compare(
                _together([f for f in found if f is not None], place),
                gradient,
                f"gradient of operand {position}",
                factor,
                operator,
            )


def _check_linear(
    operator: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: list[torch.Tensor],
    whole: list[torch.Tensor],
    group: frozenset[int],
) -> None:
    """f(a) + f(b) = f(a + b) in the operands of ``group`` together."""
    first = [_small(t) if i in group else t for i, t in enumerate(tensors)]
    second = [t - f if i in group else t for i, (t, f) in enumerate(zip(tensors, first, strict=True))]
    sums = []
    for part in (first, second):
        local_args, local_kwargs = _with_tensors(args, kwargs, part)
        sums.append(_results(operator(*local_args, **local_kwargs)))
    for a, b, result in zip(*sums, whole, strict=True):
        if not torch.allclose(a + b, result, rtol=1e-9, atol=TOLERANCE):
            raise PlanError(f"{operator} is not linear in its operands {sorted(group)} together, as its rule says")


def _small(like: torch.Tensor) -> torch.Tensor:
    """Whole numbers, whose sums are exact in every dtype: operators without a kernel in float64 can be proven too."""
    return torch.randint(-4, 5, like.shape).to(like.dtype)


def _value(tensor: torch.Tensor) -> Value:
    return Value(shape=tuple(tensor.shape), dtype=tensor.dtype, grad=tensor.is_floating_point(), made_of="data")


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, (list(args), dict(kwargs)))
    return found


def _with_tensors(
    args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    queue = list(tensors)
    new_args, new_kwargs = tree_map_only(torch.Tensor, lambda _: queue.pop(0), (list(args), dict(kwargs)))
    return new_args, new_kwargs


def _localized(args: Sequence[Any], factor: Factor, whole: list[torch.Tensor], index: int, pieces: int) -> list[Any]:
    """Sizes among the arguments of views, which are those of the result."""
    sizes = list(whole[0].shape)
    place = factor.results[0]
    if place is not None:
        sizes[place.dim] = _piece(whole[0], place, index, pieces).shape[place.dim]
    source = factor.operands[0]
    if len(whole) > 1 and place is not None and source is not None and source.outer != 1:
        return [args[0], sizes[place.dim] if args[1] == whole[0].shape[place.dim] else args[1], *args[2:]]
    return [
        sizes if isinstance(a, list) and all(isinstance(x, int) for x in a) and a == list(whole[0].shape) else a
        for a in args
    ]


def _results(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _piece(tensor: torch.Tensor, place: Place | None, index: int, pieces: int) -> torch.Tensor:
    if place is None:
        return tensor
    blocks = tensor.chunk(int(place.outer), place.dim)
    return torch.cat([block.chunk(pieces, place.dim)[index] for block in blocks], place.dim)


def _together(parts: list[torch.Tensor], place: Place | None) -> torch.Tensor:
    if place is None:
        return torch.stack(parts).sum(0)
    blocks = zip(*(part.chunk(int(place.outer), place.dim) for part in parts), strict=True)
    return torch.cat([piece for block in blocks for piece in block], place.dim)


def _gradients(
    operator: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    learning: Sequence[bool],
    upstream: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(grad) for t, grad in zip(tensors, learning, strict=True)]
    local_args, local_kwargs = _with_tensors(args, kwargs, leaves)
    pairs = [
        (r, u)
        for r, u in zip(_results(operator(*local_args, **local_kwargs)), upstream, strict=True)
        if u is not None and r.requires_grad
    ]
    if pairs:
        torch.autograd.backward([r for r, _ in pairs], [u for _, u in pairs])
    return [leaf.grad for leaf in leaves]


def _compare(got: torch.Tensor, wanted: torch.Tensor, what: str, factor: Factor, operator: Any) -> None:
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    if got.shape != wanted.shape or not torch.allclose(got.to(kind), wanted.to(kind), rtol=1e-9, atol=TOLERANCE):
        raise PlanError(f"{_wrong(operator, factor)}: put together, the pieces do not give the {what}")


def _wrong(operator: Any, factor: Factor) -> str:
    return (
        f"the rule of {operator} is wrong for the factor of size {factor.size} (operands {factor.operands}, results "
        f"{factor.results})"
    )
