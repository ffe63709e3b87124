"""What a forward leaves behind for its backward: the tensors that autograd keeps, by the operator that keeps them.

An estimate: what torch keeps besides the tensors of the graph (statistics of norms, the normalizer of fused attention)
is left out, and an operator that no line is for keeps its operands.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.nn import functional as F

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.graph import Function, Value, is_operator
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import operands, results
from meshwright.runtime import random
from meshwright.runtime.collectives import invariant_to_replicated
from meshwright.runtime.layout import largest_piece

aten = torch.ops.aten


class Keeps(Enum):
    """What of its tensors an operator needs in its backward."""

    NOTHING = "nothing"
    OPERANDS = "all operands"
    OTHERS = "each operand that is a factor of the gradient of another"
    MASKS = "the operands that have no gradient"
    RESULT = "its result"
    BOTH = "all operands and its result"
    FRESH = "something of its own, as large as the first operand"


KEEPS: Mapping[Any, Keeps] = {
    **dict.fromkeys(
        (
            aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar,
            aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.to.dtype, aten.clone.default, aten.sum.default,
            aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cat.default, aten.stack.default,
            aten.pad.default, aten.constant_pad_nd.default, aten.cumsum.default, aten.repeat.default,
            aten.flip.default, aten.roll.default,
        ),
        Keeps.NOTHING,
    ),
    **dict.fromkeys(
        (
            aten.mul.Tensor, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
            aten.einsum.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.convolution.default, aten.div.Tensor,
        ),
        Keeps.OTHERS,
    ),
    **dict.fromkeys(
        (
            aten.embedding.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
            aten.where.ScalarSelf, aten.where.ScalarOther, aten.index_select.default, aten.index.Tensor,
        ),
        Keeps.MASKS,
    ),
    **dict.fromkeys(
        (
            aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.sqrt.default,
            aten.rsqrt.default, aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default,
        ),
        Keeps.RESULT,
    ),
    **dict.fromkeys(
        (
            aten.scaled_dot_product_attention.default, random.attention_with_dropout, aten.logsumexp.default,
            aten.amax.default, aten.amin.default,
        ),
        Keeps.BOTH,
    ),
    **dict.fromkeys(
        (F.cross_entropy, random.dropout, random.feature_dropout, random.alpha_dropout, random.feature_alpha_dropout),
        Keeps.FRESH,
    ),
}  # fmt: skip
"""Operators that do not keep their operands. Views and conversions keep nothing."""


class Memory(NamedTuple):
    """A piece of memory: that of a node's value, in an instance of a block or ("") in the main function.

    own: what the node keeps beside its value.
    """

    instance: str
    node: fx.Node
    own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What each node of the main function keeps, and the bytes of it on one rank and microbatch.

    Parameters, buffers and the batch are there anyway and do not count.
    """

    by_node: Mapping[fx.Node, frozenset[Memory]]
    bytes: Mapping[Memory, int]

    def of(self, nodes: Iterable[fx.Node]) -> int:
        """The bytes that nodes keep together: memory that several of them keep counts once."""
        return sum(self.bytes[memory] for memory in frozenset().union(*(self.by_node.get(n, ()) for n in nodes)))


def saved(blocks: Blocks, sizes: Mapping[str, int], symbols: Mapping[sympy.Symbol, int]) -> Saved:
    """What a forward keeps, for typed blocks on axes of ``sizes`` (mb among them) and a global batch of ``symbols``."""
    inside = {block.name: _in_function(block.function) for block in blocks.blocks}
    main = blocks.main
    roots: dict[fx.Node, Memory] = {}
    by_node: dict[fx.Node, frozenset[Memory]] = {}
    for node in main.graph.nodes:
        if node.op == "call_module":
            block, path = blocks.of(str(node.target)), str(node.target)
            kept, inner = inside[block.name]
            given = dict(zip(block.function.inputs(), (roots[n] for n in operands(node)), strict=True))

            def outside(memory: Memory, given: Mapping[fx.Node, Memory] = given, path: str = path) -> Memory:
                return given[memory.node] if memory.node in given else memory._replace(instance=path)

            by_node[node] = frozenset(map(outside, kept))
            for result, made in zip(results(main, node), block.function.results(), strict=False):
                roots[result] = outside(inner[made])
        elif node.op != "output":
            if node in main.values and node not in roots:
                roots[node] = _root(main, node, roots)
            if node.op == "call_function":
                by_node[node] = frozenset(_kept(main, node, roots))
    counted = {memory for kept in by_node.values() for memory in kept if memory.node.op == "call_function"}
    functions = {path: block.function for block in blocks.blocks for path in block.instances} | {"": main}
    return Saved(
        by_node={node: kept & counted for node, kept in by_node.items()},
        bytes={m: local_bytes(_value(functions[m.instance], m), sizes, symbols) for m in counted},
    )


