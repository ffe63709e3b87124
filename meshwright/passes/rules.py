"""What every operator does to its dims: one line each (the notation is in factors.py), or a function of the shapes.

Pointwise operators need no line: torch tags them. An operator without a rule runs whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from meshwright.compiler.graph import Value
from meshwright.passes.factors import Factor, Factors, Place, Rule, instantiate, of_view, quotient
from meshwright.runtime import random

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call: the operator, its arguments (a tensor among them is a Value) and its results.

    ``operands`` are the tensors among the arguments in order, None for an optional one that is absent.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value | None, ...]
    results: tuple[Value, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def shapes(self) -> tuple[tuple[Any, ...] | None, ...]:
        return tuple(None if value is None else value.shape for value in self.operands)


RuleFunction = Callable[[Call], Factors]
Rules = Mapping[Any, Rule | RuleFunction]


def factors_of(call: Call, rules: Rules) -> Factors | None:
    """The factors of a call, or None where no rule knows the operator."""
    rule = rules.get(call.target)
    if rule is None and is_pointwise(call.target):
        rule = _pointwise
    if rule is None:
        return None
    if isinstance(rule, Rule):
        return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))
    return rule(call)


def is_pointwise(target: Any) -> bool:
    """Whether torch tags an operator as pointwise."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _same(call: Call, *dims_whole: int, mean: tuple[int, ...] = (), summed: tuple[int, ...] = ()) -> list[Factor]:
    """One factor per dim of the first operand, which the first result has at the same place unless it is reduced."""
    (first, *_), (result, *_) = call.operands, call.results
    assert first is not None
    ndim, kept, factors = len(first.shape), 0, []
    reduced = {*mean, *summed}
    keepdim = len(result.shape) == ndim
    for dim, size in enumerate(first.shape):
        place = None if dim in reduced else Place(dim if keepdim else kept)
        kept += dim not in reduced
        factors.append(
            Factor(
                size=size,
                operands=(Place(dim),),
                results=(place,),
                whole=dim in dims_whole or size == 1,
                mean=dim in mean,
            )
        )
    return factors


def _dim(call: Call, position: int = 1, name: str = "dim", default: int = -1) -> int:
    first = call.operands[0]
    assert first is not None
    dim: int = call.argument(position, name, default)
    return dim % max(len(first.shape), 1)


