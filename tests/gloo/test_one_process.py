"""One process against many: the same numbers, the same checkpoints; and stepping through a program with pdb."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright import Mesh, Plan, compile_parallel
from meshwright.runtime import Trainer, run_in_one_process
from tests import models
from tests.gloo import bundles, test_bundles, test_runtime
from tests.gloo.pool import Pool

pytestmark = pytest.mark.gloo

ALL = {"dp": 2, "pp": 2, "tp": 2}


@pytest.mark.parametrize(
    "plan",
    [
        {"zero": 0, "microbatches": 3},
        {"zero": 1, "microbatches": 2, "name": "gpipe"},
        {"zero": 2, "microbatches": 3},
        {"zero": 3, "microbatches": 3},
    ],
    ids=str,
)
def test_threads_equal_processes(plan: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """The bundle has parameters tied across stages, skips and everything else that a runtime can get wrong."""
    bundle = bundles.write_bundle(tmp_path / "bundle", ALL, **plan)
    processes = pool.run("tests.gloo.test_bundles:train", (str(bundle), "adamw", 12), ranks=8)
    threads = run_in_one_process(lambda rank: test_bundles.train(str(bundle), "adamw", 12), 8)
    for one, other in zip(threads, processes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpoints_go_there_and_back(zero: int, pool: Pool, tmp_path: Path) -> None:
    bundle = str(bundles.write_bundle(tmp_path / "bundle", {"dp": 2, "pp": 2}, zero=zero, microbatches=2))
    saved, resumed = str(tmp_path / "threads"), str(tmp_path / "processes")
    straight = run_in_one_process(lambda rank: test_bundles.continue_training(bundle, saved), 4)[0][0]
    for one in pool.run("tests.gloo.test_one_process:resume", (bundle, saved, resumed), ranks=4):
        assert one == pytest.approx(straight[0], rel=1e-12)
    again = run_in_one_process(lambda rank: resume(bundle, resumed, str(tmp_path / "again")), 4)
    assert again == pytest.approx([straight[1]] * 4, rel=1e-12)


def resume(bundle: str, checkpoint: str, after: str) -> float:
    """The loss of one step from a checkpoint, saved again."""
    trainer = Trainer(bundle, optimizer=test_bundles.OPTIMIZERS["sgd"], device="cpu")
    trainer.load(checkpoint)
    loss = trainer.step(trainer.shard(bundles.batch())).item()
    trainer.save(after)
    trainer.close()
    return loss


@pytest.mark.parametrize("zero", [0, 3])
def test_a_trainer_that_is_let_go_is_gone(zero: int, tmp_path: Path) -> None:
    program = compile_parallel(
        models.build("mlp"), Mesh(dp=2), example_inputs=models.batch("mlp"), plan=Plan(zero=zero)
    )
    bundle = str(program.emit(tmp_path / "bundle"))
    assert run_in_one_process(lambda rank: test_runtime.forget(bundle), 2) == [True, True]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = compile_parallel(
        models.build("mlp"),
        Mesh(pp=2, tp=2),
        example_inputs=models.batch("mlp"),
        plan=Plan(microbatches=2),
    )
    return program.emit(tmp_path_factory.mktemp("emitted") / "bundle")


def _session(emitted: Path, arguments: list[str], commands: list[str]) -> str:
    """What train.py in one process prints with these commands typed at the debugger's prompts."""
    train = [str(emitted / "train.py"), "--single-process", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *arguments, *train],
        input="\n".join([*commands, ""]),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _line(path: Path, text: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_breakpoint_in_a_stage_file(emitted: Path, tmp_path: Path) -> None:
    """Step over a collective on rank 2 and meet rank 3 on the way; then let all go on to the end of the step."""
    bundle = shutil.copytree(emitted, tmp_path / "bundle")
    test_bundles.edit(bundle, 1, "        hidden = F.relu(up)", "        breakpoint()\n        hidden = F.relu(up)")
    stops = 2 * 2 * 2  # ranks of the stage, layers, microbatches
    reduce = _line(bundle / "stages/stage_1.py", "all_reduce(features_2")
    out = _session(bundle, [], ["p up.shape", f"unt {reduce}", "n", "p 'met'", *["c"] * (stops + 1)])
    assert "(rank 2) torch.Size([6, 24])" in out
    assert f"(rank 2) > {bundle}/stages/stage_1.py({reduce})forward()" in out
    assert "(rank 3) 'met'" in out
    assert "step 1  loss " in out


def test_breakpoints_of_pdb_hold_on_every_rank(emitted: Path) -> None:
    line = _line(emitted / "stages/stage_1.py", "hidden = F.relu(up)")
    out = _session(
        emitted,
        ["-m", "pdb"],
        [f"b {emitted}/stages/stage_1.py:{line}", "c", "p up.shape", "c", "p up.shape", "cl 1", "c", "p 6 * 7", "q"],
    )
    assert "(rank 2) torch.Size([6, 24])" in out and "(rank 3) torch.Size([6, 24])" in out
    assert "step 1  loss " in out
    assert "(Pdb) 42" in out, "the prompt is as it was"
