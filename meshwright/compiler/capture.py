"""Capture: an ordinary module and example inputs become one normalized function with symbolic sizes."""

import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from typing import Any, Literal

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.nn.modules.batchnorm import _BatchNorm

from meshwright.compiler.decompose import Known
from meshwright.compiler.errors import PlanError, UnsupportedError
from meshwright.compiler.fakes import known_shapes
from meshwright.compiler.frames import keep_all_frames, raised_at
from meshwright.compiler.graph import Buffer, Capture, Input, Parameter, Segment, Site
from meshwright.compiler.initial import initial_values
from meshwright.compiler.normalize import normalize
from meshwright.compiler.precision import RealIndices, doubled, float64
from meshwright.compiler.random import refusing_other_generators
from meshwright.compiler.tables import function_of, reached
from meshwright.compiler.written import CUMULATIVE, with_unknown_evaluation

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
BATCH = sympy.Symbol("B", positive=True, integer=True)
SEQUENCE = sympy.Symbol("T", positive=True, integer=True)


class _Step(nn.Module):
    """The model with its loss as one module that takes the leaves of a batch."""

    def __init__(self, model: nn.Module, rebuild: Callable[[tuple[Any, ...]], Any], loss_fn: LossFunction | None):
        super().__init__()
        self.model = model
        self.rebuild = rebuild
        self.loss_fn = loss_fn

    def forward(self, *leaves: Any) -> torch.Tensor:
        with _assigned_in_place(self.model):
            return self._loss(self.rebuild(leaves))

    def _loss(self, batch: Any) -> torch.Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(self.model, batch)
        result = self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)
        return result if isinstance(result, torch.Tensor) else getattr(result, "loss", None)  # type: ignore[return-value]


