"""The runtime on a bundle written by hand, against one device in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.runtime import Trainer
from tests.gloo import bundles
from tests.gloo.pool import Failed, OneProcess, Pool, Ranks

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
    # Starting processes is what costs; tests/gloo/test_one_process.py holds threads to them on all axes at once.
    ranks: Ranks = pool if _count(mesh) <= 3 else OneProcess()
    for got in ranks.run("tests.gloo.test_bundles:train", (str(bundle), optimizer, size), ranks=_count(mesh)):
        assert_equal(got, wanted)


def _count(mesh: Mapping[str, int]) -> int:
    count = 1
    for size in mesh.values():
        count *= size
    return count


def continue_training(bundle: str, checkpoint: str) -> tuple[list[float], list[float], int]:
    """A step, save, two steps; then another trainer that loads and does the last two again."""
    part = None
    losses: list[list[float]] = []
    for load in (False, True):
        trainer = Trainer(bundle, optimizer=OPTIMIZERS["sgd"], device="cpu", seed=int(load))
        part = trainer.shard(bundles.batch())
        if load:
            trainer.load(checkpoint)
        else:
            trainer.step(part)
            trainer.save(checkpoint)
        losses.append([trainer.step(part).item() for _ in range(2)])
        assert trainer.seed == 0
        trainer.close()
    return losses[0], losses[1], trainer.num_steps


@pytest.mark.parametrize("zero", [0, 3])
def test_a_checkpoint_continues_exactly(zero: int, pool: Pool, tmp_path: Path) -> None:
    mesh = {"dp": 2, "pp": 2, "tp": 2}
    bundle = bundles.write_bundle(tmp_path / "bundle", mesh, zero=zero, microbatches=3)
    arguments = (str(bundle), str(tmp_path / "saved"))
    for straight, resumed, steps in pool.run("tests.gloo.test_bundles:continue_training", arguments, ranks=8):
        assert straight == resumed and steps == 3


def watch_memory(bundle: str) -> tuple[int, int]:
    """The most blocks whole at once in a second step, and the bytes of whole parameters after it."""
    trainer = Trainer(bundle, optimizer=OPTIMIZERS["sgd"], device="cpu")
    gathered = [*(unit.gathered for unit in trainer.units if unit.gathered), *(one for _, one in trainer.frozen)]
    counts: list[int] = []

    def count(*_: Any) -> None:
        counts.append(sum(one.flat.untyped_storage().nbytes() > 0 for one in gathered))

    part = trainer.shard(bundles.batch())
    trainer.step(part)
    for module in trainer.module.modules():
        module.register_forward_hook(count)
        module.register_full_backward_hook(count)
    trainer.step(part)
    left = sum(one.flat.untyped_storage().nbytes() for one in gathered)
    trainer.close()
    return max(counts), left


def test_zero_3_keeps_one_block_whole_and_one_on_its_way(pool: Pool, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"dp": 2}, zero=3, microbatches=2)
    got = pool.run("tests.gloo.test_bundles:watch_memory", (str(bundle),), ranks=2)
    assert got == [(3, 0)] * 2, "the stage's own, a block and the next"


def train_with_zero_grad(bundle: str) -> dict[str, Any]:
    trainer = Trainer(bundle, optimizer=OPTIMIZERS["adamw"], device="cpu")
    part = trainer.shard(bundles.batch())
    for _ in range(STEPS):
        trainer.optimizer.zero_grad()
        trainer.step(part)
    state = trainer.full_state_dict()
    trainer.close()
    return state


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_script_may_call_zero_grad(zero: int, pool: Pool, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"dp": 2}, zero=zero)
    wanted = reference("adamw", 12)["state"]
    for got in pool.run("tests.gloo.test_bundles:train_with_zero_grad", (str(bundle),), ranks=2):
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-10)


def edit(bundle: Path, stage: int, old: str, new: str) -> None:
    path = bundle / f"stages/stage_{stage}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_replicas_that_differ_are_named(pool: Pool, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"tp": 2})
    edit(bundle, 0, 'features = invariant_to_replicated(features, "tp")', "pass")
    with pytest.raises(Failed) as error:
        pool.run("tests.gloo.test_bundles:train", (str(bundle), "sgd", 12), ranks=2)
    assert "RankError: the gradients of replicas that must agree differ: embed.weight (rank 1 against" in str(
        error.value
    )


FAILURES: dict[str, tuple[dict[str, int], str, str, str]] = {
    # mesh; what in the file of the last stage, by what; what is said
    "forward": (
        {"pp": 2, "tp": 2},
        "hidden = F.linear(hidden + skip",
        "from meshwright.runtime.groups import current; assert current().rank != 2, 'no'; "
        "hidden = F.linear(hidden + skip",
        "RankError: rank 2 failed in 1F0 forward of stage 1, microbatch 0: AssertionError: no",
    ),
    "another stage's parameter": (
        {"pp": 2},
        "self.head = Head(param)",
        'self.head = Head(param); param("layers.0.norm", (6,), tp="I -> R")',
        "BundleError: layers.0.norm: the file of stage 1 declares it, the manifest has it on stages 0",
    ),
    "missing parameter": (
        {"pp": 2},
        'param("scale", (), tp="I", dp="I -> R")',
        "nn.Parameter(torch.ones(()))",
        "BundleError: 'scale' is on stage 1 in the manifest, and the stage file does not declare it",
    ),
    "types": (
        {"tp": 2},
        'param("norm", (6,), tp="I -> R")',
        'param("norm", (6,), tp="I")',
        "BundleError: layers.0.norm: the stage file says tp='I', the manifest tp='I -> R'",
    ),
    "argument": (
        {"pp": 2},
        "valid, power, num_valid):",
        "valid, power, count):",
        "BundleError: the forward of stage 1 takes count: not among the inputs, received and prepared values",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_rank_that_fails_ends_all(case: str, pool: Pool, tmp_path: Path) -> None:
    mesh, old, new, message = FAILURES[case]
    bundle = bundles.write_bundle(tmp_path / "bundle", mesh, microbatches=2)
    edit(bundle, mesh.get("pp", 1) - 1, old, new)
    with pytest.raises(Failed) as error:
        pool.run("tests.gloo.test_bundles:train", (str(bundle), "sgd", 12), ranks=_count(mesh))
    assert message in str(error.value)
    assert error.value.loud == 1, "one rank says why, the others end by themselves"


def test_a_stage_that_sends_another_shape(pool: Pool, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"pp": 2})
    edit(bundle, 0, "return hidden, skip", "return hidden[:, :5], skip")
    with pytest.raises(Failed) as error:
        pool.run("tests.gloo.test_bundles:train", (str(bundle), "sgd", 12), ranks=2)
    assert (
        "rank 0 failed in 0F0 forward of stage 0, microbatch 0: BundleError: stage 0 sends hidden as (12, 5) "
        "torch.float64, the manifest says (12, 6) torch.float64"
    ) in str(error.value)
