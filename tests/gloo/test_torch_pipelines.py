"""A foreign referee: torch's own pipeline runtime runs every schedule, with our messages, to the gradients of one
device.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.passes.schedules import ALGORITHMS, Pipeline, Schedule, schedule
from meshwright.passes.schedules.torch_csv import write
from tests.gloo.pool import Pool

pytestmark = pytest.mark.gloo

WIDTH, ROWS = 6, 2
"""Features, and rows of a microbatch."""


def steps(num_ranks: int) -> dict[str, Schedule]:
    """Every schedule that is defined for 2 p + 1 microbatches, else for 2 p."""
    found = {}
    for name, algorithm in ALGORITHMS.items():
        candidates = [Pipeline.of(num_ranks, m, algorithm.chunks or 2) for m in (2 * num_ranks + 1, 2 * num_ranks)]
        found[name] = schedule(name, next(p for p in candidates if algorithm.undefined(p) is None))
    return found


def largest_differences(num_ranks: int, directory: str) -> dict[str, float]:
    """The largest difference of a gradient on this rank, by schedule."""
    rank = torch.distributed.get_rank()
    return {name: _difference(step, rank, f"{directory}/{name}.csv") for name, step in steps(num_ranks).items()}


def _difference(step: Schedule, rank: int, path: str) -> float:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    number, last = step.pipeline.num_microbatches, step.pipeline.num_stages - 1
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(last + 1)]
    whole = copy.deepcopy(nn.Sequential(*modules))
    inputs, targets = torch.randn(2, ROWS * number, WIDTH, dtype=torch.float64)
    nn.functional.mse_loss(whole(inputs), targets).backward()

    def example(grad: bool) -> torch.Tensor:
        return torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=grad)

    own = [stage for stage, owner in enumerate(step.placement) if owner == rank]
    stages: list[Any] = [
        PipelineStage(modules[s], s, last + 1, torch.device("cpu"), example(s > 0), output_args=example(True))
        for s in own
    ]
    runtime = _PipelineScheduleRuntime(stages, number, loss_fn=nn.functional.mse_loss)
    runtime._load_csv(path, format="compute_comms")
    runtime.step(*([inputs] if 0 in own else []), **({"target": targets, "losses": []} if last in own else {}))
    pairs = [pair for s in own for pair in zip(modules[s].parameters(), whole[s].parameters(), strict=True)]
    assert all(one.grad is not None and other.grad is not None for one, other in pairs)
    return max(float((one.grad - other.grad).abs().max()) for one, other in pairs)  # type: ignore[operator]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_torch_runs_our_schedules_to_the_same_gradients(num_ranks: int, pool: Pool, tmp_path: Path) -> None:
    for name, step in steps(num_ranks).items():
        (tmp_path / f"{name}.csv").write_text(write(step, messages=True))
    task = "tests.gloo.test_torch_pipelines:largest_differences"
    for found in pool.run(task, (num_ranks, str(tmp_path)), ranks=num_ranks):
        assert found.keys() == ALGORITHMS.keys()
        assert max(found.values()) < 1e-15
