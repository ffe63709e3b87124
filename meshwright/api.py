"""compile_parallel: from one ordinary model to the parallel program, as a pipeline of stages."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from meshwright.codegen.emit import emit
from meshwright.codegen.report import explain
from meshwright.compiler.blocks import find_blocks
from meshwright.compiler.capture import capture
from meshwright.compiler.check import check_request, kept_in_eval
from meshwright.compiler.examples import example_of
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.program import Lowered
from meshwright.passes.auto import choose
from meshwright.passes.axes import axes_of, pins_of
from meshwright.passes.cost import prices
from meshwright.passes.fallback import without_rule
from meshwright.passes.lower import lower
from meshwright.passes.partition import partition
from meshwright.passes.propagate import factor, propagate
from meshwright.passes.reshard import reshard
from meshwright.passes.rules import DEFAULT_RULES, Rules, by_overload, is_pointwise
from meshwright.passes.schedules.planned import planned
from meshwright.passes.timing import costs, timing
from meshwright.passes.verify import verify

Progress = Callable[[str, float], None]
LossFunction = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled program: look at it with ``explain()``, prove it with ``verify()``, write it with ``emit()``."""

    lowered: Lowered
    rules: Rules

    def explain(self) -> str:
        """Every parameter and activation with its types, every conversion with its bytes, as text."""
        return explain(self.lowered)

    def verify(self) -> None:
        """Prove types, schedule and message order again. Raises InternalError or PlanError with the reason."""
        verify(self.lowered, self.rules)

    def emit(
        self,
        directory: str | Path,
        *,
        ranks: Iterable[int] | None = None,
        weights: bool = True,
        overwrite: bool = False,
    ) -> Path:
        """Write the bundle into ``directory`` (all of it or nothing) and return its path.

        ranks: the rank files to write; None: all up to 1,024 ranks, one per role beyond. weights: write real
        parameters.
        Raises PlanError for a directory with foreign or edited files, unless ``overwrite``.
        """
        return emit(self.lowered, Path(directory), ranks=ranks, weights=weights, overwrite=overwrite)


def compile_parallel(
    model: nn.Module,
    mesh: Mesh,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    loss_fn: LossFunction | None = None,
    plan: Plan | None = None,
    rules: Rules = DEFAULT_RULES,
    progress: Progress | None = None,
) -> Program:
    """Compile ``model`` for ``mesh``.

    model: with real or meta parameters; a Transformers model as it is.
    mesh: a Mesh, or a torch DeviceMesh whose dims have its names.
    example_inputs: the GLOBAL batch of one step, a dict (forward's keyword arguments) or a tuple.
    loss_fn: ``loss_fn(model, batch) -> scalar``; None: ``model(**batch)`` is the loss or has ``.loss``.
    rules: what operators do to dims; {**DEFAULT_RULES, op: Rule("...")} adds one.
    progress: called with the name of each finished stage of the compiler and its seconds.
    Raises PlanError where the request is wrong, UnsupportedError where the model uses what is not supported.
    """
    mesh, plan, rules = Mesh.of(mesh), plan or Plan(), by_overload(rules)
    with _timed(progress) as done:
        pipeline = planned(plan, mesh.size("pp"))  # before work is spent on what no schedule can run
        batch = example_of(model, example_inputs, mesh, plan)
        captured = capture(
            model,
            batch,
            loss_fn=loss_fn,
            precision=plan.precision,
            segment=mesh.size("tp") > 1,
            is_known=lambda target: target in rules or is_pointwise(target),
        )  # first: everything else is about the graph
        check_request(captured, mesh, plan)  # before work is spent on what cannot be
        done("capture")
        blocks = find_blocks(captured, plan)  # before the passes: they work once per distinct block
        done("blocks")
        priced = prices(captured.function, BATCH, captured.symbols)
        factors = factor(blocks, rules)
        typings = tuple(
            propagate(blocks, axis, factors, priced, pins_of(captured, plan, axis.name))
            for axis in axes_of(captured, mesh, plan)
        )
        done("propagate")
        typed = reshard(blocks, typings)  # before the cut: an edge has the types of its value
        done("reshard")
        timed = timing(typed, mesh, plan, priced, captured.symbols)  # of the types: a rank computes its pieces
        pipeline = pipeline or choose(typed, mesh, plan, timed)
        parts = partition(typed, pipeline.num_stages, plan.split, timed.seconds)
        done("partition")
        unruled = without_rule(typed, rules, dict(mesh.axes), captured.symbols)  # the conversions are known now
        told = (*kept_in_eval(captured), *unruled)
        lowered = lower(captured, typed, parts, costs(parts, timed), mesh, plan, pipeline, told)
        for line in lowered.warnings:
            warnings.warn(line, stacklevel=2)
        done("lower")
        verify(lowered, rules)
        done("verify")
    return Program(lowered, rules)


@contextmanager
def _timed(progress: Progress | None) -> Iterator[Callable[[str], None]]:
    last = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if progress is not None:
            progress(stage, now - last)
        last = now

    yield done
