"""What a model of the zoo does on a mesh, in a few words."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from meshwright import PlanError, UnsupportedError
from tests import zoo
from tests.gloo import parity
from tests.gloo.pool import Failed, Ranks

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "pp2": ({"pp": 2}, {"microbatches": 2}),
    "3D zero1": ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 1, "microbatches": 2}),
    "3D zero3": ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 3, "microbatches": 2}),
}
"""Column -> mesh and plan."""


def outcome(ranks: Ranks, name: str, mesh: str) -> str:
    """What one model does on one mesh; where its loss mixes samples, the whole batch at once too."""
    said = _outcome(ranks, name, *MESHES[mesh])
    if "use microbatches=1" not in said:
        return said.splitlines()[0]
    axes, plan = MESHES[mesh]
    return f"{_outcome(ranks, name, axes, {**plan, 'microbatches': 1}).splitlines()[0]}, microbatches=1"


def _outcome(ranks: Ranks, name: str, axes: dict[str, int], plan: dict[str, Any]) -> str:
    batch = zoo.batch(name)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chosen = {**plan, **zoo.ZOO[name].plan}
            program = parity.emit_case(Path(directory, "bundle"), zoo.build(name), batch, axes, chosen)
        except (UnsupportedError, PlanError) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            return f"BUG: {type(error).__name__}: {error}"
        try:
            arguments = (str(Path(directory, "bundle")), batch, 1)
            got = ranks.run("tests.gloo.parity:train", arguments, ranks=parity.num_ranks(axes))
            pieces = {"replicas": axes.get("dp", 1), "microbatches": plan.get("microbatches", 1)}
            accumulated = pieces if "batch_statistics" in chosen else {}
            parity.compare(got, parity.reference(zoo.build(name), batch, steps=1, **accumulated))
        except (AssertionError, Failed) as error:
            return f"WRONG: {error}"
    whole = sum("runs whole" in line for line in program.lowered.warnings)
    return f"exact, {whole} whole" if whole else "exact"
