"""The runtime beside parity: failures end everywhere, checkpoints continue exactly, edited bundles are checked."""

import gc
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright import BundleError, Mesh, Plan, PlanError, compile_parallel
from meshwright.runtime import Trainer
from tests import models
from tests.gloo.pool import Pool

pytestmark = pytest.mark.gloo


def _bundle(directory: Path, name: str, mesh: Mesh, **plan: Any) -> str:
    program = compile_parallel(models.build(name), mesh, example_inputs=models.batch(name), plan=Plan(**plan))
    return str(program.emit(directory))


def _adam(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-2)


def continue_training(bundle: str, checkpoint: str, name: str) -> tuple[list[float], list[float], int]:
    """Two steps, save, two steps; then another trainer that loads and does the last two again."""
    first = Trainer(bundle, optimizer=_adam, device="cpu")
    part = first.shard(models.batch(name))
    for _ in range(2):
        first.step(part)
    first.save(checkpoint)
    straight = [first.step(part).item() for _ in range(2)]
    first.close()
    second = Trainer(bundle, optimizer=_adam, device="cpu", seed=5)
    second.load(checkpoint)
    resumed = [second.step(part).item() for _ in range(2)]
    second.close()
    return straight, resumed, second.num_steps


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_checkpoint_continues_exactly(zero: int, pool: Pool, tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "mlp", Mesh(dp=2, pp=2), zero=zero, microbatches=3)
    results = pool.run("tests.gloo.test_runtime:continue_training", (bundle, str(tmp_path / "saved"), "mlp"), ranks=4)
    for straight, resumed, steps in results:
        assert straight == resumed and steps == 4


def load_elsewhere(bundle: str, checkpoint: str) -> str:
    trainer = Trainer(bundle, optimizer=_adam, device="cpu")
    try:
        trainer.load(checkpoint)
    except BundleError as error:
        return str(error)
    finally:
        trainer.close()
    return "loaded"


def test_another_layout_is_refused(pool: Pool, tmp_path: Path) -> None:
    one = _bundle(tmp_path / "one", "mlp", Mesh(dp=2), zero=1)
    other = _bundle(tmp_path / "other", "mlp", Mesh(dp=2), zero=3)
    pool.run("tests.gloo.test_runtime:continue_training", (one, str(tmp_path / "saved"), "mlp"), ranks=2)
    messages = pool.run("tests.gloo.test_runtime:load_elsewhere", (other, str(tmp_path / "saved")), ranks=2)
    assert all("was saved under another layout" in message for message in messages)


def test_the_wrong_number_of_processes(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "mlp", Mesh(dp=2))
    with pytest.raises(PlanError) as error:
        Trainer(bundle, optimizer=_adam, device="cpu")
    assert str(error.value) == (
        "the bundle is for 2 processes (dp=2) and was launched with 1\n  torchrun --nproc-per-node 2 train.py"
    )


def draw(bundle: str) -> dict[str, torch.Tensor]:
    trainer = Trainer(bundle, optimizer=_adam, device="cpu", seed=3)
    state = trainer.full_state_dict()
    trainer.close()
    return state


