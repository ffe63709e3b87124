"""The runtime on a bundle written by hand, against one device in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.runtime import Trainer
from tests.gloo import bundles
from tests.gloo.pool import Pool

pytestmark = pytest.mark.gloo

STEPS = 3
OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9),
    "adamw": lambda named: torch.optim.AdamW(named, lr=0.01),
}


def reference(optimizer: str, size: int) -> dict[str, Any]:
    """Losses, the gradients of every step and the state after the last, on one device."""
    model = bundles.model()
    chosen = OPTIMIZERS[optimizer]([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    losses, gradients = [], []
    for _ in range(STEPS):
        chosen.zero_grad()
        loss = model(**bundles.batch(size))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        chosen.step()
    with torch.no_grad():
        after = model(**bundles.batch(size)).item()
    return {"losses": losses, "gradients": gradients, "state": model.state_dict(), "after": after}


def train(directory: str, optimizer: str, size: int) -> dict[str, Any]:
    """On every rank: the same with the bundle."""
    trainer = Trainer(directory, optimizer=OPTIMIZERS[optimizer], device="cpu")
    part = trainer.shard(bundles.batch(size))
    losses, gradients = [], []
    for _ in range(STEPS):
        losses.append(trainer.forward_backward(part).item())
        gradients.append(trainer.full_gradients())
        trainer.optimizer_step()
    after = trainer.evaluate(part).item()
    state = trainer.full_state_dict()
    trainer.close()
    return {"losses": losses, "gradients": gradients, "state": state, "after": after}


def assert_equal(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    torch.testing.assert_close(
        [*got["losses"], got["after"]], [*wanted["losses"], wanted["after"]], rtol=1e-12, atol=1e-12
    )
    for step, (a, b) in enumerate(zip(got["gradients"], wanted["gradients"], strict=True)):
        assert set(a) == set(b)
        for name in b:
            difference = (a[name] - b[name]).norm().item()
            assert difference <= 1e-9 * b[name].norm().item() + 1e-12, f"step {step}: {name} differs by {difference}"
    assert set(got["state"]) == set(wanted["state"])
    for name in wanted["state"]:
        torch.testing.assert_close(got["state"][name], wanted["state"][name], rtol=1e-8, atol=1e-10)


CASES: list[tuple[dict[str, int], dict[str, Any], str, int]] = [
    ({"dp": 2}, {}, "adamw", 12),
    ({"dp": 2}, {"zero": 1, "microbatches": 3}, "sgd", 12),
    ({"dp": 3}, {"zero": 2, "microbatches": 2}, "adamw", 18),
    ({"dp": 2}, {"zero": 3, "microbatches": 3}, "adamw", 24),
    ({"tp": 2}, {"microbatches": 3}, "adamw", 12),
    ({"pp": 2}, {}, "sgd", 7),
    ({"pp": 3}, {"microbatches": 4}, "adamw", 12),
    ({"pp": 3}, {"microbatches": 2, "name": "gpipe"}, "sgd", 12),
    ({"dp": 2, "pp": 2, "tp": 2}, {"microbatches": 3}, "adamw", 12),
    ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 1}, "sgd", 12),
    ({"tp": 2, "pp": 2, "dp": 2}, {"zero": 2, "microbatches": 3}, "sgd", 12),
    ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 3, "microbatches": 3}, "adamw", 12),
    ({"dp": 2, "pp": 3}, {"zero": 3, "microbatches": 3}, "adamw", 12),
    ({"dp": 7}, {"zero": 1}, "sgd", 14),
    ({"dp": 7}, {"zero": 3}, "sgd", 14),
]


@pytest.mark.parametrize(("mesh", "plan", "optimizer", "size"), CASES, ids=str)
def test_equals_one_device(
    mesh: dict[str, int], plan: dict[str, Any], optimizer: str, size: int, pool: Pool, tmp_path: Path
) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", mesh, **plan)
    wanted = reference(optimizer, size)
    for got in pool.run("tests.gloo.test_bundles:train", (str(bundle), optimizer, size), ranks=_count(mesh)):
        assert_equal(got, wanted)


def _count(mesh: Mapping[str, int]) -> int:
    count = 1
    for size in mesh.values():
        count *= size
    return count
