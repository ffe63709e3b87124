"""Export: the training graph as torch captures it, with as many symbolic sizes as the model allows."""

import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._sympy.functions import Max, Min

from meshwright.compiler.errors import PlanError, UnsupportedError
from meshwright.compiler.frames import keep_all_frames, raised_at
from meshwright.compiler.leaves import BATCH, SEQUENCE, sizes_of, symbolic_dims
from meshwright.compiler.written import CUMULATIVE

LossFunction = Callable[[nn.Module, Any], torch.Tensor]


class Step(nn.Module):
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


@contextmanager
def training(model: nn.Module) -> Iterator[tuple[str, ...]]:
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


def export_step(
    step: Step, leaves: tuple[Any, ...], batch_size: int, names: Mapping[str, int]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with as many symbolic sizes as the model allows, and what had to stay fixed."""
    sizes = sizes_of(leaves, batch_size)
    fixed: list[str] = []
    symbols = [symbol for symbol in (SEQUENCE, BATCH) if sizes.get(symbol, 1) > 1]
    fixed += [f"{symbol} = {sizes[symbol]}: the example has size 1" for symbol in sizes if symbol not in symbols]
    while True:
        dims = {symbol: Dim(symbol.name) for symbol in symbols}
        shapes = tuple(
            {d: dims[s] for d, s in symbolic_dims(leaf, batch_size, sizes).items() if s in dims} or None
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
    renaming = symbols_of(exported, leaves, batch_size)
    for node in exported.graph.nodes:
        condition = node.args[0].meta["val"] if node.target is torch.ops.aten._assert_scalar.default else None
        found = condition.node.expr if isinstance(condition, torch.SymBool) else None
        if isinstance(found, sympy.Eq) and not found.free_symbols.isdisjoint(renaming):
            left, right = (side.xreplace(renaming) for side in found.args)
            if not always_equal(left, right):
                return f"the model needs {left} to be {right}"
    return None


def always_equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two sizes are one for all sizes from 1, as ``Min(32, 384*B)`` and 32 are."""
    from_one = {
        symbol: 1 + sympy.Symbol(symbol.name, nonnegative=True, integer=True)
        for symbol in left.free_symbols | right.free_symbols
    }
    difference = (left - right).subs(from_one).replace(Max, sympy.Max).replace(Min, sympy.Min)
    return bool(sympy.expand(difference) == 0)


def symbols_of(exported: ExportedProgram, leaves: tuple[Any, ...], batch_size: int) -> dict[sympy.Symbol, sympy.Symbol]:
    """From torch's symbols to ours."""
    sizes = sizes_of(leaves, batch_size)
    specs = exported.graph_signature.input_specs
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    users = [node for node, spec in zip(nodes, specs, strict=True) if spec.kind == InputKind.USER_INPUT]
    renaming: dict[sympy.Symbol, sympy.Symbol] = {}
    for node, leaf in zip(users, leaves, strict=True):
        for dim, symbol in symbolic_dims(leaf, batch_size, sizes).items():
            size = node.meta["val"].shape[dim]
            if isinstance(size, torch.SymInt):
                renaming[size.node.expr] = symbol
    return renaming


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
