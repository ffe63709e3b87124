"""The one helper for parity: a compiled program on its ranks against the model on one device, in float64."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.api import Program, compile_parallel
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.precision import float64
from meshwright.runtime import Trainer

STEPS = 3
LEARNING_RATE = 1e-2
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


def squared_error(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A loss_fn: the mean squared logit of the tokens, a mean over batch, sequence and vocabulary."""
    return model(input_ids=batch["input_ids"]).logits.pow(2).mean()  # type: ignore[no-any-return]


def reference(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: LossFunction | None = None,
    steps: int = STEPS,
    random: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),
    replicas: int = 1,
    microbatches: int = 1,
) -> dict[str, Any]:
    """Losses, gradients of the first and last step and the state after it, on one device. Changes ``model``.

    A model in eval mode is trained as a whole; in one in training mode every module keeps its mode. random: what the
    forward of a step stands in. microbatches: gradients are accumulated over so many, each a mean over as many samples,
    that consist of pieces of ``replicas`` pieces of the batch.
    """
    model, batch = model.double() if model.training else model.double().train(), doubled(batch)
    parts = [accumulated(batch, k, replicas, microbatches) for k in range(microbatches)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], []

    def compute(batch: Mapping[str, Any]) -> torch.Tensor:
        with float64():
            if loss_fn is not None:
                return loss_fn(model, batch)
            result = model(**batch)
            return result if isinstance(result, torch.Tensor) else result.loss

    for step in range(steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for part in parts:
            with random(step):
                value = compute(part) / microbatches
            value.backward()
            losses[-1] += value.item()
        if step in (0, steps - 1):
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        after = sum(compute(part).item() for part in parts) / microbatches
    return {"losses": losses, "gradients": gradients, "state": state, "after": after}


def accumulated(batch: Mapping[str, Any], microbatch: int, replicas: int, microbatches: int) -> dict[str, Any]:
    """One microbatch: its piece of every replica's piece of the batch."""
    part = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            part[name] = value.unflatten(0, (replicas, microbatches, -1))[:, microbatch].flatten(0, 1)
    return part


def emit_case(
    directory: Path,
    model: nn.Module,
    batch: Mapping[str, Any],
    mesh: Mapping[str, int],
    plan: Mapping[str, Any],
    loss_fn: LossFunction | None = None,
) -> Program:
    """Emit the bundle of a case."""
    chosen = Plan(precision="fp64", **plan)
    program = compile_parallel(model, Mesh(**mesh), example_inputs=batch, loss_fn=loss_fn, plan=chosen)
    program.emit(directory)
    return program


def train(directory: str, batch: Mapping[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """On every rank: the same steps with the bundle."""
    trainer = Trainer(directory, optimizer=lambda named: torch.optim.AdamW(named, lr=LEARNING_RATE), device="cpu")
    part = trainer.shard(doubled(batch))
    losses, gradients = [], []
    for step in range(steps):
        losses.append(trainer.forward_backward(part).item())
        if step in (0, steps - 1):
            full = trainer.full_gradients()
            gradients.append(full if trainer.rank == 0 else {})
        trainer.optimizer_step()
    state = trainer.full_state_dict()
    after = trainer.evaluate(part).item()
    trainer.close()
    return {"losses": losses, "gradients": gradients, "state": state if trainer.rank == 0 else {}, "after": after}


def doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch in float64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def num_ranks(mesh: Mapping[str, int]) -> int:
    """The ranks of a mesh."""
    return math.prod(mesh.values())


def compare(got: list[dict[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Loss and gradients to 1e-9, parameters after three AdamW steps to 1e-8 (norm of the difference over the norm)."""
    for result in got:
        assert result["losses"] == got[0]["losses"], "ranks returned different losses"
        for a, b in zip([*result["losses"], result["after"]], [*wanted["losses"], wanted["after"]], strict=True):
            assert abs(a - b) <= 1e-9 * abs(b) + 1e-12, f"loss {a} against {b}"
    for step, (a, b) in enumerate(zip(got[0]["gradients"], wanted["gradients"], strict=True)):
        assert set(a) == set(b), f"gradients of {set(a) ^ set(b)}"
        for name in b:
            assert _difference(a[name], b[name]) <= 1e-9, (
                f"step {step}: gradient of {name}: {_difference(a[name], b[name]):.2e}"
            )
    assert set(got[0]["state"]) == set(wanted["state"])
    for name, value in wanted["state"].items():
        assert _difference(got[0]["state"][name], value) <= 1e-8, (
            f"{name}: {_difference(got[0]['state'][name], value):.2e}"
        )


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    difference = (a.double() - b.double()).norm().item()
    return max(0.0, difference - 1e-12) / max(b.double().norm().item(), 1e-300)  # type: ignore[no-any-return]
