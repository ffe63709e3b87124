"""Normalizations and attention."""

from functools import partial

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import Call, Rules, first_of
from meshwright.runtime.buffers import batch_norm

aten = torch.ops.aten


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


def _group_norm(call: Call) -> Factors:
    """Every sample and every group of channels by itself; a piece of the groups is computed with as many fewer."""
    count = sum(value is not None for value in call.operands)
    batch, groups = first_of(call).shape[0], call.args[1]
    samples = Factor(size=batch, operands=(Place(0), *(None,) * (count - 1)), results=(Place(0),), whole=batch == 1)
    channels = Factor(
        size=groups, operands=(Place(1), *(Place(0),) * (count - 1)), results=(Place(1),), whole=groups == 1,
        equal=True, pieces="fewer_groups",
    )  # fmt: skip
    return Factors(factors=(samples, channels))


def _instance_norm(call: Call) -> Factors:
    """Every channel of every sample by itself."""
    count = sum(value is not None for value in call.operands)
    batch, channels = first_of(call).shape[:2]
    samples = Factor(size=batch, operands=(Place(0), *(None,) * (count - 1)), results=(Place(0),), whole=batch == 1)
    return Factors(
        factors=(
            samples,
            Factor(
                size=channels, operands=(Place(1), *(Place(0),) * (count - 1)), results=(Place(1),),
                whole=channels == 1,
            ),
        )
    )  # fmt: skip


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


LAYERS: Rules = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.batch_norm.default: _batch_norm,
    batch_norm: partial(_batch_norm, synchronized=True),
    aten._weight_norm_interface.default: _weight_norm,
    aten.scaled_dot_product_attention.default: attention,
}
