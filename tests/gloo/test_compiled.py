"""Programs whose blocks are compiled equal one device, and are compiled once for all layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from meshwright.testing import exact_random
from tests import models
from tests.gloo import parity
from tests.gloo.pool import OneProcess, Pool

Batch = dict[str, torch.Tensor]


class DroppingLayer(nn.Module):
    """With a running average, too: what stays between graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)
        self.level: torch.Tensor = nn.Buffer(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(torch.tanh(self.up(x)), 0.25, self.training)
        self.level = 0.9 * self.level + 0.1 * self.up.bias.detach()[:12]
        return x + self.down(hidden)  # type: ignore[no-any-return]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DroppingLayer() for _ in range(5))
        self.head = nn.Linear(12, 1)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            features = layer(features)
        return (self.head(features).squeeze(-1) - targets).square().mean()  # type: ignore[no-any-return]


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return Dropping()


CASES: list[tuple[str, dict[str, int], dict[str, Any], int]] = [
    ("llama", {"tp": 2}, {"sequence_parallel": True, "microbatches": 2}, 1),
    ("mlp", {"dp": 2}, {"zero": 3, "microbatches": 3}, 1),
    ("mlp", {"pp": 2}, {"microbatches": 4}, 1),
    ("mlp", {"pp": 2, "tp": 2}, {"microbatches": 3, "schedule": "zb-h1"}, 1),
    ("dropping", {"dp": 2, "pp": 2}, {"random": "exact", "microbatches": 3, "schedule": "zbv", "zero": 3}, 4),
]
"""Model, mesh, plan, and how many graphs the blocks of a rank are: those that drop are two, in each of two stages."""


def train(directory: str, batch: Batch) -> dict[str, Any]:
    """On every rank: the steps of ``parity``, and how many graphs they took."""
    counters.clear()
    result = parity.train(directory, batch)
    return {**result, "graphs": counters["stats"]["unique_graphs"]}


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "mesh", "plan", "graphs"), CASES, ids=str)
def test_equals_one_device(
    name: str, mesh: dict[str, int], plan: dict[str, Any], graphs: int, pool: Pool, tmp_path: Path
) -> None:
    batch = models.batch("llama" if name == "llama" else "mlp", "uneven", 12, 14)

    def build() -> nn.Module:
        return dropping() if name == "dropping" else models.build(name, 5)

    wanted = parity.reference(build(), batch, random=lambda step: exact_random(step=step))
    parity.emit_case(tmp_path, build(), batch, mesh, {**plan, "compile": True})
    task = "tests.gloo.test_compiled:train"  # compiling takes its time where nothing is cached and others compute
    got = pool.run(task, (str(tmp_path), batch), ranks=parity.num_ranks(mesh), seconds=400)
    parity.compare(got, wanted)
    assert {result["graphs"] for result in got} == {2 * graphs}, "each once for training and once for evaluation"


def test_ranks_that_are_threads_do_not_compile(threads: OneProcess, tmp_path: Path) -> None:
    batch = models.batch("mlp")
    parity.emit_case(tmp_path, models.build("mlp", 4), batch, {"tp": 2}, {"compile": True})
    got = threads.run("tests.gloo.test_compiled:train", (str(tmp_path), batch), ranks=2)
    parity.compare(got, parity.reference(models.build("mlp", 4), batch))
    assert {result["graphs"] for result in got} == {0}
