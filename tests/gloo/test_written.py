"""Buffers that forward writes to equal those of one device; microbatches by themselves equal gradient accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.runtime import Trainer
from tests import written
from tests.gloo import parity
from tests.gloo.pool import OneProcess

ALL = {"dp": 2, "pp": 2, "tp": 2}
BY_MICROBATCH = {"microbatches": 2, "batch_statistics": "microbatch"}

CASES: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("every kind", {"dp": 2}, {"zero": 2}),
    ("every kind", ALL, {"zero": 3, **BY_MICROBATCH}),
    ("stack", {"pp": 2, "tp": 2}, {"microbatches": 1}),
    ("average of all", {"dp": 2}, {"zero": 1, **BY_MICROBATCH}),
    ("not affine", {"dp": 2, "tp": 2}, {}),
    ("not tracking", ALL, {"zero": 1, **BY_MICROBATCH}),
    ("frozen", {"dp": 2, "pp": 2}, {"zero": 3, **BY_MICROBATCH}),
    ("averages", {"dp": 2, "tp": 2}, {}),
    ("averages", ALL, {"zero": 1, **BY_MICROBATCH}),
    ("counters", ALL, {"microbatches": 2}),
    ("counters", {"dp": 2, "pp": 2}, BY_MICROBATCH),
]


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "mesh", "plan"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*in eval mode")
def test_equals_one_device(
    name: str, mesh: dict[str, int], plan: dict[str, Any], threads: OneProcess, tmp_path: Path
) -> None:
    parity.emit_case(tmp_path / "bundle", written.build(name), written.batch(), mesh, plan)
    arguments = (str(tmp_path / "bundle"), written.batch())
    got = threads.run("tests.gloo.parity:train", arguments, ranks=parity.num_ranks(mesh))
    pieces = {"replicas": mesh.get("dp", 1), "microbatches": plan.get("microbatches", 1)}
    accumulated = pieces if "batch_statistics" in plan else {}
    parity.compare(got, parity.reference(written.build(name), written.batch(), **accumulated))


def continued(directory: str, path: str) -> list[bool]:
    """On every rank: after a checkpoint in the middle the same losses and the same state, buffers included."""
    batch = parity.doubled(written.batch())

    def new() -> Trainer:
        return Trainer(directory, optimizer=lambda named: torch.optim.AdamW(named, lr=0.01), device="cpu")

    trainer = new()
    part = trainer.shard(batch)
    trainer.step(part)
    trainer.save(path)
    wanted = [trainer.step(part).item(), trainer.step(part).item()], trainer.full_state_dict()
    trainer.close()
    trainer = new()
    trainer.load(path)
    found = [trainer.step(part).item(), trainer.step(part).item()], trainer.full_state_dict()
    trainer.close()
    assert found[0] == wanted[0]
    return [torch.equal(found[1][name], value) for name, value in wanted[1].items()]


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["stack", "averages"])
def test_a_checkpoint_has_the_buffers(name: str, threads: OneProcess, tmp_path: Path) -> None:
    parity.emit_case(tmp_path / "bundle", written.build(name), written.batch(), ALL, {"zero": 3, **BY_MICROBATCH})
    got = threads.run("tests.gloo.test_written:continued", (str(tmp_path / "bundle"), str(tmp_path / "saved")), ranks=8)
    assert all(all(same) for same in got)
