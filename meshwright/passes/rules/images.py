"""Convolutions, pooling and what else works on samples by channels by places."""

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import ALONE, Call, Rules, first_of, in_common

aten = torch.ops.aten


def _convolution(call: Call) -> Factors | None:
    """Batch, groups, and channels within every group; input channels where no bias would be added on every rank.

    The places that a kernel reaches over stay whole. A piece of the groups is computed with as many groups fewer.
    """
    source, weight, *rest = call.operands
    assert source is not None and weight is not None
    if len(source.shape) != len(weight.shape):
        return None  # without a batch
    with_bias = any(value is not None for value in rest)
    names = [argument.name for argument in call.target._schema.arguments]
    groups = call.argument(names.index("groups"), "groups", 1)
    transposed = "transpose" in call.target._schema.name or call.argument(6, "transposed", False) is True
    none = (None,) * with_bias
    batch, channels = source.shape[0], call.results[0].shape[1]
    factors = [Factor(size=batch, operands=(Place(0), None, *none), results=(Place(0),), whole=batch == 1)]
    if groups > 1:
        grouped = (Place(1), Place(0), *(Place(0),) * with_bias)
        factors.append(Factor(size=groups, operands=grouped, results=(Place(1),), equal=True, pieces="fewer_groups"))
    inside = Place(1, groups)  # channels within every group
    out, inner = (Place(1), Place(0, groups)) if transposed else (Place(0, groups), Place(1))
    places = (None, out, *(Place(0, groups),) * with_bias)
    size = channels // groups
    factors.append(Factor(size=size, operands=places, results=(inside,), whole=size == 1))
    if not with_bias:
        size = source.shape[1] // groups
        factors.append(Factor(size=size, operands=(inside, inner), results=(None,), whole=size == 1))
    return Factors(factors=tuple(factors), linear=() if with_bias else (frozenset({0}), frozenset({1})))


def _in_front(spatial: int, call: Call) -> range:
    """The dims before the last ``spatial`` ones."""
    return range(len(first_of(call).shape) - spatial)


def _pooled(call: Call) -> Factors:
    """Batch and channels; the last dims, as many as the operator's name says, stay whole."""
    name = call.target._schema.name
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in name)
    linear = ALONE if "avg" in name or "upsample" in name else ()
    return in_common(call, _in_front(spatial, call), linear)


def _fractional(call: Call) -> Factors:
    """Where a piece of batch or channels is pooled, so are its samples."""
    spatial = 2 if "2d" in call.target._schema.name else 3
    return in_common(call, _in_front(spatial, call) if len(first_of(call).shape) > spatial + 1 else ())


def _channels_moved(call: Call) -> Factors | None:
    """Batch, and the channels that have places inside their dim on one side; for pixels the other places too."""
    source, result = first_of(call), call.results[0]
    channel = 1 if call.target in (aten.im2col.default, aten.col2im.default) else len(source.shape) - 3
    if len(source.shape) == (2 if call.target is aten.col2im.default else 3):
        return None  # without a batch
    factors = [
        Factor(size=source.shape[dim], operands=(Place(dim),), results=(Place(dim),), whole=source.shape[dim] == 1)
        for dim in range(channel)
    ]
    size = min(source.shape[channel], result.shape[channel])
    factors.append(Factor(size=size, operands=(Place(channel),), results=(Place(channel),), whole=size == 1))
    if call.target in (aten.pixel_shuffle.default, aten.pixel_unshuffle.default):
        for dim in range(channel + 1, len(source.shape)):
            size = min(source.shape[dim], result.shape[dim])
            factors.append(Factor(size=size, operands=(Place(dim),), results=(Place(dim),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=ALONE)


def _channel_shuffle(call: Call) -> Factors:
    """Places and batch; channels meet each other."""
    return in_common(call, (dim for dim in range(len(first_of(call).shape)) if dim != 1), ALONE)


def _grid_sampler(call: Call) -> Factors:
    """Batch, channels, and the places of the grid."""
    source, grid = call.operands
    assert source is not None and grid is not None
    batch, channels = source.shape[:2]
    factors = [
        Factor(size=batch, operands=(Place(0), Place(0)), results=(Place(0),), whole=batch == 1),
        Factor(size=channels, operands=(Place(1), None), results=(Place(1),), whole=channels == 1),
    ]
    for dim in range(1, len(grid.shape) - 1):
        size = grid.shape[dim]
        factors.append(Factor(size=size, operands=(None, Place(dim)), results=(Place(dim + 1),), whole=size == 1))
    return Factors(factors=tuple(factors), linear=ALONE)


_DIMS = ("1d", "2d", "3d")
_INTERPOLATIONS = (
    "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d",
)  # fmt: skip
_PRIVATE_INTERPOLATIONS = ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa")

IMAGES: Rules = {
    **{getattr(aten, f"conv{dims}").default: _convolution for dims in _DIMS},
    **{getattr(aten, f"conv{dims}").padding: _convolution for dims in _DIMS},
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _convolution,
    aten.conv_transpose2d.input: _convolution,
    aten.conv_transpose3d.input: _convolution,
    **{getattr(aten, f"avg_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"max_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"max_pool{dims}_with_indices").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"adaptive_avg_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"adaptive_max_pool{dims}").default: _pooled for dims in _DIMS},
    **{getattr(aten, f"max_unpool{dims}").default: _pooled for dims in _DIMS[1:]},
    **{getattr(aten, f"fractional_max_pool{dims}").default: _fractional for dims in _DIMS[1:]},
    **{getattr(aten, f"upsample_{name}").vec: _pooled for name in _INTERPOLATIONS},
    **{getattr(aten, f"_upsample_{name}").vec: _pooled for name in _PRIVATE_INTERPOLATIONS},
    aten.grid_sampler.default: _grid_sampler,
    aten.im2col.default: _channels_moved,
    aten.col2im.default: _channels_moved,
    aten.pixel_shuffle.default: _channels_moved,
    aten.pixel_unshuffle.default: _channels_moved,
    aten.channel_shuffle.default: _channel_shuffle,
}
