"""Buffers that forward writes to: batch normalization in training, and what is stored in a buffer.

Afterwards the graph is pure but for two functions of the runtime, and nothing reads a buffer that one of them has
written before, but the batch normalization of a module that is called again.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

import sympy
from torch import fx
from torch.fx.node import map_arg

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.graph import Function
from meshwright.compiler.rewriting import arguments_of, aten, insert, is_in_place, place, storage_of, with_gradient
from meshwright.runtime.buffers import batch_norm, store

CUMULATIVE = math.nan
"""The momentum that stands for none while a model is captured: an average of all batches (see capture.py)."""

NORMALIZATIONS = (aten.batch_norm.default, aten.instance_norm.default)
"""Operators that may write to running statistics, though their schemas do not say so."""

WRITES: Mapping[Any, tuple[int, ...]] = {store: (0,), batch_norm: (1, 2)}
"""Functions that write to buffers -> the positions of the arguments that they write to."""

ONCE_PER_STEP: Mapping[Any, Mapping[str, str]] = {store: {"every": "step"}}
"""Functions that can write once per step instead of in every microbatch -> how they are told."""

READ_IN_TRAINING: Mapping[Any, tuple[str, ...]] = {batch_norm: ("num_batches",)}
"""Functions that read ``self.training`` -> the arguments that they take no notice of in evaluation."""


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The buffers that a node writes to."""
    found = (node.args[i] for i in WRITES.get(node.target, ()))
    return tuple(buffer for buffer in found if isinstance(buffer, fx.Node))


def is_writer(node: fx.Node) -> bool:
    """Whether a node is there for more than its value."""
    return bool(writes(node))


def is_written(node: fx.Node) -> bool:
    """Whether a function writes to the buffer that ``node`` reads."""
    return any(node in writes(user) for user in node.users)


def keep_statistics(graph: fx.Graph, names: Mapping[fx.Node, str], buffers: Set[fx.Node]) -> None:
    """Replace batch normalization in training by the runtime's, which torch's schema does not say writes.

    names: of parameters and buffers; buffers: those of registered buffers. Raises UnsupportedError for running
    statistics that are no buffers, that forward changes itself or uses after they were written, and for those of
    instance normalization.
    """
    written: dict[int | None, str] = {}
    changed: set[int | None] = set()
    for node in list(graph.nodes):
        given = arguments_of(node) if node.target in NORMALIZATIONS else {}
        if given.get("use_input_stats") and given["running_mean"] is not None:
            raise UnsupportedError(
                f"instance_norm {place(node)} writes running statistics, which is not supported\n"
                "  use track_running_stats=False, which is the default"
            )
        if given.get("training"):
            running = [given[name] for name in ("running_mean", "running_var") if given[name] is not None]
            if any(statistic not in buffers or storage_of(statistic) in changed for statistic in running):
                raise UnsupportedError(
                    f"batch_norm {place(node)} writes running statistics that are no buffers of the model, or that "
                    "forward changes itself, which is not supported\n  keep them with register_buffer"
                )
            written |= {storage_of(statistic): names[statistic] for statistic in running}
            _replace(node, given, names)
            continue
        for used in node.all_input_nodes if node.op == "call_function" else ():
            if (memory := storage_of(used)) is not None and memory in written:
                raise UnsupportedError(
                    f"{node.target} {place(node)} uses {written[memory]!r} after batch_norm wrote to it, which is not "
                    "supported\n  use it before"
                )
        if is_in_place(node):
            changed.add(storage_of(node.args[0]))


