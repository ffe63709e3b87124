"""The lines of operators that need more than themselves to compute with a piece of an operand.

Each takes the builder, the node, its operands (already converted), the axis, and the value with types that it must
end with.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from meshwright.compiler.graph import Value
from meshwright.compiler.names import Origin
from meshwright.compiler.types import I, P, S, Type
from meshwright.passes.rows import PIECE
from meshwright.runtime.collectives import all_gather, all_reduce, shard_range

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where pieces are computed: the axis and its size, the node that is replaced, and its source."""

    builder: Any
    node: fx.Node
    operands: tuple[fx.Node, ...]
    axis: str
    size: int
    value: Value
    origin: Origin | None

    def call(self, target: Any, *args: Any, like: Value | None = None, name: str = "", **kwargs: Any) -> fx.Node:
        """A line of its own when it has a name; ``like`` is its value, None for what is no tensor."""
        origin = self.origin
        if origin is not None:
            origin = replace(origin, name=name or origin.name, is_name_of_statement=bool(name), aliases=())
        node: fx.Node = self.builder.call(target, args, kwargs, like, origin, like=self.node)
        node.meta[PIECE] = True
        return node

    def elsewhere(self, indices: fx.Node, length: Any, name: str) -> tuple[fx.Node, fx.Node]:
        """Where the indices point into another rank's piece, and the indices into this one's."""
        value = self.builder.values[indices]
        mask = replace(value, dtype=torch.bool)
        bounds = self.call(shard_range, length, self.axis)
        start = self.call(operator.getitem, bounds, 0, name="start")
        stop = self.call(operator.getitem, bounds, 1, name="stop")
        below = self.call(aten.lt.Scalar, indices, start, like=mask)
        above = self.call(aten.ge.Scalar, indices, stop, like=mask)
        elsewhere = self.call(aten.bitwise_or.Tensor, below, above, like=mask, name="elsewhere")
        shifted = self.call(aten.sub.Tensor, indices, start, like=value)
        return elsewhere, self.call(aten.masked_fill.Scalar, shifted, elsewhere, 0, like=value, name=name)


def _embedding(piece: Piece) -> fx.Node:
    """Rows of a table that is split along its rows: zero where they are elsewhere, so that the sum is right."""
    table, indices = piece.operands
    name = piece.origin.name if piece.origin else "embedding"
    length = piece.builder.values[table].shape[0]
    elsewhere, rows = piece.elsewhere(indices, length, "rows")
    found = piece.call(aten.embedding.default, table, rows, like=piece.value, name=name)
    mask = piece.builder.values[elsewhere]
    column = replace(mask, shape=(*mask.shape, 1))
    hidden = piece.call(aten.unsqueeze.default, elsewhere, -1, like=column)
    return piece.call(aten.masked_fill.Scalar, found, hidden, 0, like=piece.value, name=name)


def _cross_entropy(piece: Piece) -> fx.Node:
    """The sum of log-sum-exp minus the label's logit, with the classes split (Megatron-LM, arXiv 1909.08053, section
    3).
    """
    logits, labels = piece.operands
    whole = piece.builder.values[logits]
    length, tokens = whole.shape[1], piece.builder.values[labels]

    def on_axis(shape: tuple[Any, ...], type_: Type) -> Value:
        return replace(whole, shape=shape, types={**whole.types, piece.axis: type_})  # type: ignore[no-any-return]

    row = whole.shape[:1]
    log_sum = piece.call(
        aten.logsumexp.default, logits, [1], True, like=on_axis((*row, piece.size), S(1)), name="log_sum"
    )
    log_sum = piece.call(
        all_gather, log_sum, piece.axis, dim=1, to="I", like=on_axis((*row, piece.size), I), name="log_sum"
    )
    log_sum = piece.call(aten.logsumexp.default, log_sum, [1], like=on_axis(row, I), name="log_sum")
    elsewhere, columns = piece.elsewhere(labels, length, "columns")
    index = piece.call(aten.unsqueeze.default, columns, 1, like=replace(tokens, shape=(*row, 1)))
    gathered = piece.call(aten.gather.default, logits, 1, index, like=on_axis((*row, 1), P))
    logit = piece.call(aten.squeeze.dim, gathered, 1, like=on_axis(row, P), name="label_logit")
    logit = piece.call(aten.masked_fill.Scalar, logit, elsewhere, 0, like=on_axis(row, P), name="label_logit")
    logit = piece.call(all_reduce, logit, piece.axis, like=on_axis(row, I), name="label_logit")
    ignore_index = piece.node.kwargs.get("ignore_index", -100)
    ignored = piece.call(aten.eq.Scalar, labels, ignore_index, like=replace(tokens, dtype=torch.bool))
    losses = piece.call(aten.sub.Tensor, log_sum, logit, like=on_axis(row, I))
    losses = piece.call(aten.masked_fill.Scalar, losses, ignored, 0, like=on_axis(row, I), name="loss")
    return piece.call(aten.sum.default, losses, like=piece.value)


def _fewer_groups(piece: Piece) -> fx.Node:
    """A piece of the groups, which are as many fewer."""
    names = [argument.name for argument in piece.node.target._schema.arguments]  # type: ignore[union-attr]
    position = next(i for i, name in enumerate(names) if name in ("groups", "num_groups"))
    queue = list(piece.operands)
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_aggregate(
        (piece.node.args, dict(piece.node.kwargs)), lambda a: queue.pop(0) if isinstance(a, fx.Node) else a
    )
    given = dict(zip(names, args, strict=False)) | kwargs
    given[names[position]] //= piece.size
    rest = {name: value for i, (name, value) in enumerate(given.items()) if i >= len(args)}
    name = piece.origin.name if piece.origin else ""
    written = [given[name] for name in names[: len(args)]]
    return piece.call(piece.node.target, *written, like=piece.value, name=name, **rest)


PIECES: Mapping[str, Callable[[Piece], fx.Node]] = {
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "fewer_groups": _fewer_groups,
}
