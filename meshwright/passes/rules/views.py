"""Operators that move elements: views, cuts, joins, and what is filled with one value."""

import torch

from meshwright.passes.factors import Factor, Factors, Place, of_view, quotient
from meshwright.passes.rules.call import ALONE, Call, Rules, dim_of, first_of, same, same_shape
from meshwright.passes.rules.pointwise import pointwise

aten = torch.ops.aten


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
    return Factors(factors=tuple(same(call, dim_of(call, 1, default=0))), linear=(frozenset({0}),))


def _select(call: Call) -> Factors:
    first, dim = call.operands[0], dim_of(call, 1)
    assert first is not None
    factors = []
    for old, size in enumerate(first.shape):
        place = None if old == dim else Place(old - (old > dim))
        factors.append(Factor(size=size, operands=(Place(old),), results=(place,), whole=old == dim or size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset({0}),))


def _split(call: Call) -> Factors:
    """Equal parts of a dim: splitting every part is splitting the dim in as many groups. Uneven ones stay whole."""
    first, dim = call.operands[0], dim_of(call, 2, default=0)
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
    first, dim, count = call.operands[0], dim_of(call, 1, default=0), len(call.operands)
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


def _pad(call: Call) -> Factors:
    first = call.operands[0]
    assert first is not None
    ndim, amounts = len(first.shape), call.args[1]
    padded = {ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    linear = (frozenset({0}),) if not call.argument(3, "value") else ()
    return Factors(factors=tuple(same(call, *padded)), linear=linear)


def constant(call: Call) -> Factors:
    """A tensor filled with one value: every piece of it is alike."""
    (result,) = call.results
    count = sum(value is not None for value in call.operands)
    factors = (
        Factor(size=size, operands=(None,) * count, results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(result.shape)
    )
    return Factors(factors=tuple(factors))


def _stack(call: Call) -> Factors:
    """The new dim stays whole."""
    (result,), count = call.results, len(call.operands)
    new = call.argument(1, "dim", 0) % len(result.shape)
    factors = []
    for dim, size in enumerate(first_of(call).shape):
        places = (Place(dim),) * count
        factors.append(Factor(size=size, operands=places, results=(Place(dim + (dim >= new)),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset(range(count)),))


def _split_with_sizes(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, dim_of(call, 2, default=0))), linear=ALONE)


def _moved(call: Call) -> Factors:
    """Elements move along the dims that the last argument names, which stay whole."""
    ndim = len(first_of(call).shape)
    dims = call.args[-1] if len(call.args) > 1 + (call.target is aten.roll.default) else range(ndim)
    return Factors(factors=tuple(same(call, *(dim % ndim for dim in dims))), linear=ALONE)


def _triangle(call: Call) -> Factors:
    ndim = len(first_of(call).shape)
    return Factors(factors=tuple(same(call, ndim - 2, ndim - 1)), linear=ALONE)


def _scattered(call: Call) -> Factors:
    """A part of the first operand replaced by the second, which lacks ``dim`` for a select; ``dim`` stays whole."""
    source, part = call.operands[:2]
    assert source is not None and part is not None
    where = dim_of(call, 2, default=0)
    missing = len(source.shape) - len(part.shape)
    factors = []
    for dim, size in enumerate(source.shape):
        place = None if missing and dim == where else Place(dim - (missing and dim > where))
        whole = dim == where or size == 1
        factors.append(Factor(size=size, operands=(Place(dim), place), results=(Place(dim),), whole=whole))
    return Factors(factors=tuple(f for f in factors if not f.whole), linear=(frozenset({0, 1}),))


def _as_complex(call: Call) -> Factors:
    """The last dim holds the real and the imaginary part on one side."""
    inner = min(len(first_of(call).shape), len(call.results[0].shape))
    shape = first_of(call).shape[:inner]
    factors = (
        Factor(size=size, operands=(Place(dim),), results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(shape)
    )
    return Factors(factors=tuple(factors), linear=ALONE)


VIEWS: Rules = {
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
    aten.split_with_sizes.default: _split_with_sizes,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.pad.default: _pad,
    aten.roll.default: _moved,
    aten.flip.default: _moved,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.slice_scatter.default: _scattered,
    aten.select_scatter.default: _scattered,
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_complex,
    # filled with one value
    aten.zeros.default: constant,
    aten.ones.default: constant,
    aten.full.default: constant,
    aten.zeros_like.default: same_shape,
    aten.ones_like.default: pointwise,
    aten.full_like.default: pointwise,
}