def _value(function: Function, memory: Memory) -> Value:
    return function.values[operands(memory.node)[0] if memory.own else memory.node]


def local_bytes(value: Value, sizes: Mapping[str, int], symbols: Mapping[sympy.Symbol, int]) -> int:
    """Bytes of the largest piece of a value that a rank has of one microbatch."""
    shape = [size if isinstance(size, int) else int(size.subs(symbols)) for size in value.shape]
    for axis, type_ in value.types.items():
        if type_.is_split:
            shape[type_.dim] = largest_piece(shape[type_.dim], sizes.get(axis, 1))
    return math.prod(shape) * value.dtype.itemsize


def _in_function(function: Function) -> tuple[frozenset[Memory], Mapping[fx.Node, Memory]]:
    """What a block keeps, its inputs included, and the memory of every value."""
    roots: dict[fx.Node, Memory] = {}
    kept: set[Memory] = set()
    for node in function.graph.nodes:
        if node in function.values:
            roots[node] = _root(function, node, roots)
        if node.op == "call_function":
            kept.update(_kept(function, node, roots))
    return frozenset(memory for memory in kept if memory.node.op != "get_attr"), roots


def _root(function: Function, node: fx.Node, roots: Mapping[fx.Node, Memory]) -> Memory:
    """The memory of a value: its own, or that of what it is a view of."""
    maker = node.all_input_nodes[0] if node.target is operator.getitem else node
    for source in maker.all_input_nodes[:1]:
        if source in roots and _is_view(function, maker, source):
            return roots[source]
    return Memory("", node)


def _is_view(function: Function, node: fx.Node, source: fx.Node) -> bool:
    if node.target is invariant_to_replicated:
        return True
    if not is_operator(node):
        return False
    target: Any = node.target
    returned = target._schema.returns[0].alias_info
    if returned is None or returned.is_write:
        return False
    value = function.values.get(node)
    if node.target is aten.to.dtype:
        return value is not None and value.dtype == function.values[source].dtype
    return node.target is not aten.reshape.default or not _is_expanded(source)


def _is_expanded(node: fx.Node) -> bool:
    """Whether reshaping copies a value because it stands for several copies of one."""
    return node.target is aten.expand.default


def _kept(function: Function, node: fx.Node, roots: Mapping[fx.Node, Memory]) -> Iterator[Memory]:
    made = results(function, node)
    if not any(n in function.values and function.values[n].grad for n in made) or conversion_of(node) is not None:
        return
    given = [n for n in operands(node) if n in function.values]
    if given and _is_view(function, node, given[0]):
        return
    keeps = KEEPS.get(node.target, Keeps.OPERANDS)
    learning = [n for n in given if function.values[n].grad]
    if keeps is Keeps.FRESH:
        yield Memory("", node, own=True)
    if keeps in (Keeps.RESULT, Keeps.BOTH):
        yield from (roots[n] if n in roots else Memory("", n) for n in made)
    for position, operand in enumerate(given):
        others = given[:position] + given[position + 1 :]
        if (
            keeps in (Keeps.OPERANDS, Keeps.BOTH)
            or (keeps is Keeps.MASKS and operand not in learning)
            or (keeps is Keeps.OTHERS and any(other in learning for other in others))
        ):
            yield roots[operand]
