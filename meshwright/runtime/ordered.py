"""Collectives in graphs of torch.compile: operators that it does not look into, in the order of the program.

What a conversion does beside its communication stays visible. Every communication of a graph takes a token of the one
before, so no pass of a compiler can put them in another order than the program has, which is the same on all ranks of
a group.
"""

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from meshwright.runtime.collectives import COMMUNICATIONS
from meshwright.runtime.groups import current


@torch.library.custom_op("meshwright::communicate", mutates_args=())
def communicate(
    x: torch.Tensor, kind: str, axis: str, pieces: int, after: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of ``COMMUNICATIONS``, and a token for the next to come after."""
    return COMMUNICATIONS[kind](current().group([axis]), pieces, x), x.new_empty(0)


SHAPES: Mapping[str, Callable[[Sequence[int], int], Sequence[int]]] = {
    "all_reduce": lambda shape, pieces: shape,
    "all_gather": lambda shape, pieces: (pieces, *shape),
    "reduce_scatter": lambda shape, pieces: shape[1:],
    "all_to_all": lambda shape, pieces: shape,
}


@communicate.register_fake
def _(
    x: torch.Tensor, kind: str, axis: str, pieces: int, after: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(SHAPES[kind](x.shape, pieces)), x.new_empty(0)


def put_in_order(graph: fx.Graph) -> None:
    """Give every communication of a graph the token of the one before."""
    token = None
    for node in graph.find_nodes(op="call_function", target=torch.ops.meshwright.communicate.default):
        if token is not None:
            node.args = (*node.args[:4], token)
        with graph.inserting_after(node):
            token = graph.call_function(operator.getitem, (node, 1))
            token.meta["val"] = node.meta["val"][1]