def _pointwise(call: Call) -> Factors:
    (result,) = call.results
    ndim = len(result.shape)
    operands = [value for value in call.operands if value is not None]
    factors = []
    for dim, size in enumerate(result.shape):
        places = []
        for value in operands:
            here = dim - (ndim - len(value.shape))
            places.append(Place(here) if here >= 0 and value.shape[here] == size else None)
        factors.append(Factor(size=size, operands=tuple(places), results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=_linear(call))


_LINEAR: dict[Any, tuple[tuple[int, ...], ...]] = {
    aten.neg.default: ((0,),),
    aten.to.dtype: ((0,),),
    aten.add.Tensor: ((0, 1),),
    aten.sub.Tensor: ((0, 1),),
    aten.mul.Tensor: ((0,), (1,)),
    aten.mul.Scalar: ((0,),),
    aten.div.Tensor: ((0,),),
    aten.div.Scalar: ((0,),),
}
"""Pointwise operators that are linear, in which operands (together)."""


def _linear(call: Call) -> tuple[frozenset[int], ...]:
    count = sum(value is not None for value in call.operands)
    groups = _LINEAR.get(call.target, ())
    if call.target in (aten.add.Tensor, aten.sub.Tensor) and count < 2:
        return ()  # x + 1 is affine
    if call.target is aten.masked_fill.Scalar and call.args[2] == 0:
        groups = ((0,),)
    return tuple(frozenset(group) for group in groups if all(position < count for position in group))


def _view(call: Call) -> Factors:
    (source, *_), (result,) = call.operands, call.results
    assert source is not None
    return Factors(factors=of_view(source.shape, result.shape), linear=(frozenset({0}),))


def _expand(call: Call) -> Factors:
    (source, *_), (result,) = call.operands, call.results
    assert source is not None
    shift = len(result.shape) - len(source.shape)
    factors = []
    for dim, size in enumerate(result.shape):
        old = source.shape[dim - shift] if dim >= shift else 1
        place = Place(dim - shift) if dim >= shift and old == size else None
        factors.append(Factor(size=size, operands=(place,), results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset({0}),))


def _permute(call: Call) -> Factors:
    first = call.operands[0]
    assert first is not None
    ndim = len(first.shape)
    if call.target is aten.permute.default:
        order = [dim % ndim for dim in call.args[1]]
    else:
        a, b = call.args[1] % ndim, call.args[2] % ndim
        order = list(range(ndim))
        order[a], order[b] = order[b], order[a]
    factors = (
        Factor(size=first.shape[old], operands=(Place(old),), results=(Place(new),), whole=first.shape[old] == 1)
        for new, old in enumerate(order)
    )
    return Factors(factors=tuple(factors), linear=(frozenset({0}),))


def _slice(call: Call) -> Factors:
    return Factors(factors=tuple(_same(call, _dim(call, 1, default=0))), linear=(frozenset({0}),))


def _select(call: Call) -> Factors:
    first, dim = call.operands[0], _dim(call, 1)
    assert first is not None
    factors = []
    for old, size in enumerate(first.shape):
        place = None if old == dim else Place(old - (old > dim))
        factors.append(Factor(size=size, operands=(Place(old),), results=(place,), whole=old == dim or size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset({0}),))


def _split(call: Call) -> Factors:
    """Equal parts of a dim: splitting every part is splitting the dim in as many groups. Uneven ones stay whole."""
    first, dim = call.operands[0], _dim(call, 2, default=0)
    assert first is not None
    sizes = {result.shape[dim] for result in call.results}
    part = quotient(first.shape[dim], call.results[0].shape[dim])
    factors = []
    for here, size in enumerate(first.shape):
        count = len(call.results)
        if here == dim and part is not None and len(sizes) == 1:
            size, place = call.results[0].shape[dim], Place(dim, part)
        else:
            place = Place(here)
        whole = size == 1 or (here == dim and (part is None or len(sizes) > 1))
        factors.append(Factor(size=size, operands=(place,), results=(Place(here),) * count, whole=whole))
    return Factors(factors=tuple(factors), linear=(frozenset({0}),))


def _cat(call: Call) -> Factors:
    first, dim, count = call.operands[0], _dim(call, 1, default=0), len(call.operands)
    assert first is not None
    (result,) = call.results
    even = len({value.shape[dim] for value in call.operands if value is not None}) == 1
    factors = []
    for here, size in enumerate(first.shape):
        if here == dim:
            factors.append(
                Factor(
                    size=size,
                    operands=(Place(here),) * count,
                    results=(Place(here, count),),
                    whole=not even or size == 1,
                )
            )
        else:
            factors.append(
                Factor(
                    size=size, operands=(Place(here),) * count, results=(Place(here),), whole=result.shape[here] == 1
                )
            )
    return Factors(factors=tuple(factors), linear=(frozenset(range(count)),))


def _along_whole_dim(call: Call) -> Factors:
    return Factors(factors=tuple(_same(call, _dim(call))))


def _linear_along_whole_dim(call: Call) -> Factors:
    return Factors(factors=tuple(_same(call, _dim(call))), linear=(frozenset({0}),))


def _pad(call: Call) -> Factors:
    first = call.operands[0]
    assert first is not None
    ndim, amounts = len(first.shape), call.args[1]
    padded = {ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    linear = (frozenset({0}),) if not call.argument(3, "value") else ()
    return Factors(factors=tuple(_same(call, *padded)), linear=linear)


def _reduced(call: Call) -> tuple[int, ...]:
    first = call.operands[0]
    assert first is not None
    ndim = len(first.shape)
    takes_dim = any(argument.name == "dim" for argument in call.target._schema.arguments)
    dims = call.argument(1, "dim") if takes_dim else None
    if dims is None or dims == []:
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in ([dims] if isinstance(dims, int) else dims))


def _sum(call: Call) -> Factors:
    return Factors(factors=tuple(_same(call, summed=_reduced(call))), linear=(frozenset({0}),))


def _mean(call: Call) -> Factors:
    """A mean over a fixed size is a normalization's and stays whole; over tokens it is a sum of the pieces' means."""
    reduced = _reduced(call)
    first = call.operands[0]
    assert first is not None
    fixed = [dim for dim in reduced if isinstance(first.shape[dim], int)]
    return Factors(factors=tuple(_same(call, *fixed, mean=reduced)), linear=(frozenset({0}),))


def _reduce_whole(call: Call) -> Factors:
    reduced = _reduced(call)
    return Factors(factors=tuple(_same(call, *reduced, summed=reduced)))


def _layer_norm(call: Call) -> Factors:
    """Over the trailing dims of normalized_shape, which stay whole, as do the weight and the bias."""
    first = call.operands[0]
    assert first is not None
    ndim, count = len(first.shape), sum(value is not None for value in call.operands)
    normalized = len(call.args[1])
    factors = []
    for dim, size in enumerate(first.shape):
        inside = dim - (ndim - normalized)
        places = [Place(dim), *[Place(inside) if inside >= 0 else None] * (count - 1)]
        factors.append(Factor(size=size, operands=tuple(places), results=(Place(dim),), whole=inside >= 0 or size == 1))
    return Factors(factors=tuple(factors))


def _attention(call: Call) -> Factors:
    """b h s! d!, b g t! d!, b g t! e, mask: leading dims and heads are independent; h may be a multiple of g (GQA)."""
    query, key, value, *rest = call.operands
    assert query is not None and key is not None and value is not None
    ndim, (_result,) = len(query.shape), call.results
    factors = []
    for dim in range(ndim - 2):
        size = key.shape[dim]
        places = [Place(dim)] * 3
        for mask in rest:
            if mask is not None:
                here = dim - (ndim - len(mask.shape))
                present = here >= 0 and mask.shape[here] != 1
                places.append(Place(here) if present else None)  # type: ignore[arg-type]
        broadcast = query.shape[dim] != size and size == 1
        if broadcast:
            size, places[1:3] = query.shape[dim], [None, None]  # type: ignore[list-item]
        factors.append(Factor(size=size, operands=tuple(places), results=(Place(dim),), whole=size == 1))
    factors.append(
        Factor(
            size=value.shape[-1],
            operands=(None, None, Place(ndim - 1), *[None for mask in rest if mask is not None]),
            results=(Place(ndim - 1),),
        )
    )
    return Factors(factors=tuple(factors), linear=(frozenset({2}),))


def _matmul(call: Call) -> Factors:
    left, right = call.operands
    assert left is not None and right is not None
    forms = {
        (1, 1): "k, k -> ",
        (2, 1): "m k, k -> m",
        (1, 2): "k, k n -> n",
    }
    text = forms.get((len(left.shape), len(right.shape)), "... m k, ... k n -> ... m n")
    if len(right.shape) == 2 and len(left.shape) > 2:
        text = "... k, k n -> ... n"
    rule = Rule(text, linear=((0,), (1,)))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _embedding(call: Call) -> Factors:
    """A table split along its rows is read with a mask, but not where one row is left out of the gradient."""
    has_padding = call.argument(2, "padding_idx", -1) >= 0
    rule = Rule("v! d, ... -> ... d") if has_padding else Rule("v d, ... -> ... d", pieces={"v": "embedding"})
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _constant(call: Call) -> Factors:
    """A tensor filled with one value: every piece of it is alike."""
    (result,) = call.results
    count = sum(value is not None for value in call.operands)
    factors = (
        Factor(size=size, operands=(None,) * count, results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(result.shape)
    )
    return Factors(factors=tuple(factors))


def _same_shape(call: Call) -> Factors:
    return Factors(factors=tuple(_same(call)), linear=(frozenset({0}),))


RANDOM_RULES: Rules = {
    random.dropout: _pointwise,
    random.feature_dropout: _pointwise,
    random.alpha_dropout: _pointwise,
    random.feature_alpha_dropout: _pointwise,
    random.attention_with_dropout: _attention,
    random.rand_like: _pointwise,
    random.randn_like: _pointwise,
    random.rand: _constant,
    random.randn: _constant,
}

DEFAULT_RULES: Rules = {
    # pointwise, though torch does not tag it: it is composite
    aten.to.dtype: _pointwise,
    # products
    aten.linear.default: Rule("... i, o i -> ... o", linear=((0,), (1,))),
    aten.matmul.default: _matmul,
    aten.mm.default: Rule("m k, k n -> m n", linear=((0,), (1,))),
    aten.bmm.default: Rule("b m k, b k n -> b m n", linear=((0,), (1,))),
    # tables
    aten.embedding.default: _embedding,
    # normalizations and attention
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.softmax.int: _along_whole_dim,
    aten.log_softmax.int: _along_whole_dim,
    aten.scaled_dot_product_attention.default: _attention,
    # losses
    F.cross_entropy: Rule("n v, n -> ", pieces={"v": "cross_entropy"}, invariant=frozenset("v")),
    # reductions
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.amax.default: _reduce_whole,
    aten.cumsum.default: _linear_along_whole_dim,
    # views
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.default: _view,
    aten.expand.default: _expand,
    aten.transpose.int: _permute,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.chunk.default: _split,
    aten.cat.default: _cat,
    aten.pad.default: _pad,
    aten.detach.default: _same_shape,
    # random operators: every piece is drawn by its place
    **RANDOM_RULES,
    # constants
    aten.zeros.default: _constant,
    aten.ones.default: _constant,
    aten.full.default: _constant,
    aten.zeros_like.default: _same_shape,
    aten.ones_like.default: _pointwise,
}
