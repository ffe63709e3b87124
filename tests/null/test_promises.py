"""A manifest that contradicts itself is refused before anything relies on it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from meshwright.runtime import BundleError
from meshwright.runtime.promises import check_manifest
from tests.gloo import bundles

MESH = {"dp": 2, "pp": 2, "tp": 2}


def _manifest() -> dict[str, Any]:
    return bundles.manifest(MESH, [range(0, 1), range(1, 3)], 3, 3, "1f1b")


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a path of keys."""
    *keys, last, value = path

    def change(manifest: dict[str, Any]) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


CASES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.pop("loss"), "it has no loss"),
    (_set("mesh", "tp", 0), "the mesh has tp=0: a size is a whole number from 1"),
    (_set("mesh", "pp", 3), "its schedule is not one row for each of the pp=3 pipeline ranks"),
    (
        _set("stages", 1, "ranks", [0, 1]),
        "stage 1 is on the ranks [0, 1], which are not those of one place on pp",
    ),
    (lambda m: m["stages"][1].update(ranks=m["stages"][0]["ranks"]), "pipeline rank 1 has no stage"),
    (_set("plan", "zero", 4), "its plan has zero=4 and microbatches=3"),
    (_set("plan", "reshard", "never"), "its plan has reshard='never', which is none of step, microbatch"),
    (_set("inputs", "kinds", "dtype", "word"), "input 'kinds' has the dtype 'word', which torch does not have"),
    (_set("inputs", "kinds", "types", "cp", "S(0)"), "input 'kinds' has a type on 'cp', which is no axis of the mesh"),
    (
        _set("inputs", "kinds", "types", "dp", "S(1)"),
        "'kinds' of shape ['B'] has the type 'S(1)' on dp: no such dim",
    ),
    (_set("inputs", "kinds", "types", "dp", "X"), "'X' is not a type: types are I, R, P, S(dim) and S(dim/groups)"),
    (_set("stages", 0, "inputs", ["x"]), "stage 0 takes the input 'x', which the batch does not have"),
    (
        _set("stages", 0, "sends", "hidden", "to", []),
        "stage 1 receives 'hidden' from stage 0, which does not send it there",
    ),
    (
        _set("stages", 1, "receives", "hidden", "shape", ["B", 5]),
        "'hidden' leaves stage 0 with shape ['B', 6] and arrives as ['B', 5]",
    ),
    (
        _set("stages", 1, "receives", "skip", "requires_grad", False),
        "'skip': stages 0 and 1 disagree whether its gradient comes back",
    ),
    (lambda m: m["stages"][1]["receives"].pop("skip"), "stage 0 sends 'skip' to stage 1, which does not receive it"),
    *(
        (_set("schedule", 0, text), "the schedule of pipeline rank 0 is not one forward and then one backward of each")
        for text in (
            "F0 F1",
            "1F0>s1  1F1>s1  1F2>s1  s1>1B0  s1>1B1  s1>1B2",
            "F0>s1  F1>s1  F2>s1  s1>B0  s1>B1  s1>I2",
            "F0>s1  F1>s1  F2>s1  s1>B0  s1>B1  W2  s1>I2",
            "F0>s1  F1>s1  F2>s1  s1>B0  s1>B1  [B2]>s1",
        )
    ),
    (
        _set("schedule", 0, "F0>1"),
        "the schedule of pipeline rank 0: 'F0>1' at position 0 is no action with stages",
    ),
    (_set("parameters", "scale", "stages", [2]), "'scale' is on stages [2], and there are 2"),
    (_set("loss", "stage", 5), "the loss is on stages [5], and there are 2"),
    (
        _set("parameters", "layers.0.norm", "types", "tp", "S(0/4)"),
        "'layers.0.norm': cannot cut dim 0 of [6] by 'S(0/4)' over tp=2",
    ),
    (
        lambda m: m["parameters"]["fused"]["segments"][1].update(start=7),
        "the segments of 'fused' of shape [11, 6] overlap or reach over its end",
    ),
]


def test_the_manifest_of_the_tests_keeps_its_promises() -> None:
    check_manifest(_manifest())


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_a_contradiction_is_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    manifest = json.loads(json.dumps(_manifest()))
    change(manifest)
    with pytest.raises(BundleError) as error:
        check_manifest(manifest)
    assert message in str(error.value)
