"""Operators that reduce dims, or run along them."""

import torch

from meshwright.passes.factors import Factors
from meshwright.passes.rules.call import (
    ALONE,
    Call,
    Rules,
    along_whole_dim,
    dim_of,
    first_of,
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


def _topk(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, dim_of(call, 2))))


def _reduce_whole(call: Call) -> Factors:
    reduced = reduced_dims(call)
    return Factors(factors=tuple(same(call, *reduced, summed=reduced)))


def _spectrum(call: Call) -> Factors:
    return Factors(factors=tuple(same(call, dim_of(call, 2))), linear=ALONE)


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
        ),
        _reduce_whole,
    ),
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
    aten.sort.default: along_whole_dim,
    aten.argsort.default: along_whole_dim,
    aten.topk.default: _topk,
    **dict.fromkeys(
        (
            aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default,
            aten.fft_hfft.default, aten.fft_ihfft.default,
        ),
        _spectrum,
    ),
}  # fmt: skip