def _replace(node: fx.Node, given: Mapping[str, Any], names: Mapping[fx.Node, str]) -> None:
    """The runtime's function in the place of ``node`` with the arguments ``given``."""
    mean, var = given["running_mean"], given["running_var"]
    options = {"momentum": given["momentum"], "eps": given["eps"]}
    if math.isnan(given["momentum"]):
        counter = names[mean].removesuffix("running_mean") + "num_batches_tracked"
        options = {"num_batches": next(n for n, name in names.items() if name == counter), "eps": given["eps"]}
    with node.graph.inserting_before(node):
        args = (given["input"], mean, var, given["weight"], given["bias"], True)
        new = node.graph.call_function(batch_norm, args, options)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def new_store(buffer: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
    """``value`` stored in ``buffer``, before ``like``."""
    with like.graph.inserting_before(like):
        new = like.graph.call_function(store, (buffer, value, True))
    source = like if like.meta.get("nn_module_stack") else value  # an assignment to a buffer has none
    new.meta = {key: source.meta[key] for key in ("stack_trace", "nn_module_stack") if key in source.meta}
    new.meta["val"] = buffer.meta["val"]
    return new


def detach_stored(graph: fx.Graph) -> None:
    """What is stored has no gradient."""
    learning = with_gradient(graph)
    for node in list(graph.nodes):
        if node.target is store and node.args[1] in learning:
            node.replace_input_with(node.args[1], insert(aten.detach.default, (node.args[1],), like=node))


def keep_old_values(graph: fx.Graph, names: Mapping[fx.Node, str]) -> None:
    """Let readers of a buffer have it as it was before forward wrote to it, in whichever order lines are written.

    A reader whose value is stored in the end comes first anyway; others read a copy, which autograd may keep.
    """
    learning = with_gradient(graph)
    for buffer in [node for node in graph.nodes if node.op == "placeholder" and is_written(node)]:
        writers = [user for user in buffer.users if buffer in writes(user)]
        before = _ancestors(writers[0])
        readers = [user for user in buffer.users if user not in writers]
        memory = storage_of(buffer)
        if all(user in before and user not in learning and storage_of(user) != memory for user in readers):
            continue
        first = next(node for node in graph.nodes if node in readers)
        copy = insert(aten.clone.default, (buffer,), like=first)
        copy.meta["name"] = names[buffer].rpartition(".")[2]
        for user in readers:
            user.replace_input_with(buffer, copy)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                waiting.append(used)
    return found


def with_unknown_evaluation(function: Function, batch: sympy.Symbol) -> dict[str, str]:
    """The buffers that say that the model may compute its loss otherwise in eval mode -> where they are written.

    The loss depends on what is stored, or on a statistic of the batch that what is stored is made of: so do batch
    normalizations that a model has written itself.
    """
    graph, results = function.graph, function.results()
    read: set[fx.Node] = set(results)
    for node in reversed(graph.nodes):
        if node in read:
            ignored = READ_IN_TRAINING.get(node.target, ())
            map_arg((node.args, {k: v for k, v in node.kwargs.items() if k not in ignored}), read.add)
    of_batch: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(used in of_batch for used in node.all_input_nodes):
            of_batch.add(node)

    def is_statistic(node: fx.Node) -> bool:
        shape = function.values[node].shape if node in function.values else ()
        by_sample = any(isinstance(size, sympy.Expr) and size.has(batch) for size in shape)
        return node in of_batch and node.op == "call_function" and node not in results and not by_sample

    found: dict[str, str] = {}
    for node in (node for node in graph.nodes if node.target is store):
        alone = only_stored(graph, {node})
        shared = {used for inner in alone for used in inner.all_input_nodes if used not in alone and used in read}
        if any(is_statistic(used) or used is node.args[1] and used.op == "call_function" for used in shared):
            found[str(node.args[0].target)] = place(node)
    return found


def only_stored(graph: fx.Graph, stores: Set[fx.Node] | None = None) -> set[fx.Node]:
    """What is computed for nothing but to be stored, by ``stores`` (None: by all that write and are read by nobody)."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_writer(node) and not node.users:
            alone = stores is None or node in stores
        else:
            alone = node.op == "call_function" and bool(node.users) and all(user in found for user in node.users)
        if alone:
            found.add(node)
    return found
