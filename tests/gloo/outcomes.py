"""What a model of the zoo does on a mesh, in a few words."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spmd_types import SpmdTypeError

from meshwright import PlanError, UnsupportedError
from tests import zoo
from tests.gloo import parity
from tests.gloo.pool import Failed, Ranks
from tests.null.referee import judge

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2": ({"dp": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "pp2": ({"pp": 2}, {"microbatches": 2}),
    "3D zero1": ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 1, "microbatches": 2}),
    "3D zero3": ({"dp": 2, "pp": 2, "tp": 2}, {"zero": 3, "microbatches": 2}),
}
"""Column -> mesh and plan."""


Check = Callable[[Path, str, dict[str, int], dict[str, Any]], str]
"""(bundle, model, mesh, plan) -> what holds; raises AssertionError, Failed or SpmdTypeError where it does not."""


def outcome(check: Check, name: str, mesh: str) -> str:
    """What one model does on one mesh; where its loss mixes samples, the whole batch at once too."""
    said = _outcome(check, name, *MESHES[mesh])
    if "use microbatches=1" not in said:
        return said.splitlines()[0]
    axes, plan = MESHES[mesh]
    return f"{_outcome(check, name, axes, {**plan, 'microbatches': 1}).splitlines()[0]}, microbatches=1"


def _outcome(check: Check, name: str, axes: dict[str, int], plan: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle, chosen = Path(directory, "bundle"), {**plan, **zoo.ZOO[name].plan}
        try:
            program = parity.emit_case(bundle, zoo.build(name), zoo.batch(name), axes, chosen)
        except (UnsupportedError, PlanError) as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            return f"BUG: {type(error).__name__}: {error}"
        try:
            holds = check(bundle, name, axes, chosen)
        except (AssertionError, Failed, SpmdTypeError) as error:
            return f"WRONG: {error}"
    whole = sum("runs whole" in line for line in program.lowered.warnings)
    return f"{holds}, {whole} whole" if whole else holds


def trained(ranks: Ranks) -> Check:
    """The check that a step on all ranks equals one device."""

    def check(bundle: Path, name: str, axes: dict[str, int], plan: dict[str, Any]) -> str:
        batch = zoo.batch(name)
        got = ranks.run("tests.gloo.parity:train", (str(bundle), batch, 1), ranks=parity.num_ranks(axes))
        pieces = {"replicas": axes.get("dp", 1), "microbatches": plan.get("microbatches", 1)}
        accumulated = pieces if "batch_statistics" in plan else {}
        parity.compare(got, parity.reference(zoo.build(name), batch, steps=1, **accumulated))
        return "exact"

    return check


def judged(bundle: Path, name: str, axes: dict[str, int], plan: dict[str, Any]) -> str:
    """The check that the referee has no objection."""
    judge(bundle, parity.doubled(zoo.batch(name)))
    return "typechecks"
