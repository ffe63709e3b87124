"""Cuts and joins, what repeats elements, and diagonals."""

import torch

from meshwright.passes.factors import Factor, Factors, Place, quotient
from meshwright.passes.rules.call import ALONE, Call, Rules, dim_of, first_of, same

aten = torch.ops.aten


def _split(call: Call) -> Factors:
    """Equal parts of a dim: splitting every part is splitting the dim in as many groups. Uneven ones stay whole, also
    where the parts that are used are alike.
    """
    first, dim, number = first_of(call), dim_of(call, 2, default=0), call.args[1]
    length = number if call.target is aten.split.Tensor else quotient(first.shape[dim], number)
    count = quotient(first.shape[dim], length) if length is not None else None
    factors = []
    for here, size in enumerate(first.shape):
        place = Place(here)
        if here == dim and count is not None:
            size, place = length, Place(dim, count)
        whole = size == 1 or (here == dim and count is None)
        results = (Place(here),) * len(call.results)
        factors.append(Factor(size=size, operands=(place,), results=results, whole=whole))
    return Factors(factors=tuple(factors), linear=ALONE)


def _split_with_sizes(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, dim_of(call, 2, default=0))), linear=ALONE)


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


def _stack(call: Call) -> Factors:
    """The new dim stays whole."""
    (result,), count = call.results, len(call.operands)
    new = call.argument(1, "dim", 0) % len(result.shape)
    factors = []
    for dim, size in enumerate(first_of(call).shape):
        places = (Place(dim),) * count
        factors.append(Factor(size=size, operands=places, results=(Place(dim + (dim >= new)),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=(frozenset(range(count)),))


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


def _unbind(call: Call) -> Factors:
    """The dim that is taken apart stays whole."""
    source, dim = first_of(call), dim_of(call, 1, default=0)
    factors = (
        Factor(
            size=size, operands=(Place(here),), results=(Place(here - (here > dim)),) * len(call.results),
            whole=size == 1,
        )
        for here, size in enumerate(source.shape)
        if here != dim
    )  # fmt: skip
    return Factors(factors=tuple(factors), linear=ALONE)


def _repeat_interleave(call: Call) -> Factors | None:
    """Every element of ``dim`` behind itself: a piece of them is repeated to a piece, if all are as often."""
    source = first_of(call)
    if call.argument(2, "dim") is None:
        return None
    dim = call.argument(2, "dim") % len(source.shape)
    alike = isinstance(call.args[1], int) and call.kwargs.get("output_size") is None
    operands = (None,) * (len(call.operands) - 1)
    factors = (
        Factor(
            size=size, operands=(Place(here), *operands), results=(Place(here),),
            whole=size == 1 or (here == dim and not alike), equal=here == dim,
        )
        for here, size in enumerate(source.shape)
    )  # fmt: skip
    return Factors(factors=tuple(factors), linear=ALONE)


def _windows(call: Call) -> Factors:
    """Windows along a dim, which stays whole, in a new last dim."""
    return Factors(factors=tuple(same(call, call.args[1] % len(first_of(call).shape))), linear=ALONE)


def _diagonal(call: Call) -> Factors:
    """Two dims become one at the end."""
    source = first_of(call)
    ndim = len(source.shape)
    gone = {call.argument(2, "dim1", 0) % ndim, call.argument(3, "dim2", 1) % ndim}
    kept = (dim for dim in range(ndim) if dim not in gone)
    factors = (
        Factor(size=source.shape[dim], operands=(Place(dim),), results=(Place(i),), whole=source.shape[dim] == 1)
        for i, dim in enumerate(kept)
    )
    return Factors(factors=tuple(factors), linear=ALONE)


def _on_diagonal(call: Call) -> Factors:
    """The last dim becomes two."""
    source, result = first_of(call), call.results[0]
    ndim = len(result.shape)
    new = {call.argument(2, "dim1", -2) % ndim, call.argument(3, "dim2", -1) % ndim}
    kept = (dim for dim in range(ndim) if dim not in new)
    factors = (
        Factor(size=source.shape[i], operands=(Place(i),), results=(Place(dim),), whole=source.shape[i] == 1)
        for i, dim in enumerate(kept)
    )
    return Factors(factors=tuple(factors), linear=ALONE)


def _diagonal_scattered(call: Call) -> Factors:
    """The diagonal of two dims replaced."""
    source = first_of(call)
    ndim = len(source.shape)
    gone = {call.argument(3, "dim1", 0) % ndim, call.argument(4, "dim2", 1) % ndim}
    kept = (dim for dim in range(ndim) if dim not in gone)
    factors = (
        Factor(
            size=source.shape[dim], operands=(Place(dim), Place(i)), results=(Place(dim),), whole=source.shape[dim] == 1
        )
        for i, dim in enumerate(kept)
    )
    return Factors(factors=tuple(factors), linear=(frozenset({0, 1}),))


CUTS: Rules = {
    aten.split.Tensor: _split,
    aten.chunk.default: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
    aten.unfold.default: _windows,
    aten.slice_scatter.default: _scattered,
    aten.select_scatter.default: _scattered,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.diagonal.default: _diagonal,
    aten.diag_embed.default: _on_diagonal,
    aten.diagonal_scatter.default: _diagonal_scattered,
}
