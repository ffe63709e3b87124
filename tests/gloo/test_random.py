"""Dropout and noise: by position every mesh draws as one device does; by pieces replicas agree and pieces differ."""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.runtime import PlanError, Trainer
from meshwright.testing import exact_random, float64
from tests import models, noisy
from tests.gloo import parity
from tests.gloo.pool import OneProcess, Pool

ALL = {"dp": 2, "pp": 2, "tp": 2}


def gpt2() -> nn.Module:
    """GPT-2 with the dropout that Transformers gives it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64))


EXACT: list[tuple[dict[str, int], dict[str, Any], str]] = [
    ({"dp": 2}, {"zero": 3, "microbatches": 3}, "uneven"),
    ({"tp": 4}, {"sequence_parallel": True}, "uneven"),
    ({"pp": 2}, {"microbatches": 3, "schedule": "gpipe"}, "uneven"),
    (ALL, {"zero": 1, "microbatches": 3}, "padded"),
]


def at_step(step: int) -> AbstractContextManager[None]:
    return exact_random(step=step)


@pytest.mark.parametrize(("mesh", "plan", "kind"), EXACT, ids=str)
def test_exact_equals_one_device(
    mesh: dict[str, int], plan: dict[str, Any], kind: str, threads: OneProcess, tmp_path: Path
) -> None:
    batch = models.batch("gpt2", kind)
    wanted = parity.reference(gpt2(), batch, random=at_step)
    parity.emit_case(tmp_path / "bundle", gpt2(), batch, mesh, {"random": "exact", **plan})
    got = threads.run("tests.gloo.parity:train", (str(tmp_path / "bundle"), batch), ranks=parity.num_ranks(mesh))
    parity.compare(got, wanted)


def noise(directory: str, seeds: list[int]) -> list[dict[str, Any]]:
    """On every rank: losses and gradients of two steps for each seed, on a learning rate of 0, and their checkpoint."""
    results = []
    for seed in seeds:
        trainer = Trainer(directory, optimizer=lambda named: torch.optim.SGD(named, lr=0.0), device="cpu", seed=seed)
        part = trainer.shard(parity.doubled(noisy.batch()))
        losses = [trainer.step(part).item() for _ in range(2)]
        trainer.forward_backward(part)
        gradients = trainer.full_gradients()  # raises where replicas differ
        with pytest.raises(PlanError, match=r"^cannot evaluate: .* draws noise \(rand at noisy.py:"):
            trainer.evaluate(part)
        results.append({"losses": losses, "gradients": gradients})
        trainer.close()
    return results


@pytest.mark.gloo
@pytest.mark.parametrize("random", ["exact", "fast"])
def test_every_kind_of_noise(random: str, pool: Pool, threads: OneProcess, tmp_path: Path) -> None:
    """By position as on one device; either way the same again for the same seed, and other losses for other steps.

    Threads draw what processes draw, though they have one generator of torch's among them.
    """
    parity.emit_case(tmp_path / "bundle", noisy.build(), noisy.batch(), ALL, {"random": random, "microbatches": 3})
    arguments = (str(tmp_path / "bundle"), [5, 5, 6])
    processes = pool.run("tests.gloo.test_random:noise", arguments, ranks=8)
    torch.testing.assert_close(threads.run("tests.gloo.test_random:noise", arguments, ranks=8), processes)
    first, again, other = processes[0]
    assert first["losses"] == again["losses"]
    assert all(torch.equal(first["gradients"][name], again["gradients"][name]) for name in first["gradients"])
    assert len({*first["losses"], *other["losses"]}) == 4, "steps and seeds draw the same"
    if random == "exact":
        model, batch = noisy.build().double(), parity.doubled(noisy.batch())
        for step, loss in enumerate(first["losses"]):
            with float64(), exact_random(seed=5, step=step):
                assert math.isclose(model(**batch).item(), loss, rel_tol=1e-9)
        with float64(), exact_random(seed=5, step=2):
            model(**batch).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(first["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-12), name
