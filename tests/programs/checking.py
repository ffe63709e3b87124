"""Whether a program computes on a mesh what its model computes on one device: the loss and every gradient."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from hypothesis import HealthCheck, reject, settings
from torch import nn

from meshwright import Mesh, Plan, PlanError
from meshwright.compiler.blocks import find_blocks
from meshwright.compiler.capture import capture
from meshwright.compiler.check import check_request
from meshwright.compiler.leaves import BATCH, SEQUENCE
from meshwright.compiler.precision import float64
from meshwright.passes.axes import axes_of, pins_of
from meshwright.passes.cost import prices
from meshwright.passes.propagate import factor, propagate
from meshwright.passes.reshard import reshard
from meshwright.passes.rules import DEFAULT_RULES
from tests.gloo import parity
from tests.gloo.pool import Ranks
from tests.null.passes import is_known
from tests.null.simulate import simulate
from tests.programs.drawing import Case

RELATIVE, ABSOLUTE = 1e-9, 1e-12
STEPS = 2
Batch = dict[str, torch.Tensor]


class Unusable(Exception):
    """One device cannot run the model, or its numbers are too large or too sensitive to compare."""


def property_settings(examples: int) -> settings:
    """The same ``examples`` every time, a fixed subset of what ``benchmarks/random_programs.py`` draws by seed."""
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def holds(check: Callable[[Case], None], case: Case) -> None:
    """A case is exact, or refused because its samples meet, or nothing to compare."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators that run whole
            check(case)
    except Unusable:
        reject()
    except PlanError as error:
        if not is_justified(case, error):
            raise


def is_justified(case: Case, error: Exception) -> bool:
    """Whether a refusal is right: samples of the batch meet, so it cannot be cut into microbatches."""
    return case.program.mixes and str(error).startswith("the batch cannot be cut into microbatches")


def one_device(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients in float64. Raises Unusable."""
    whole = copy.deepcopy(model).double()
    try:
        with float64():
            loss = whole(**batch)
        loss.backward()
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = [loss.detach(), *(g for g in gradients.values() if g is not None)]
    if not all(bool(tensor.isfinite().all()) and tensor.abs().max() < 1e5 for tensor in found):
        raise Unusable("not finite, or large")
    return loss.detach(), gradients


def doubled(batch: Batch) -> Batch:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def check_types(case: Case) -> None:
    """Run the typed program on all ranks as threads, on a batch of another size than the example's where it may be.

    Raises AssertionError where numbers differ.
    """
    program = case.program
    model = program.build()
    one_device(model, doubled(program.batch()))
    mesh, plan = Mesh(**case.mesh), Plan(**case.plan)
    captured = capture(
        model,
        program.batch(),
        precision="fp64",
        segment=mesh.size("tp") > 1,
        is_known=is_known,
    )
    check_request(captured, mesh, plan)
    blocks = find_blocks(captured, plan)
    priced, factors = prices(captured.function, BATCH, captured.symbols), factor(blocks, DEFAULT_RULES)
    axes = axes_of(captured, mesh, plan)
    typed = reshard(
        blocks, tuple(propagate(blocks, axis, factors, priced, pins_of(captured, plan, axis.name)) for axis in axes)
    )
    sizes = {axis.name: axis.size for axis in axes}
    if not sizes:
        return
    other = {"B": program.sizes["B"] * 2} if BATCH in captured.symbols else {}
    length = captured.symbols.get(SEQUENCE)
    if length is not None and all(length not in value.dims for value in program.inputs.values()):
        other["T"] = program.sizes["T"] + case.mesh["tp"]
    try:
        batch = doubled(program.batch(**other))
        loss, gradients = one_device(model, batch)
    except Unusable:
        batch = doubled(program.batch())
        loss, gradients = one_device(model, batch)
    got, computed = simulate(captured, typed, sizes, batch, captured.tensors)
    compare(got, computed, loss, gradients)


def compare(
    loss: torch.Tensor,
    gradients: Mapping[str, torch.Tensor],
    wanted_loss: torch.Tensor,
    wanted: Mapping[str, torch.Tensor | None],
) -> None:
    """Raises AssertionError with the worst gradients."""
    assert difference(loss, wanted_loss) <= RELATIVE, f"loss {loss.item()} against {wanted_loss.item()}"
    wrong = {}
    for name, gradient in wanted.items():
        here = gradients.get(name)
        expected = torch.zeros(()) if gradient is None else gradient
        given = torch.zeros_like(expected) if here is None else here
        if (off := difference(given, expected)) > RELATIVE:
            wrong[name] = off
    assert not wrong, "gradients differ: " + ", ".join(f"{name} {off:.1e}" for name, off in wrong.items())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm, less what is allowed absolutely."""
    distance = (a.double() - b.double()).norm().item()
    return max(0.0, distance - ABSOLUTE) / max(b.double().norm().item(), 1e-300)  # type: ignore[no-any-return]


def check_bundle(case: Case, pool: Ranks) -> None:
    """Emit the program and train two steps with it, all ranks as processes, or as threads of one.

    Raises AssertionError where numbers differ, Failed where a rank fails.
    """
    model, batch = case.program.build(), case.program.batch()
    one_device(model, doubled(batch))
    mesh = {axis: size for axis, size in case.mesh.items() if size > 1}
    with tempfile.TemporaryDirectory() as directory:
        parity.emit_case(Path(directory, "bundle"), copy.deepcopy(model), batch, mesh, case.plan)
        arguments = (str(Path(directory, "bundle")), batch, STEPS)
        got = pool.run("tests.gloo.parity:train", arguments, ranks=parity.num_ranks(mesh))
    parity.compare(got, parity.reference(model, batch, steps=STEPS))