@contextmanager
def _assigned_in_place(model: nn.Module) -> Iterator[None]:
    """What forward assigns to a registered buffer is copied into it at the end: export sees no assignments."""
    before = [
        (module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer in before:
        now = getattr(module, name)
        if now is not buffer:
            with torch.no_grad():
                buffer.copy_(now)
            setattr(module, name, buffer)


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
    names, leaves, rebuild, tree = _leaves(model, example_inputs)
    if precision == "fp64":
        model = doubled(model)
        leaves = tuple(
            leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
        )
    given = leaves
    if any(parameter.is_meta for parameter in model.parameters()):
        leaves = tuple(leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    step = _Step(model, rebuild, loss_fn)
    batch_size = _batch_size(leaves)
    reading = float64() if precision == "fp64" else nullcontext()
    with _training(model) as in_eval, reading, RealIndices(), known_shapes(), refusing_other_generators():
        exported, fixed = _export(step, leaves, batch_size, {names[i]: i for i in range(len(names))})
    renaming = _symbols(exported, leaves, batch_size)
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
    parameters = _without_gradient(graph, attributes, segments, parameters)
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
        inputs=tuple(_input(name, leaf, batch_size, function) for name, leaf in zip(names, given, strict=True)),
        input_tree=tree,
        symbols={symbol: size for symbol, size in _sizes(leaves, batch_size).items() if symbol in renaming.values()},
        fixed=fixed,
        tensors=tensors,
        segments=segments,
        sites={name: site for name, site in sites.items() if name in used},
        in_eval=in_eval,
    )


def _leaves(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any]
) -> tuple[tuple[str, ...], tuple[Any, ...], Callable[[tuple[Any, ...]], Any], Literal["dict", "tuple"]]:
    """Names and values of the leaves of a batch, each tensor an object of its own, and how to build the batch again."""
    if isinstance(batch, Mapping):
        names = tuple(batch)
        values = tuple(batch.values())
    elif isinstance(batch, (tuple, list)):
        arguments = list(inspect.signature(model.forward).parameters)
        names = tuple(arguments[i] if i < len(arguments) else f"input_{i}" for i in range(len(batch)))
        values = tuple(batch)
    else:
        raise PlanError(
            f"example_inputs is a dict of forward's keyword arguments or a tuple, not {type(batch).__name__}"
        )
    for name, value in zip(names, values, strict=True):
        if not isinstance(name, str) or not name.isidentifier():
            raise PlanError(f"the name {name!r} in example_inputs is no identifier")
        if not isinstance(value, (torch.Tensor, int, float, bool, str, type(None))):
            raise PlanError(
                f"example_inputs[{name!r}] is a {type(value).__name__}: leaves are tensors or plain scalars"
            )
    # torch.export takes two arguments that are one tensor for one input.
    values = tuple(value.detach().clone() if isinstance(value, torch.Tensor) else value for value in values)
    if isinstance(batch, Mapping):
        return names, values, lambda leaves: dict(zip(names, leaves, strict=True)), "dict"
    return names, values, tuple, "tuple"


def _batch_size(leaves: tuple[Any, ...]) -> int:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise PlanError("example_inputs has no tensor with a batch dimension (dim 0)")


def _sizes(leaves: tuple[Any, ...], batch_size: int) -> dict[sympy.Symbol, int]:
    sizes = {BATCH: batch_size}
    for leaf in leaves:
        tokens = isinstance(leaf, torch.Tensor) and not leaf.is_floating_point() and leaf.ndim >= 2
        if tokens and leaf.shape[0] == batch_size and SEQUENCE not in sizes:
            sizes[SEQUENCE] = leaf.shape[1]
    return sizes


def _symbolic_dims(leaf: Any, batch_size: int, sizes: Mapping[sympy.Symbol, int]) -> dict[int, sympy.Symbol]:
    """Which dims of one leaf carry which symbol."""
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
        return {}
    dims = {0: BATCH} if leaf.shape[0] == batch_size else {}
    if SEQUENCE in sizes:
        exact = 2 if leaf.is_floating_point() else leaf.ndim
        dims |= {dim: SEQUENCE for dim in range(1, exact) if dim < leaf.ndim and leaf.shape[dim] == sizes[SEQUENCE]}
    return dims


def _export(
    step: _Step, leaves: tuple[Any, ...], batch_size: int, names: Mapping[str, int]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with as many symbolic sizes as the model allows, and what had to stay fixed."""
    sizes = _sizes(leaves, batch_size)
    fixed: list[str] = []
    symbols = [symbol for symbol in (SEQUENCE, BATCH) if sizes.get(symbol, 1) > 1]
    fixed += [f"{symbol} = {sizes[symbol]}: the example has size 1" for symbol in sizes if symbol not in symbols]
    while True:
        dims = {symbol: Dim(symbol.name) for symbol in symbols}
        shapes = tuple(
            {d: dims[s] for d, s in _symbolic_dims(leaf, batch_size, sizes).items() if s in dims} or None
            for leaf in leaves
        )
        try:
            with keep_all_frames(), _quietly():
                exported = export(
                    step,
                    leaves,
                    dynamic_shapes=(shapes,),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
            reason = _assumed(exported, leaves, batch_size)
            if reason is None:
                return exported, tuple(fixed)
        except PlanError:
            raise
        except Exception as error:
            reason = _reason(error)
            if not symbols or not _is_about_sizes(error):
                raise _refusal(error, reason, names) from error
        dropped = symbols.pop(0)
        fixed.append(f"{dropped} = {sizes[dropped]}: {reason}")


def _assumed(exported: ExportedProgram, leaves: tuple[Any, ...], batch_size: int) -> str | None:
    """What torch has found to hold for the example's sizes and would check at run time: two sizes are one."""
    renaming = _symbols(exported, leaves, batch_size)
    for node in exported.graph.nodes:
        condition = node.args[0].meta["val"] if node.target is torch.ops.aten._assert_scalar.default else None
        found = condition.node.expr if isinstance(condition, torch.SymBool) else None
        if isinstance(found, sympy.Eq) and not found.free_symbols.isdisjoint(renaming):
            left, right = (side.xreplace(renaming) for side in found.args)
            return f"the model needs {left} to be {right}"
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Drop what torch prints of a graph that it cannot capture: the error says it."""
    logger, printed = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        logger.setLevel(before)


_SIZE_ERRORS = ("Constraints violated", "ConstraintViolation", "not all values of", "was inferred to be a constant",
                "specializ", "Could not guard on data-dependent expression Eq(")  # fmt: skip


def _is_about_sizes(error: Exception) -> bool:
    return any(sign in f"{type(error).__name__} {error}" for sign in _SIZE_ERRORS)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _refusal(error: Exception, reason: str, names: Mapping[str, int]) -> Exception:
    kind = type(error).__name__
    if "DataDependent" in kind or "data-dependent" in str(error).lower():
        place = raised_at(error)
        return UnsupportedError(
            f"the model's control flow depends on its data{f' at {place}' if place else ''}: {reason}\n"
            "  a captured program takes the same way for every batch: use torch.where, or torch.cond, instead"
        )
    if isinstance(error, (TypeError, ValueError, RuntimeError, KeyError, AttributeError)):
        return PlanError(
            f"the model does not run on example_inputs ({', '.join(names)}): {kind}: {reason}\n"
            "  try loss_fn(model, batch), or model(**batch), on one device first"
        )
    return UnsupportedError(f"the model cannot be captured with torch.export: {kind}: {reason}")


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


def _symbols(exported: ExportedProgram, leaves: tuple[Any, ...], batch_size: int) -> dict[sympy.Symbol, sympy.Symbol]:
    """From torch's symbols to ours."""
    sizes = _sizes(leaves, batch_size)
    specs = exported.graph_signature.input_specs
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    users = [node for node, spec in zip(nodes, specs, strict=True) if spec.kind == InputKind.USER_INPUT]
    renaming: dict[sympy.Symbol, sympy.Symbol] = {}
    for node, leaf in zip(users, leaves, strict=True):
        for dim, symbol in _symbolic_dims(leaf, batch_size, sizes).items():
            size = node.meta["val"].shape[dim]
            if isinstance(size, torch.SymInt):
                renaming[size.node.expr] = symbol
    return renaming


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


def _without_gradient(
    graph: fx.Graph,
    attributes: Mapping[fx.Node, str],
    segments: Mapping[str, tuple[str, Segment]],
    parameters: Mapping[str, Parameter],
) -> dict[str, Parameter]:
    """Parameters that are read, but through no_grad or detach alone, are frozen: an optimizer that decays what has a
    gradient of zero leaves alone what has none.
    """
    learning = reached(graph)
    read: dict[str, bool] = {}
    for node in graph.nodes:
        name = attributes.get(node) or (segments[str(node.target)][0] if str(node.target) in segments else None)
        if name in parameters and node.users:
            read[name] = read.get(name, False) or node in learning
    frozen = {name for name, learns in read.items() if not learns}
    return {name: replace(p, trainable=p.trainable and name not in frozen) for name, p in parameters.items()}


def _input(name: str, leaf: Any, batch_size: int, function: Any) -> Input:
    if not isinstance(leaf, torch.Tensor):
        return Input(name=name, shape=(), dtype=torch.int64, batched=False, example=leaf)
    batched = leaf.ndim > 0 and leaf.shape[0] == batch_size
    for node, value in function.values.items():
        if node.op == "placeholder" and node.target == name:
            return Input(name=name, shape=value.shape, dtype=leaf.dtype, batched=batched, example=leaf)
    return Input(name=name, shape=tuple(leaf.shape), dtype=leaf.dtype, batched=batched, example=leaf)


@contextmanager
def _training(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """The model as it trains, and every module as it was afterwards; the modules that stay in eval mode meanwhile.

    A model in eval mode trains as a whole; in one that is in training mode each module keeps its mode. Batch
    normalization that averages over all batches would read in Python how many there were: a constant stands for that.
    """
    before = {module: module.training for module in model.modules()}
    averaging = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.momentum is None]
    if not model.training:
        model.train()
    for norm in averaging:
        norm.momentum = CUMULATIVE
    try:
        yield tuple(name for name, module in model.named_modules() if not module.training)
    finally:
        for norm in averaging:
            norm.momentum = None
        for module, mode in before.items():
            module.training = mode
