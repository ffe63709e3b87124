"""Every compiled program equals one device: loss, every gradient, every updated parameter."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.gloo import parity
from tests.gloo.pool import OneProcess, Pool, Ranks

DP, TP, PP = {"dp": 2}, {"tp": 2}, {"pp": 2}
ALL = {"dp": 2, "pp": 2, "tp": 2}

Case = tuple[str, dict[str, int], dict[str, Any], dict[str, Any]]
"""Model, mesh, plan, and what else differs."""

PROCESSES: list[Case] = [
    ("mlp", {"pp": 4}, {"microbatches": 2, "schedule": "gpipe"}, {}),
    ("llama", DP, {"zero": 2, "microbatches": 3}, {}),
    ("llama", {"tp": 4}, {}, {}),
    ("llama", {"dp": 2, "tp": 2}, {"zero": 3, "sequence_parallel": True}, {}),
    ("llama", ALL, {"zero": 1, "microbatches": 3}, {}),
    ("gpt2", {"dp": 2, "pp": 2}, {"zero": 1, "microbatches": 3}, {"kind": "padded"}),
    ("gpt2", ALL, {"zero": 2, "microbatches": 2}, {}),
    ("falcon", ALL, {"zero": 3, "microbatches": 3}, {}),
    ("mlp", {"dp": 2, "pp": 2}, {"zero": 3, "microbatches": 3, "schedule": "zb-h1", "reshard": "microbatch"}, {}),
]
"""What one process cannot show: every kind of collective and of message between real ones."""

THREADS: list[Case] = [
    ("mlp", DP, {}, {}),
    ("mlp", DP, {"zero": 1, "microbatches": 3}, {}),
    ("mlp", DP, {"zero": 2, "microbatches": 2}, {}),
    ("mlp", DP, {"zero": 3}, {}),
    ("mlp", TP, {}, {}),
    ("mlp", PP, {"microbatches": 1}, {}),
    ("mlp", ALL, {"zero": 3, "microbatches": 3}, {}),
    ("llama", DP, {"microbatches": 2}, {}),
    ("llama", DP, {"zero": 1}, {}),
    ("llama", DP, {"zero": 3, "microbatches": 2}, {}),
    ("llama", TP, {}, {}),
    ("llama", TP, {"sequence_parallel": True}, {}),
    ("llama", PP, {"microbatches": 4}, {}),
    ("llama", PP, {"microbatches": 3, "schedule": "gpipe"}, {}),
    ("llama", {"pp": 4}, {"microbatches": 2}, {}),
    ("llama", {"dp": 2, "pp": 2}, {"zero": 2, "microbatches": 3}, {}),
    ("llama", {"pp": 2, "tp": 2}, {"microbatches": 4, "schedule": "gpipe"}, {}),
    ("llama", ALL, {"zero": 3, "microbatches": 2}, {"kind": "padded"}),
    ("llama", {"dp": 2, "tp": 2}, {}, {"loss": "squared_error"}),
    ("llama", ALL, {"zero": 1, "microbatches": 2}, {"size": 8, "length": 10}),
    ("gpt2", DP, {"zero": 3}, {}),
    ("gpt2", {"tp": 4}, {}, {}),
    ("gpt2", {"pp": 4}, {"microbatches": 3}, {}),
    ("falcon", {"dp": 2, "tp": 2}, {"zero": 1}, {}),
    ("falcon", {"tp": 4}, {}, {}),
    ("falcon_new", {"pp": 2, "tp": 2}, {"microbatches": 1}, {}),
    ("falcon_new", {"dp": 2, "tp": 2}, {"zero": 2, "sequence_parallel": True}, {"kind": "padded"}),
]


LOSSES = {"": None, "squared_error": parity.squared_error}


def num_layers_for(name: str, mesh: Mapping[str, int]) -> int:
    """Two layers show what blocks can show; every stage has one. (The first layer of the MLP, on data, is no block.)"""
    return 4 if name == "mlp" else max(2, mesh.get("pp", 1))


@functools.cache
def _reference(name: str, num_layers: int, kind: str, size: int, length: int, loss: str) -> dict[str, Any]:
    return parity.reference(models.build(name, num_layers), models.batch(name, kind, size, length), LOSSES[loss])


def _label(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items()) or "plain"
    return str(value)


def _check(ranks: Ranks, case: Case, directory: Path) -> None:
    name, mesh, plan, other = case
    kind, loss = other.get("kind", "uneven"), other.get("loss", "")
    size, length = other.get("size", 12), other.get("length", 16)
    model = models.build(name, num_layers_for(name, mesh))
    parity.emit_case(directory, model, models.batch(name, kind), mesh, plan, LOSSES[loss])
    batch = models.batch(name, kind, size, length)
    got = ranks.run("tests.gloo.parity:train", (str(directory), batch), ranks=parity.num_ranks(mesh))
    parity.compare(got, _reference(name, num_layers_for(name, mesh), kind, size, length, loss))


@pytest.mark.gloo
@pytest.mark.parametrize("case", PROCESSES, ids=lambda case: "-".join(map(_label, case)))
def test_processes_equal_one_device(case: Case, pool: Pool, tmp_path: Path) -> None:
    _check(pool, case, tmp_path / "bundle")


@pytest.mark.parametrize("case", THREADS, ids=lambda case: "-".join(map(_label, case)))
def test_threads_equal_one_device(case: Case, threads: OneProcess, tmp_path: Path) -> None:
    _check(threads, case, tmp_path / "bundle")