def test_a_seed_gives_the_same_weights_on_every_mesh(pool: Pool, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = models.llama(2)
    batch = models.batch("llama")
    states = []
    for i, mesh in enumerate([Mesh(dp=2), Mesh(tp=2), Mesh(pp=2, tp=2)]):
        program = compile_parallel(model, mesh, example_inputs=batch, plan=Plan(zero=3 if i == 0 else 0))
        bundle = program.emit(tmp_path / str(i))
        states.append(pool.run("tests.gloo.test_runtime:draw", (str(bundle),), ranks=mesh.num_ranks)[0])
    for state in states[1:]:
        assert set(state) == set(states[0]) == set(model.state_dict())
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    weight = states[0]["model.layers.0.mlp.up_proj.weight"]
    assert 0.015 < weight.std() < 0.025, "drawn as the model draws it"
    assert torch.equal(states[0]["model.norm.weight"], torch.ones(64))


def test_an_edited_forward_trains_and_a_broken_promise_is_named(pool: Pool, tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "mlp", Mesh(dp=2))
    stage = Path(bundle) / "stages/stage_0.py"
    text = stage.read_text()
    assert "F.relu(" in text
    stage.write_text(text.replace("F.relu(", "F.silu("))
    losses = pool.run("tests.gloo.test_runtime:train_a_little", (bundle, "mlp"), ranks=2)
    assert losses[0][-1] < losses[0][0]
    stage.write_text(text.replace("(48, 12)", "(48, 13)"))
    with pytest.raises(RuntimeError, match=r"the stage file says shape \(48, 13\), the manifest \(48, 12\)"):
        pool.run("tests.gloo.test_runtime:train_a_little", (bundle, "mlp"), ranks=2)


def train_a_little(bundle: str, name: str) -> list[float]:
    trainer = Trainer(bundle, optimizer=_adam, device="cpu")
    part = trainer.shard(models.batch(name))
    losses = [trainer.step(part).item() for _ in range(4)]
    trainer.close()
    return losses


def test_a_failing_rank_ends_the_others(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "llama", Mesh(dp=2, pp=2), microbatches=3)
    stage = Path(bundle) / "stages/stage_1.py"
    lines = stage.read_text().splitlines()
    at = max(i for i, line in enumerate(lines) if line.strip().startswith("return"))
    lines.insert(at, "        self.calls = getattr(self, 'calls', 0) + 1")
    lines.insert(
        at + 1, "        if self.calls == 2 and torch.distributed.get_rank() == 3: raise ValueError('a bad batch')"
    )
    stage.write_text("\n".join(lines) + "\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launch, f"{bundle}/train.py", "--steps", "2", "--device", "cpu"]
    started = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    assert "rank 3 failed in 1F1 forward of stage 1, microbatch 1: ValueError: a bad batch" in done.stderr
    others = [line for line in done.stderr.splitlines() if "RankError" in line and not line.startswith("[rank3]")]
    assert not others, "one rank says why"


def forget(bundle: str) -> bool:
    """Whether nothing is left of a trainer when the script has let go of it."""
    trainer = Trainer(bundle, optimizer=_adam, device="cpu")
    trainer.step(trainer.shard(models.batch("mlp")))
    trainer.close()
    left = [weakref.ref(unit) for unit in trainer.units]
    del trainer
    gc.collect()
    return all(one() is None for one in left)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_trainer_that_is_let_go_is_gone(zero: int, pool: Pool, tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "bundle", "mlp", Mesh(dp=2), zero=zero)
    assert pool.run("tests.gloo.test_runtime:forget", (bundle,), ranks=2) == [True, True]


class Tiny(torch.nn.Module):
    """One number: under ZeRO over two ranks one of them has nothing to update."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.factor * x).pow(2).mean()


def train_tiny(bundle: str) -> float:
    trainer = Trainer(bundle, optimizer=lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9), device="cpu")
    part = trainer.shard((torch.arange(4.0),))
    for _ in range(3):
        trainer.step(part)
    value = trainer.full_state_dict()["factor"].item()
    trainer.close()
    return value


@pytest.mark.parametrize("zero", [1, 2])
def test_a_rank_without_a_piece(zero: int, pool: Pool, tmp_path: Path) -> None:
    program = compile_parallel(Tiny(), Mesh(dp=2), example_inputs=(torch.arange(4.0),), plan=Plan(zero=zero))
    got = pool.run("tests.gloo.test_runtime:train_tiny", (str(program.emit(tmp_path / "bundle")),), ranks=2)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(4.0)).backward()
        optimizer.step()
    assert got == pytest.approx([model.factor.item()] * 2, rel=1e-5)
