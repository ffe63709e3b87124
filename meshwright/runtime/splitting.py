"""A backward graph in two: I computes the gradients of data, W those of parameters from what I leaves.

W computes what nothing but gradients of parameters needs. Of what both need I hands tensors over; views and sizes are
made again, which costs nothing. An operator that gives both kinds at once, such as the backward of a convolution, is
called twice, each time for some of its results.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the two graphs. takes: the inputs of the whole that it takes first. gives: the outputs of the whole that
    it returns first.
    """

    graph: fx.Graph
    takes: tuple[int, ...]
    gives: tuple[int, ...]


def take_apart(graph: fx.Graph, held: Sequence[bool], weights: Collection[str]) -> tuple[Part, Part] | None:
    """I and W of a backward graph; ``held``: which of its outputs are gradients of parameters. None without any.

    weights: the inputs that are parameters, or views of them. What reads one is of I: under ZeRO-3 they are not there
    when W runs. Behind its gradients I returns what W takes behind its inputs, in the same order.
    """
    outputs = outputs_of(graph)
    gives = tuple(k for k, node in enumerate(outputs) if node is not None and not held[k])
    later = tuple(k for k, node in enumerate(outputs) if node is not None and held[k])
    if not later:
        return None
    of_parameters = _reached((outputs[k] for k in later), lambda node: False)
    readers = [n for n in of_parameters if not _is_free(n) and any(_is_weight(i, weights) for i in n.all_input_nodes)]
    of_data = _reached([*(outputs[k] for k in gives), *readers], lambda node: False)
    for node in [n for n in graph.nodes if n in of_data and isinstance(n.meta.get("val"), (tuple, list))]:
        of_data |= _taken_twice(graph, node, of_data)
    left = dict.fromkeys(n for n in graph.nodes if n in of_data and n.op != "placeholder" and not _is_free(n))
    of_weights = _reached((outputs[k] for k in later), lambda node: node in left)
    handed = [node for node in left if node in of_weights]
    return (
        _part(graph, of_data, (), [outputs[k] for k in gives] + handed, gives),
        _part(graph, of_weights, handed, [outputs[k] for k in later], later),
    )


def weights_of(graph: fx.Graph, held: Sequence[bool]) -> set[str]:
    """The names by which a forward graph returns parameters to its backward, and views of them."""
    inputs = {node.name for node, is_held in zip(graph.find_nodes(op="placeholder"), held, strict=True) if is_held}
    return inputs | {n.name for n in outputs_of(graph) if isinstance(n, fx.Node) and _is_weight(n, inputs)}


def _is_weight(node: fx.Node, weights: Collection[str]) -> bool:
    """Whether it is one of ``weights`` or a view of one."""
    while node.op == "call_function" and _is_free(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.name in weights


def outputs_of(graph: fx.Graph) -> list[Any]:
    """What a graph returns: nodes, and None where an input has no gradient."""
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def inputs_of(graph: fx.Graph) -> list[Any]:
    """What a graph takes, without values."""
    return [node.meta["val"] for node in graph.find_nodes(op="placeholder")]


def _taken_twice(graph: fx.Graph, node: fx.Node, of_data: set[fx.Node]) -> set[fx.Node]:
    """See to the results of an operator that gradients of data do not need; returns those that I has to compute.

    Where the operator has a mask for it, a second call of it gives them to W, and the first does not compute them.
    """
    others = [user for user in node.users if user not in of_data]
    names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    if not others or "output_mask" not in names or any(user.target is not operator.getitem for user in node.users):
        return set(others)
    place = names.index("output_mask")
    asked: Any = node.args[place]
    with graph.inserting_after(node):
        second = graph.node_copy(node)
    for call, users in ((node, set(node.users) - {*others}), (second, {*others})):
        wanted = {user.args[1] for user in users}
        call.update_arg(place, [flag and k in wanted for k, flag in enumerate(asked)])
    for user in others:
        user.replace_input_with(node, second)
    return set()


def _is_free(node: fx.Node) -> bool:
    """Whether it only looks at memory that exists: a view, or a size."""
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _reached(roots: Iterable[fx.Node], is_end: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The roots and what they are computed from, back to ends and no further."""
    found, waiting = set[fx.Node](), list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if is_end(node) else node.all_input_nodes
    return found


def _part(
    whole: fx.Graph, nodes: set[fx.Node], handed: Sequence[fx.Node], results: Sequence[fx.Node], gives: tuple[int, ...]
) -> Part:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    takes = []
    for position, node in enumerate(whole.find_nodes(op="placeholder")):
        # All sizes: shapes of what is taken are made of them, where no operator says so.
        if node in nodes or not isinstance(node.meta["val"], torch.Tensor):
            takes.append(position)
            copies[node] = graph.node_copy(node)
    for node in handed:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in whole.nodes:
        if node in nodes and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return Part(graph=graph, takes=tuple(takes), gives=gives)
