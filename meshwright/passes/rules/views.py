"""Operators that move elements: views, pads, and what is filled with one value."""

import torch

from meshwright.passes.factors import Factor, Factors, Place, of_view
from meshwright.passes.rules.call import ALONE, Call, Rules, dim_of, first_of, in_common, same, same_shape
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
        whole = size == 1 or old not in (1, size)
        factors.append(Factor(size=size, operands=(place,), results=(Place(dim),), whole=whole))
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


def _moved(call: Call) -> Factors:
    """Elements move along the dims that the last argument names, which stay whole."""
    ndim = len(first_of(call).shape)
    dims = call.args[-1] if len(call.args) > 1 + (call.target is aten.roll.default) else range(ndim)
    return Factors(factors=tuple(same(call, *(dim % ndim for dim in dims))), linear=ALONE)


def _rotated(call: Call) -> Factors:
    """The two dims of the plane change places, and stay whole."""
    ndim = len(first_of(call).shape)
    plane = {dim % ndim for dim in call.argument(2, "dims", [0, 1])}
    return in_common(call, (dim for dim in range(ndim) if dim not in plane), ALONE)


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
    aten.squeeze.dims: _view,
    aten.expand.default: _expand,
    aten.transpose.int: _permute,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.pad.default: _pad,
    aten.roll.default: _moved,
    aten.flip.default: _moved,
    aten.rot90.default: _rotated,
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
