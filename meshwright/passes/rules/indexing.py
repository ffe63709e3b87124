"""Operators that read or write at places that tensors name."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from meshwright.passes.factors import Factor, Factors, Place, Rule, instantiate
from meshwright.passes.rules.call import ALONE, Call, Rules, dim_of, first_of, in_common

aten = torch.ops.aten


def _embedding(call: Call) -> Factors:
    """A table split along its rows is read with a mask, but not where one row is left out of the gradient, and tokens
    are split, but not where the gradient is divided by how often each occurs among all.
    """
    has_padding, by_frequency = call.argument(2, "padding_idx", -1) >= 0, call.argument(3, "scale_grad_by_freq", False)
    cut = not has_padding and not by_frequency
    rule = Rule("v d, ... -> ... d", pieces={"v": "embedding"}) if cut else Rule("v! d, ... -> ... d")
    factors = instantiate(rule, call.shapes, tuple(value.shape for value in call.results))
    if not by_frequency:
        return factors
    kept = (replace(factor, whole=factor.whole or factor.operands[1] is not None) for factor in factors.factors)
    return replace(factors, factors=tuple(kept))


def _embedding_bag(call: Call) -> Factors:
    """Features; a bag is a run of the indices, which stay whole."""
    (result,), count = call.results, len(call.operands)
    size = result.shape[1]
    places = (None, Place(1), *(None,) * (count - 2))
    return Factors(factors=(Factor(size=size, operands=places, results=(Place(1),), whole=size == 1),))


def _gather(call: Call) -> Factors:
    """Both have a dim in common where it is as long; what is indexed stays whole, and the indices may be split."""
    source, index = call.operands[:2]
    assert source is not None and index is not None
    where = dim_of(call)
    factors = []
    for dim, size in enumerate(index.shape):
        if dim == where:
            factors.append(Factor(size=size, operands=(None, Place(dim)), results=(Place(dim),), whole=size == 1))
        elif source.shape[dim] == size:
            factors.append(Factor(size=size, operands=(Place(dim),) * 2, results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=ALONE)


def _scatter(call: Call) -> Factors:
    """Dims that all have alike; what is indexed stays whole."""
    values = [value for value in call.operands if value is not None]
    where = dim_of(call)
    factors = []
    for dim, size in enumerate(values[0].shape):
        if dim != where and all(len(v.shape) > dim and v.shape[dim] == size for v in values):
            places = (Place(dim),) * len(values)
            factors.append(Factor(size=size, operands=places, results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors))


def _into_places(call: Call) -> Factors:
    """Slices written along ``dim``, which stays whole; the indices are a vector, or a number."""
    source, *rest = call.operands
    assert source is not None
    where = dim_of(call)
    others = [value for value in rest if value is not None]
    factors = []
    for dim, size in enumerate(source.shape):
        have = [len(v.shape) == len(source.shape) and v.shape[dim] == size for v in others[1:]]
        if dim != where and all(have):
            places = (Place(dim), None, *(Place(dim),) * len(have))
            factors.append(Factor(size=size, operands=places, results=(Place(dim),), whole=size == 1))
    linear = {
        aten.index_add.default: (frozenset({0, 2}),),
        aten.index_copy.default: (frozenset({0, 2}),),
    }
    return Factors(factors=tuple(factors), linear=linear.get(call.target, ()))


def _index_put(call: Call) -> Factors | None:
    """Dims that are not indexed, which the values have too unless they are broadcast along them."""
    source, *indices, values = call.operands
    assert source is not None and values is not None
    given = call.args[1]
    at = [dim for dim, index in enumerate(given) if index is not None]
    shapes = [value.shape for value in indices if value is not None]
    masks = any(value is not None and not value.dtype.is_signed for value in indices)
    width = 1 if masks else max(len(shape) for shape in shapes)
    if masks and len(at) > 1:
        return None
    covered = len(shapes[0]) if masks else len(at)
    start = at[0] if at[-1] - at[0] + 1 == len(at) else 0
    kept = [dim for dim in range(len(source.shape)) if dim not in range(at[0], at[0] + covered)] if masks else [
        dim for dim in range(len(source.shape)) if dim not in at
    ]  # fmt: skip
    ndim = len(kept) + width
    none = (None,) * len(shapes)
    factors = []
    for number, dim in enumerate(kept):
        position = (number + width if number >= start else number) - (ndim - len(values.shape))
        size = source.shape[dim]
        here = Place(position) if position >= 0 and values.shape[position] == size else None
        places = (Place(dim), *none, here)
        factors.append(Factor(size=size, operands=places, results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset({0, 1 + len(shapes)}),))


def _taken(call: Call) -> Factors:
    """From everything, at places of any shape."""
    source, index = call.operands
    assert source is not None and index is not None
    factors = (
        Factor(size=size, operands=(None, Place(dim)), results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(index.shape)
    )
    return Factors(factors=tuple(factors), linear=ALONE)


def _searched(call: Call) -> Factors:
    """Values among sorted boundaries: one row for all, or one for each row of values."""
    rows, values = call.operands[:2]
    assert rows is not None and values is not None
    if len(rows.shape) == 1 and len(call.operands) == 2:
        places = ((None, Place(dim)) for dim in range(len(values.shape)))
        factors = (
            Factor(size=size, operands=place, results=(Place(dim),), whole=size == 1)
            for dim, (size, place) in enumerate(zip(values.shape, places, strict=True))
        )
        return Factors(factors=tuple(factors))
    return in_common(call, range(len(values.shape) - 1))


def _bucketed(call: Call) -> Factors:
    """Every value by itself among all boundaries."""
    factors = (
        Factor(size=size, operands=(Place(dim), None), results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(first_of(call).shape)
    )
    return Factors(factors=tuple(factors))


def _index_select(call: Call) -> Factors:
    source, index = call.operands
    assert source is not None and index is not None
    where = dim_of(call)
    factors = []
    for dim, size in enumerate(source.shape):
        if dim != where:
            factors.append(Factor(size=size, operands=(Place(dim), None), results=(Place(dim),), whole=size == 1))
    if index.shape:
        size = index.shape[0]
        factors.append(Factor(size=size, operands=(None, Place(0)), results=(Place(where),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=ALONE)


def _index(call: Call) -> Factors | None:
    """Dims that are not indexed, and those of the indices: where the indexed dims stood if they are neighbours, else in
    front. What is indexed stays whole.
    """
    source, *indices = call.operands
    assert source is not None
    given = call.args[1]
    at = [dim for dim, index in enumerate(given) if index is not None]
    if any(value is None or not value.dtype.is_signed for value in indices):
        return None  # a mask
    shapes = [value.shape for value in indices if value is not None]
    width = max(len(shape) for shape in shapes)
    start = at[0] if at[-1] - at[0] + 1 == len(at) else 0
    factors = []
    for position in range(width):
        places = [len(shape) - width + position for shape in shapes]
        sizes = [shape[place] if place >= 0 else 1 for shape, place in zip(shapes, places, strict=True)]
        size = next((size for size in sizes if size != 1), 1)
        here = tuple(Place(p) if p >= 0 and s == size else None for p, s in zip(places, sizes, strict=True))
        whole = size == 1 or any(s not in (1, size) for s in sizes)
        factors.append(Factor(size=size, operands=(None, *here), results=(Place(start + position),), whole=whole))
    kept = [dim for dim in range(len(source.shape)) if dim not in at]
    for number, dim in enumerate(kept):
        place = Place(number + width if number >= start else number)
        none = (None,) * len(shapes)
        size = source.shape[dim]
        factors.append(Factor(size=size, operands=(Place(dim), *none), results=(place,), whole=size == 1))
    return Factors(factors=tuple(factors), linear=ALONE)


def _one_hot(call: Call) -> Factors:
    factors = (
        Factor(size=size, operands=(Place(dim),), results=(Place(dim),), whole=size == 1)
        for dim, size in enumerate(first_of(call).shape)
    )
    return Factors(factors=tuple(factors))


INDEXING: Rules = {
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter.reduce: _scatter,
    aten.scatter.value_reduce: _scatter,
    aten.scatter_add.default: _scatter,
    aten.scatter_reduce.two: _scatter,
    aten.index_add.default: _into_places,
    aten.index_copy.default: _into_places,
    aten.index_fill.int_Scalar: _into_places,
    aten.index_reduce.default: _into_places,
    aten.index_put.default: _index_put,
    aten.take.default: _taken,
    aten.bucketize.Tensor: _bucketed,
    aten.searchsorted.Tensor: _searched,
    aten.isin.Tensor_Tensor: _bucketed,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    F.embedding_bag: _embedding_bag,
    aten.one_hot.default: _one_hot,
}
