"""Capture: an ordinary module and example inputs become one normalized function with symbolic sizes."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from meshwright.compiler.decompose import Known
from meshwright.compiler.errors import PlanError
from meshwright.compiler.exporting import LossFunction, Step, export_step, symbols_of, training
from meshwright.compiler.fakes import known_shapes
from meshwright.compiler.graph import Buffer, Capture, Parameter, Segment, Site
from meshwright.compiler.initial import initial_values
from meshwright.compiler.leaves import BATCH, batch_size_of, input_of, leaves_of, sizes_of
from meshwright.compiler.normalize import normalize
from meshwright.compiler.precision import RealIndices, doubled, float64
from meshwright.compiler.random import refusing_other_generators
from meshwright.compiler.tables import function_of
from meshwright.compiler.written import with_unknown_evaluation


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    loss_fn: LossFunction | None = None,
    precision: Literal["fp64"] | None = None,
    segment: bool = False,
    is_known: Known = lambda target: True,
) -> Capture:
    """Capture ``model`` for training on batches like ``example_inputs`` (the global batch of one step).

    Sizes of the batch and of the sequence become symbols B and T where the model allows it; ``Capture.fixed`` says
    which
    did not and why. ``segment`` cuts unevenly fused projections into one matmul per part. ``is_known`` tells which
    composite operators have a rule; the others are replaced by what torch composes them of.
    Raises PlanError for inputs or a loss that do not fit, UnsupportedError for what cannot be captured.
    """
    names, leaves, rebuild, tree = leaves_of(model, example_inputs)
    if precision == "fp64":
        model = doubled(model)
        leaves = tuple(
            leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
        )
    given = leaves
    if any(parameter.is_meta for parameter in model.parameters()):
        leaves = tuple(leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    step = Step(model, rebuild, loss_fn)
    batch_size = batch_size_of(leaves)
    reading = float64() if precision == "fp64" else nullcontext()
    with training(model) as in_eval, reading, RealIndices(), known_shapes(), refusing_other_generators():
        exported, fixed = export_step(step, leaves, batch_size, {names[i]: i for i in range(len(names))})
    renaming = symbols_of(exported, leaves, batch_size)
    attributes, parameters, buffers, tensors = _state(exported, model)
    graph = exported.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    tensor_names = [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    constants: dict[fx.Node, torch.Tensor] = {}
    registered: set[fx.Node] = set()
    input_names: dict[fx.Node, str] = {}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), torch.Tensor):
                input_names[node] = tensor_names[len(input_names)]
        elif spec.kind == InputKind.CONSTANT_TENSOR and spec.target in exported.constants:
            constants[node] = exported.constants[spec.target]
        elif spec.kind == InputKind.BUFFER:
            registered.add(node)
    _check_loss(graph)
    segments: dict[str, tuple[str, Segment]] = {}
    sites: dict[str, Site] = {}
    normalize(exported.graph_module, constants, attributes, registered, segments if segment else None, sites, is_known)
    trainable = {name: p.trainable for name, p in parameters.items()}
    function = function_of(graph, renaming, input_names, attributes, trainable, segments, set(sites))
    unknown = with_unknown_evaluation(function, BATCH)
    used = {segments[name][0] if name in segments else name for name in function.attributes()}
    learning = {
        segments[name][0] if name in segments else name
        for node, value in function.values.items()
        if node.op == "get_attr" and value.grad
        for name in (str(node.target),)
    }
    return Capture(
        model=type(model).__name__,
        function=function,
        parameters={
            name: replace(p, trainable=p.trainable and (name in learning or name not in used))
            for name, p in parameters.items()
        },
        buffers={
            name: replace(buffer, unknown_evaluation=unknown.get(name))
            for name, buffer in buffers.items()
            if name in used or buffer.persistent
        },
        inputs=tuple(input_of(name, leaf, batch_size, function) for name, leaf in zip(names, given, strict=True)),
        input_tree=tree,
        symbols={symbol: size for symbol, size in sizes_of(leaves, batch_size).items() if symbol in renaming.values()},
        fixed=fixed,
        tensors=tensors,
        segments=segments,
        sites={name: site for name, site in sites.items() if name in used},
        in_eval=in_eval,
    )


def _check_loss(graph: fx.Graph) -> None:
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    loss = results[0].meta.get("val") if results and isinstance(results[0], fx.Node) else None
    if len(results) != 1 or not isinstance(loss, torch.Tensor):
        raise PlanError(
            "the model returns no loss: model(**batch) has to be the loss or have .loss (are the labels "
            "in the batch?)\n"
            "  or give loss_fn=lambda model, batch: ..."
        )
    if loss.ndim != 0 or not loss.is_floating_point():
        raise PlanError(
            f"the loss is not a scalar: it has shape {tuple(loss.shape)} and dtype {loss.dtype}\n"
            "  give loss_fn=lambda model, batch: ... that returns one number, such as the mean"
        )


def _state(
    exported: ExportedProgram, model: nn.Module
) -> tuple[dict[fx.Node, str], dict[str, Parameter], dict[str, Buffer], dict[str, torch.Tensor]]:
    """The names of parameters and buffers, tied ones merged by identity, and their tensors."""
    aliases: dict[int, list[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        aliases.setdefault(id(tensor), []).append(name)
    initial, computed = initial_values(model)
    persistent = set(model.state_dict(keep_vars=True))
    parameters: dict[str, Parameter] = {}
    buffers: dict[str, Buffer] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in every:
        names = aliases[id(tensor)]
        if names[0] != name:
            continue
        tensors[name] = computed.get(name, tensor.detach())
        shape, others = tuple(tensor.shape), tuple(names[1:])
        if isinstance(tensor, nn.Parameter):
            parameters[name] = Parameter(
                name=name, shape=shape, dtype=tensor.dtype, trainable=tensor.requires_grad, aliases=others,
                initial=initial.get(name),
            )  # fmt: skip
        else:
            buffers[name] = Buffer(
                name=name, shape=shape, dtype=tensor.dtype, persistent=name in persistent, aliases=others,
                initial=initial.get(name),
            )  # fmt: skip
    canonical = {alias: names[0] for names in aliases.values() for alias in names}
    attributes: dict[fx.Node, str] = {}
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            attributes[node] = canonical[spec.target.removeprefix("model.")]
        elif spec.kind == InputKind.CONSTANT_TENSOR and spec.target is not None:
            name = spec.target.removeprefix("model.")
            value = exported.constants[spec.target]
            attributes[node] = name
            buffers[name] = Buffer(name=name, shape=tuple(value.shape), dtype=value.dtype, persistent=False)
            tensors[name] = value.detach()
    return attributes, parameters, buffers, tensors
