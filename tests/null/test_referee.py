"""Emitted stages typecheck on every axis before an independent referee, who sees each conversion that is taken out.

``python benchmarks/zoo.py --referee`` asks it of the whole zoo on all meshes.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import spmd_types as spmd
import torch
from spmd_types import SpmdTypeError
from torch import nn

from tests import hard, models, zoo
from tests.gloo.outcomes import MESHES, judged, outcome
from tests.gloo.parity import doubled, emit_case
from tests.null.referee import judge

pytestmark = pytest.mark.xdist_group("referee")  # the bundles are made once

ALL = {"dp": 2, "pp": 2, "tp": 2}
Case = tuple[nn.Module, Mapping[str, Any], Mapping[str, int], Mapping[str, Any]]


def _zoo(name: str, mesh: str) -> Case:
    return (zoo.build(name), zoo.batch(name), *MESHES[mesh])


def _hard(name: str, mesh: Mapping[str, int], **plan: Any) -> Case:
    return hard.build(name), hard.batch(name), mesh, plan


def _model(name: str, mesh: Mapping[str, int], **plan: Any) -> Case:
    return models.build(name), models.batch(name, "padded"), mesh, plan


CASES: Mapping[str, Callable[[], Case]] = {
    "sequence parallel": lambda: _model("llama", {"dp": 2, "tp": 2}, zero=3, sequence_parallel=True),
    "falcon on 4 ranks": lambda: _model("falcon", {"tp": 4}),
    "odd sizes": lambda: _hard("odd sizes", {"dp": 2, "tp": 2}),
    "divisors": lambda: _hard("divisors", ALL, microbatches=2),
    "skips": lambda: _hard("skips", {"pp": 4, "tp": 2}, microbatches=2),
    "contrastive": lambda: _hard("contrastive", {"dp": 2, "tp": 2}),
    "mixed": lambda: _hard("mixed", {"dp": 2, "tp": 2}),
}
ZOO = [
    ("GPT2LMHeadModel", "3D zero1"),
    ("MixtralForCausalLM", "tp2"),
    ("SwinForImageClassification", "3D zero1"),
    ("WhisperForConditionalGeneration", "tp2"),
    ("ResNetForImageClassification", "3D zero1"),
]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An emitted program and its batch in the program's dtypes."""

    directory: Path
    batch: Mapping[str, Any]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Bundle]:
    """Name -> the bundle of a case."""
    found = {}
    for name, case in CASES.items():
        model, batch, mesh, plan = case()
        directory = tmp_path_factory.mktemp("judged") / "bundle"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators that run whole
            emit_case(directory, model, batch, mesh, plan)
        found[name] = Bundle(directory, doubled(batch))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_line_typechecks(name: str, bundles: Mapping[str, Bundle]) -> None:
    judge(bundles[name].directory, bundles[name].batch)


@pytest.mark.parametrize(("name", "mesh"), ZOO)
def test_the_zoo_typechecks(name: str, mesh: str) -> None:
    assert outcome(judged, name, mesh).startswith("typechecks")


# What the referee sees


Row = tuple[str, Exception | None, bool]
"""(line, objection, whether there has to be one)."""


class _Forgotten:
    """What a conversion makes of the elements, as if nothing had been done to the type."""

    def __init__(self) -> None:
        self.differentiable = False

    def __call__(self, convert: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.differentiable |= x.requires_grad
        with spmd.no_typecheck():
            moved = convert(x, *args, **kwargs)
        return spmd.assert_type(moved, spmd.get_local_type(x))


def _taken_out(bundle: Bundle, name: str, detail: str, forgotten: bool) -> Iterator[Row]:
    """A row for every conversion of a kind: taken out with its line, or only its type ``forgotten``."""
    call = re.compile(
        rf"(?P<before>\w+ = |return ){name}\((?P<value>\w+), (?P<rest>[^#\n]*{detail}[^#\n]*)\)(?=\n|  +#).*"
    )
    for path in sorted((bundle.directory / "stages").iterdir()):
        text = path.read_text()
        for match in call.finditer(text):
            other = f"forgotten({name}, {match['value']}, {match['rest']})" if forgotten else match["value"]
            path.write_text(f"{text[: match.start()]}{match['before']}{other}{text[match.end() :]}")
            objection: Exception | None = None
            stand_in = _Forgotten()
            try:
                judge(bundle.directory, bundle.batch, {"forgotten": stand_in})
            except (RuntimeError, ValueError) as error:
                objection = error
            finally:
                path.write_text(text)
            # Without gradient I mixes with V as R does, for the referee and for us.
            yield match[0], objection, stand_in.differentiable or not forgotten


SEEN = [
    # conversion, what is said of it, whether the line stays and only its type is forgotten: without the line the sizes
    # of tensors do not fit, and torch objects before the referee can
    ("invariant_to_replicated", "", False),
    ("all_reduce", "", False),
    ("reduce_scatter", "", True),
    ("all_gather", 'to="I"', True),
    ("shard", 'of="I"', True),
]
UNSEEN = {
    ("all_gather", 'to="R"'): "where R may stand V may stand: the gradients differ, and V says nothing of them",
    ("shard", 'of="R"'): "the same",
    ("all_to_all", ""): "it is from V to V: local types do not say which dim is split",
    ("part_of_mean", ""): "a factor is no matter of types",
}
"""Conversion that the referee does not miss when its type is forgotten -> why not. Parity finds these."""


@pytest.mark.parametrize(("name", "detail", "forgotten"), SEEN)
def test_a_conversion_that_is_taken_out_is_seen(
    name: str, detail: str, forgotten: bool, bundles: Mapping[str, Bundle]
) -> None:
    found = [row for bundle in bundles.values() for row in _taken_out(bundle, name, detail, forgotten)]
    assert any(needed for _, _, needed in found)
    for line, objection, needed in found:
        assert not needed or isinstance(objection, SpmdTypeError), f"{line}: {objection}"


@pytest.mark.parametrize(("name", "detail"), UNSEEN)
def test_what_the_referee_cannot_see(name: str, detail: str, bundles: Mapping[str, Bundle]) -> None:
    found = [row for bundle in bundles.values() for row in _taken_out(bundle, name, detail, forgotten=True)]
    assert found and all(objection is None for _, objection, _ in found)


MISTAKES = {
    "a parameter whose gradient is never summed": (
        "sequence parallel", "I -> R", "I", "Invariant type on axis mesh_tp cannot mix with other types",
    ),
    "an edge of another type": (
        "skips", r'"tp": "I"(?=[^}]*\}, "requires_grad": true)', '"tp": "R"', ".I, expected PerMeshAxis",
    ),
    "a loss that is summed once too often": ("divisors", '"dp": "P"', '"dp": "I"', "mesh_dp: tensor has PerMeshAxis"),
    "a margin that says something else": ("falcon on 4 ranks", "tp P -> I", "tp P -> R", ".I, expected PerMeshAxis"),
}  # fmt: skip
"""Mistake -> bundle, what stands in its manifest and stages (a pattern) and what instead, and the objection."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_files_say_is_held_against_them(mistake: str, bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    name, right, wrong, objection = MISTAKES[mistake]
    shutil.copytree(bundles[name].directory, tmp_path / "bundle")
    for path in (tmp_path / "bundle/manifest.json", *(tmp_path / "bundle/stages").iterdir()):
        path.write_text(re.sub(right, wrong, path.read_text()))
    with pytest.raises(SpmdTypeError, match=re.escape(objection)):
        judge(tmp_path / "bundle", bundles[name].batch)
