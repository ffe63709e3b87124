"""Losses: element by element, summed or averaged over all of them."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from meshwright.passes.factors import Factor, Factors, Place, Rule, instantiate
from meshwright.passes.rules.call import Call, Rules
from meshwright.passes.rules.pointwise import pointwise

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2
"""How torch numbers reductions."""


def _reduction(call: Call) -> int:
    names = [argument.name for argument in call.target._schema.arguments]
    return call.argument(names.index("reduction"), "reduction", MEAN)  # type: ignore[no-any-return]


def _elementwise(call: Call) -> Factors:
    """A mean over equal pieces is the mean of their means."""
    reduction = _reduction(call)
    if reduction == NONE:
        return pointwise(call)
    values = [value for value in call.operands if value is not None]
    ndim = max(len(value.shape) for value in values)
    factors = []
    for dim in range(ndim):
        places = [dim - ndim + len(value.shape) for value in values]
        sizes = [value.shape[p] if p >= 0 else 1 for value, p in zip(values, places, strict=True)]
        size = next((size for size in sizes if size != 1), 1)
        here = tuple(Place(p) if p >= 0 and s == size else None for p, s in zip(places, sizes, strict=True))
        whole = size == 1 or any(s not in (1, size) for s in sizes)
        factors.append(Factor(size=size, operands=here, results=(None,), whole=whole, mean=reduction == MEAN))
    return Factors(factors=tuple(factors))


def _cross_entropy(call: Call) -> Factors:
    """Classes may be split where every row has one label, which is all that counts. With soft targets the mean is over
    all rows (with labels it is a sum over a count by now).
    """
    soft = call.operands[1] is not None and call.operands[1].dtype.is_floating_point
    weighted = len(call.operands) > 2
    if soft:
        rule = Rule("n v!, n v!, v! -> " if weighted else "n v!, n v! -> ")
    elif weighted or call.kwargs.get("label_smoothing"):
        rule = Rule("n v!, n, v! -> " if weighted else "n v!, n -> ")
    else:
        rule = Rule("n v, n -> ", pieces={"v": "cross_entropy"}, invariant=frozenset("v"))
    factors = instantiate(rule, call.shapes, tuple(value.shape for value in call.results))
    if not soft or call.kwargs.get("reduction") == "sum":
        return factors
    return replace(factors, factors=tuple(replace(f, mean=f.operands[1] == Place(0)) for f in factors.factors))


def _by_sample(call: Call) -> Factors | None:
    """Losses that look at all classes of a sample: samples by themselves, averaged over or summed."""
    reduction = _reduction(call)
    values = [value for value in call.operands if value is not None]
    if len(values[0].shape) != 2:
        return None
    size = values[0].shape[0]
    places = (Place(0), Place(0), *(None,) * (len(values) - 2))
    results = (Place(0) if reduction == NONE else None,)
    batch = Factor(size=size, operands=places, results=results, whole=size == 1, mean=reduction == MEAN)
    return Factors(factors=(batch,))


def _ctc(call: Call) -> Factors | None:
    """Samples by themselves where every one has targets and lengths of its own."""
    reduction = _reduction(call)
    logarithms, targets = call.operands[:2]
    assert logarithms is not None and targets is not None
    if len(logarithms.shape) != 3 or len(targets.shape) != 2 or len(call.operands) != 4:
        return None
    size = logarithms.shape[1]
    results = (Place(0) if reduction == NONE else None,)
    places = (Place(1), *(Place(0),) * 3)
    batch = Factor(size=size, operands=places, results=results, whole=size == 1, mean=reduction == MEAN)
    return Factors(factors=(batch,))


LOSSES: Rules = {
    F.cross_entropy: _cross_entropy,
    aten.mse_loss.default: _elementwise,
    aten.l1_loss.default: _elementwise,
    aten.smooth_l1_loss.default: _elementwise,
    aten.huber_loss.default: _elementwise,
    aten.soft_margin_loss.default: _elementwise,
    aten.binary_cross_entropy.default: _elementwise,
    aten.binary_cross_entropy_with_logits.default: _elementwise,
    aten.kl_div.default: _elementwise,
    aten.multi_margin_loss.default: _by_sample,
    aten.multilabel_margin_loss.default: _by_sample,
    aten.ctc_loss.Tensor: _ctc,
}
