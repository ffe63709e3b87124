"""Operators with parameters: products, convolutions, normalizations, attention, pooling."""

from functools import partial

import torch

from meshwright.passes.factors import Factor, Factors, Place, Rule, instantiate
from meshwright.passes.rules.call import ALONE, Call, Rules, first_of, same
from meshwright.runtime.buffers import batch_norm

aten = torch.ops.aten


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


def attention(call: Call) -> Factors:
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


def _baddbmm(call: Call) -> Factors:
    """The first operand is added once: what is summed over stays whole."""
    rule = Rule("b m n, b m k!, b k! n -> b m n", linear=((0, 1), (0, 2)))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _einsum(call: Call) -> Factors:
    """The equation is the rule."""
    left, arrow, right = call.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or not arrow or any(len(set(term)) != len(term) for term in terms):
        return Factors(factors=())
    text = f"{', '.join(' '.join(term) for term in terms)} -> {' '.join(right)}"
    rule = Rule(text, linear=tuple((i,) for i in range(len(terms))))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _convolution(call: Call) -> Factors:
    """Batch and output channels; input channels where there is no bias that would be added on every rank.

    Grouped channels stay whole, as do the places that a kernel reaches over.
    """
    source, weight, *rest = call.operands
    assert source is not None and weight is not None
    if len(source.shape) != len(weight.shape):
        return Factors(factors=())  # without a batch
    with_bias = any(value is not None for value in rest)
    transposed = "transpose" in call.target._schema.name
    groups = call.argument(6, "groups", 1)  # the same place in both schemas
    out, inner = (1, 0) if transposed else (0, 1)
    none = (None,) * with_bias
    factors = [
        Factor(size=source.shape[0], operands=(Place(0), None, *none), results=(Place(0),), whole=source.shape[0] == 1)
    ]
    if groups == 1:
        bias = (Place(0),) * with_bias
        factors.append(
            Factor(
                size=weight.shape[out],
                operands=(None, Place(out), *bias),
                results=(Place(1),),
                whole=weight.shape[out] == 1,
            )
        )
        if not with_bias:
            factors.append(Factor(size=weight.shape[inner], operands=(Place(1), Place(inner)), results=(None,)))
    linear = () if with_bias else (frozenset({0}), frozenset({1}))
    return Factors(factors=tuple(factors), linear=linear)


def _pooled(call: Call) -> Factors:
    """Batch and channels; the last dims, as many as the pooling has, stay whole."""
    source = first_of(call)
    name = call.target._schema.name
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in name)
    ndim = len(source.shape)
    linear = ALONE if "avg" in name else ()
    return Factors(factors=tuple(same(call, *range(ndim - spatial, ndim))), linear=linear)


def _samples_alone(call: Call) -> Factors:
    """Group and instance normalization: every sample by itself."""
    count = sum(value is not None for value in call.operands)
    size = first_of(call).shape[0]
    places = (Place(0), *(None,) * (count - 1))
    return Factors(factors=(Factor(size=size, operands=places, results=(Place(0),), whole=size == 1),))


def _batch_norm(call: Call, synchronized: bool = False) -> Factors:
    """Every channel by itself. Where the statistics are those of the batch, its pieces are synchronized, or whole."""
    source, *others = (value for value in call.operands if value is not None)
    channels = tuple(Place(0) if value.shape else None for value in others)
    of_batch = bool(call.argument(5, "training"))
    factors = []
    for dim, size in enumerate(source.shape):
        mixes = of_batch and dim != 1
        places = (Place(dim), *(channels if dim == 1 else (None,) * len(others)))
        factors.append(
            Factor(
                size=size, operands=places, results=(Place(dim),), whole=size == 1 or (mixes and not synchronized),
                synchronized=mixes and synchronized,
            )
        )  # fmt: skip
    return Factors(factors=tuple(factors))


def _weight_norm(call: Call) -> Factors:
    """A direction scaled to the lengths along ``dim``; the other dims are measured whole."""
    dim = call.argument(2, "dim", 0)
    size = first_of(call).shape[dim]
    count = len(call.results)
    factor = Factor(size=size, operands=(Place(dim),) * 2, results=(Place(dim),) * count, whole=size == 1)
    return Factors(factors=(factor,))


_DIMS = ("1d", "2d", "3d")

LAYERS: Rules = {
    # products
    aten.linear.default: Rule("... i, o i -> ... o", linear=((0,), (1,))),
    aten.matmul.default: _matmul,
    aten.mm.default: Rule("m k, k n -> m n", linear=((0,), (1,))),
    aten.bmm.default: Rule("b m k, b k n -> b m n", linear=((0,), (1,))),
    aten.mv.default: Rule("m k, k -> m", linear=((0,), (1,))),
    aten.dot.default: Rule("k, k ->", linear=((0,), (1,))),
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    # convolutions and pooling
    **{getattr(aten, f"conv{dims}").default: _convolution for dims in _DIMS},
    aten.conv_transpose1d.default: _convolution,
    aten.conv_transpose2d.input: _convolution,
    aten.conv_transpose3d.input: _convolution,
    **{getattr(aten, f"avg_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"max_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"adaptive_avg_pool{dims}").default: _pooled for dims in _DIMS},
    # normalizations and attention
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.group_norm.default: _samples_alone,
    aten.instance_norm.default: _samples_alone,
    aten.batch_norm.default: _batch_norm,
    batch_norm: partial(_batch_norm, synchronized=True),
    aten._weight_norm_interface.default: _weight_norm,
    aten.scaled_dot_product_attention.default: attention,
}
