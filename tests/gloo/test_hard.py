"""Models that are hard on exactness equal one device on every kind of mesh, or are refused with the reason."""

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest

from meshwright import Mesh, Plan, PlanError, compile_parallel
from tests import hard
from tests.gloo import parity
from tests.gloo.pool import OneProcess

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp2": ({"tp": 2}, {}),
    "pp4": ({"pp": 4}, {"microbatches": 8}),  # one sample each
    "dp2": ({"dp": 2}, {"zero": 2}),
    "3D": ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 3, "microbatches": 2}),
}
WHOLE_BATCH = {"contrastive", "mixed"}
"""Samples meet each other: over dp they are gathered or summed, in microbatches there is no way."""


@functools.cache
def _reference(name: str) -> dict[str, Any]:
    return parity.reference(hard.build(name), hard.batch(name))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [(name, mesh) for name in hard.HARD for mesh in MESHES if mesh != "dp2" or name in WHOLE_BATCH],  # 3D has dp too
)
def test_equals_one_device(name: str, mesh: str, threads: OneProcess, tmp_path: Path) -> None:
    axes, plan = MESHES[mesh]
    if name in WHOLE_BATCH and "microbatches" in plan:
        with pytest.raises(PlanError, match="^the batch cannot be cut into microbatches without changing the result"):
            compile_parallel(hard.build(name), Mesh(**axes), example_inputs=hard.batch(name), plan=Plan(**plan))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators that run whole
        parity.emit_case(tmp_path / "bundle", hard.build(name), hard.batch(name), axes, plan)
    arguments = (str(tmp_path / "bundle"), hard.batch(name))
    got = threads.run("tests.gloo.parity:train", arguments, ranks=parity.num_ranks(axes))
    parity.compare(got, _reference(name))
