"""What computation and communication cost: a roofline for operators, latency and bandwidth for collectives.

Times in seconds of one accelerator of the current generation; only their ratios matter. A toy model is priced at the
size
of its big sisters (features up to 8192, 4096 tokens), so that it gets the same plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch
from torch import fx
from torch.nn import functional as F

from meshwright.compiler.graph import Function, Value
from meshwright.compiler.types import Size, Type
from meshwright.runtime.random import attention_with_dropout

aten = torch.ops.aten

FLOPS = 4e14
MEMORY_BANDWIDTH = 2e12
LINK_BANDWIDTH = 2e11
LATENCY = 1e-5
BYTES = 2
UPDATE_BYTES = 28
"""Traffic of AdamW per element: gradient, parameter and both moments in float32, read and written."""
TOKENS = 4096
FEATURES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """How large the model counts: the values of symbols, and the factor that its features are scaled by.

    width: the model's hidden size; features of at most half of it (the one head of multi-query attention, say) do not
    grow with the model and count as they are.
    """

    sizes: Mapping[sympy.Symbol, int]
    scale: float
    width: int

    def features(self, size: int) -> float:
        """A fixed size as it counts."""
        return size * (self.scale if 2 * size > self.width else 1.0)

    def size(self, size: Size) -> float:
        """Any size as it counts."""
        return self.features(size) if isinstance(size, int) else float(size.subs(self.sizes))

    def elements(self, value: Value) -> float:
        """Elements of an activation as they count: its fixed dims together are its features."""
        fixed = math.prod(size for size in value.shape if isinstance(size, int))
        return self.features(fixed) * math.prod(self.size(size) for size in value.shape if not isinstance(size, int))


def prices(function: Function, batch: sympy.Symbol, example: Mapping[sympy.Symbol, int]) -> Prices:
    """The scale of a model from its widest matrix."""
    widths = [
        min(int(s) for s in value.shape)
        for node, value in function.values.items()
        if node.op == "get_attr" and len(value.shape) >= 2
    ]
    tokens = {symbol: 1 if symbol == batch and len(example) > 1 else TOKENS for symbol in example}
    width = max(widths, default=FEATURES)
    return Prices(sizes=tokens, scale=max(1.0, FEATURES / width), width=width)


_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default}
_FREE = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.detach.default,
}  # fmt: skip


class Times(NamedTuple):
    """Seconds: of a forward, of the backward for the inputs and of the backward for the weights."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: "Times") -> "Times":  # type: ignore[override]
        return Times(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, factor: float) -> "Times":  # type: ignore[override]
        return Times(*(factor * time for time in self))


def compute_times(prices: Prices, node: fx.Node, operands: tuple[Value, ...], results: tuple[Value, ...]) -> Times:
    """Seconds of one operator on whole tensors.

    A product takes as long as its forward for the gradient of each operand, anything else for those of all operands
    together, divided between data and parameters.
    """
    if node.target in _FREE or not results:
        return Times()
    learning = [value.made_of for value in operands if value.grad] if any(value.grad for value in results) else []
    data, parameters = learning.count("data"), learning.count("parameters")
    if node.target in _PRODUCTS:
        left, right = operands
        contracted = right.shape[-1 if node.target is aten.linear.default else -2 if len(right.shape) > 1 else 0]
        forward = 2 * prices.elements(results[0]) * prices.size(contracted) / FLOPS
        return Times(forward, forward * data, forward * parameters)
    if node.target in (aten.scaled_dot_product_attention.default, attention_with_dropout):
        forward = 4 * prices.elements(results[0]) * prices.size(operands[1].shape[-2]) / FLOPS
        return Times(forward, 2 * forward if data else 0.0, 2 * forward if parameters and not data else 0.0)
    traffic = sum(prices.elements(value) for value in (*operands, *results)) * BYTES
    if node.target is aten.embedding.default:
        traffic = 3 * prices.elements(results[0]) * BYTES
    forward = traffic / MEMORY_BANDWIDTH * (3 if node.target is F.cross_entropy else 1)
    backward = forward / (bool(data) + bool(parameters) or 1)
    return Times(forward, backward if data else 0.0, backward if parameters else 0.0)


_VOLUME = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.5, None: 0.0}

COLLECTIVES: Mapping[tuple[str, str], tuple[str | None, str | None]] = {
    ("I", "R"): (None, "all_reduce"),
    ("P", "I"): ("all_reduce", None),
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "I"): ("all_gather", None),
    ("I", "S"): (None, "all_gather"),
    ("R", "S"): (None, None),
    ("R", "P"): (None, None),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("S", "S"): ("all_to_all", "all_to_all"),
}
"""Conversion -> the collective of its forward and of its backward."""


def is_conversion(source: Type, target: Type) -> bool:
    """Whether one collective does it. From one split to another that is an exchange of whole dims: pieces of groups,
    and other groups of the same dim, are gathered and cut again.
    """
    if source.is_split and target.is_split:
        return source.dim != target.dim and source.groups == target.groups == 1
    return (source.kind, target.kind) in COLLECTIVES


def conversion_time(prices: Prices, value: Value, source: Type, target: Type, pieces: int) -> float:
    """Seconds of one conversion, forward and backward."""
    volumes = conversion_volumes(prices.elements(value) * BYTES, value.grad, source, target, pieces)
    return 1e-7 + sum(LATENCY + volume / LINK_BANDWIDTH for volume in volumes if volume)


def conversion_volumes(num_bytes: float, grad: bool, source: Type, target: Type, pieces: int) -> tuple[float, float]:
    """What a rank sends for the forward and for the backward of a conversion, of ``num_bytes`` of the whole value."""
    forward, backward = COLLECTIVES[source.kind, target.kind]
    share = num_bytes * (pieces - 1) / pieces
    return _VOLUME[forward] * share, _VOLUME[backward if grad else None] * share


def holding_time(prices: Prices, value: Value, split: bool, pending: bool, pieces: int) -> float:
    """What a parameter costs per step: its update's traffic, and its gradient's reduction where that is pending (in
    buckets).
    """
    elements = math.prod(prices.size(size) for size in value.shape)
    time = UPDATE_BYTES * elements / MEMORY_BANDWIDTH / (pieces if split else 1)
    return time + (2 * elements * BYTES / LINK_BANDWIDTH if pending else 0.0)
