"""The one helper for parity: a compiled program on its ranks against the model on one device, in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.api import compile_parallel
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.compiler.precision import float64
from meshwright.runtime import Trainer
from tests import models

STEPS = 3
COMPARED = (0, STEPS - 1)
"""The steps after whose backward all gradients are gathered and compared."""
LEARNING_RATE = 1e-2


def squared_error(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A loss_fn: the mean squared logit of the tokens, a mean over batch, sequence and vocabulary."""
    return model(input_ids=batch["input_ids"]).logits.pow(2).mean()  # type: ignore[no-any-return]


LOSSES = {"": None, "squared_error": squared_error}


def reference(name: str, num_layers: int, kind: str, size: int, length: int, loss: str) -> dict[str, Any]:
    """Losses, gradients of every step and the parameters after the last, on one device."""
    model = models.build(name, num_layers).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in models.batch(name, kind, size, length).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], []

    def compute() -> torch.Tensor:
        with float64():
            if (function := LOSSES[loss]) is not None:
                return function(model, batch)
            result = model(**batch)
            return result if isinstance(result, torch.Tensor) else result.loss

    for step in range(STEPS):
        optimizer.zero_grad()
        value = compute()
        value.backward()
        losses.append(value.item())
        if step in COMPARED:
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    with torch.no_grad():
        after = compute().item()
    return {"losses": losses, "gradients": gradients, "state": model.state_dict(), "after": after}


def num_layers_for(name: str, mesh: Mapping[str, int]) -> int:
    """Two layers show what blocks can show; every stage has one. (The first layer of the MLP, on data, is no block.)"""
    return 4 if name == "mlp" else max(2, mesh.get("pp", 1))


def compile_case(
    directory: Path, name: str, mesh: Mapping[str, int], plan: Mapping[str, Any], kind: str, loss: str
) -> None:
    """Emit the bundle of a case."""
    program = compile_parallel(
        models.build(name, num_layers_for(name, mesh)),
        Mesh(**mesh),
        example_inputs=models.batch(name, kind),
        loss_fn=LOSSES[loss],
        plan=Plan(precision="fp64", **plan),
    )
    program.emit(directory)


def train(directory: str, name: str, kind: str, size: int, length: int) -> dict[str, Any]:
    """On every rank: the same three steps with the bundle."""
    trainer = Trainer(directory, optimizer=lambda named: torch.optim.AdamW(named, lr=LEARNING_RATE), device="cpu")
    batch = {k: v.double() if v.is_floating_point() else v for k, v in models.batch(name, kind, size, length).items()}
    part = trainer.shard(batch)
    losses, gradients = [], []
    for step in range(STEPS):
        losses.append(trainer.forward_backward(part).item())
        if step in COMPARED:
            full = trainer.full_gradients()
            gradients.append(full if trainer.rank == 0 else {})
        trainer.optimizer_step()
    state = trainer.full_state_dict()
    after = trainer.evaluate(part).item()
    trainer.close()
    return {"losses": losses, "gradients": gradients, "state": state if trainer.rank == 0 else {}, "after": after}


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
