"""Operators that reduce dims, or run along them."""

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import (
    ALONE,
    Call,
    RuleFunction,
    Rules,
    along_whole_dim,
    dim_of,
    first_of,
    in_common,
    linear_along_whole_dim,
    same,
)

aten = torch.ops.aten


def reduced_dims(call: Call) -> tuple[int, ...]:
    first = call.operands[0]
    assert first is not None
    ndim = len(first.shape)
    takes_dim = any(argument.name == "dim" for argument in call.target._schema.arguments)
    dims = call.argument(1, "dim") if takes_dim else None
    if dims is None or dims == []:
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in ([dims] if isinstance(dims, int) else dims))


def _sum(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, summed=reduced_dims(call))), linear=(frozenset({0}),))


def _mean(call: Call) -> Factors:
    """A mean over a fixed size is a normalization's and stays whole; over tokens it is a sum of the pieces' means."""
    reduced = reduced_dims(call)
    first = call.operands[0]
    assert first is not None
    fixed = [dim for dim in reduced if isinstance(first.shape[dim], int)]
    return Factors(factors=tuple(same(call, *fixed, mean=reduced)), linear=(frozenset({0}),))


def _norm(call: Call) -> Factors:
    first = first_of(call)
    dims = call.argument(2, "dim")
    reduced = tuple(range(len(first.shape))) if dims is None else tuple(dim % len(first.shape) for dim in dims)
    return Factors(factors=tuple(same(call, *reduced, summed=reduced)))


def _along(position: int) -> RuleFunction:
    """The dim that the argument at ``position`` names stays whole; results may lack it."""

    def rule(call: Call) -> Factors:
        dim = dim_of(call, position)
        gone = () if len(call.results[0].shape) == len(first_of(call).shape) else (dim,)
        return Factors(factors=tuple(same(call, dim, summed=gone)))

    return rule


def _glu(call: Call) -> Factors:
    """Both halves of the dim are split alike."""
    dim = dim_of(call)
    factors = list(same(call))
    half = call.results[0].shape[dim]
    factors[dim] = Factor(size=half, operands=(Place(dim, 2),), results=(Place(dim),), whole=half == 1)
    return Factors(factors=tuple(factors))


def _count(call: Call) -> Factors:
    """A sum, but not linear."""
    return Factors(factors=_sum(call).factors)


def _reduce_whole(call: Call) -> Factors:
    reduced = reduced_dims(call)
    return Factors(factors=tuple(same(call, *reduced, summed=reduced)))


def _aminmax(call: Call) -> Factors:
    """Along one dim, or over everything."""
    dim, ndim = call.kwargs.get("dim"), len(first_of(call).shape)
    reduced = tuple(range(ndim)) if dim is None else (dim % ndim,)
    return Factors(factors=tuple(same(call, *reduced, summed=reduced)))


def _renorm(call: Call) -> Factors:
    """Every slice along ``dim`` by itself."""
    dim = dim_of(call, 2)
    return in_common(call, (dim,))


def _histogram(call: Call) -> Factors | None:
    """Counts of pieces add up where the range is given, and is not that of the data."""
    if call.argument(2, "min", 0) == call.argument(3, "max", 0):
        return None
    return Factors(factors=tuple(same(call, summed=tuple(range(len(first_of(call).shape))))))


def _spectrum(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, dim_of(call, 2))), linear=ALONE)


def _spectra(call: Call) -> Factors:
    """The dims that are transformed stay whole: the last two, or all where none are named."""
    ndim = len(first_of(call).shape)
    dims = call.argument(2, "dim") or ((-2, -1) if call.target._schema.name.endswith("2") else range(ndim))
    return Factors(factors=tuple(same(call, *(dim % ndim for dim in dims))), linear=ALONE)


_TRANSFORMS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")

REDUCTIONS: Rules = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    **dict.fromkeys(
        (
            aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.all.default,
            aten.any.default, aten.all.dim, aten.any.dim, aten.prod.default, aten.prod.dim_int, aten.logsumexp.default,
            aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim,
            aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim,
            aten.var_mean.correction, aten.std_mean.correction, aten.median.default, aten.nanmedian.default,
        ),
        _reduce_whole,
    ),
    aten.histc.default: _histogram,
    aten.nansum.default: _count,
    aten.count_nonzero.default: _count,
    aten.count_nonzero.dim_IntList: _count,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    # along a dim
    aten.softmax.int: along_whole_dim,
    aten.log_softmax.int: along_whole_dim,
    aten.cumprod.default: along_whole_dim,
    aten.logcumsumexp.default: along_whole_dim,
    aten.cummax.default: along_whole_dim,
    aten.cummin.default: along_whole_dim,
    aten.cumsum.default: linear_along_whole_dim,
    aten.glu.default: _glu,
    aten.sort.default: along_whole_dim,
    aten.sort.stable: along_whole_dim,
    aten.argsort.default: along_whole_dim,
    aten.argsort.stable: along_whole_dim,
    aten.topk.default: _along(2),
    aten.kthvalue.default: _along(2),
    aten.median.dim: _along(1),
    aten.nanmedian.dim: _along(1),
    aten.mode.default: _along(1),
    aten.aminmax.default: _aminmax,
    aten.renorm.default: _renorm,
    **{getattr(aten, f"fft_{name}").default: _spectrum for name in _TRANSFORMS},
    **{getattr(aten, f"fft_{name}{dims}").default: _spectra for name in _TRANSFORMS[:4] for dims in "2n"},
}  # fmt: skip
