"""Reading a bundle: its manifest, and the files of one rank."""

import importlib.util
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.runtime.actions import Action, parse, peers_of, stages_on, to_stages
from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import along, coordinates_of, placement_of
from meshwright.runtime.promises import check_manifest

FORMAT = 2


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the bundle in ``directory``. Raises BundleError for one that contradicts itself."""
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise BundleError(f"{directory} is no bundle: cannot read manifest.json: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"{path} is no JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} has format {manifest.get('format')!r}, this version of Meshwright reads {FORMAT}")
    try:
        check_manifest(manifest)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    return manifest


def stage_class(directory: Path, manifest: Mapping[str, Any], index: int) -> Any:
    """The class Stage of a stage file. Raises BundleError."""
    path = directory / manifest["stages"][index]["file"]
    spec = importlib.util.spec_from_file_location(f"meshwright_stage_{index}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise BundleError(f"the bundle has no {manifest['stages'][index]['file']}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "Stage"):
        raise BundleError(f"{path} defines no class Stage")
    return module.Stage


def actions_of(directory: Path, manifest: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[Action, ...]]:
    """The stages and the actions of a rank, with peers as stages: from its file where there is one, else derived.

    Raises BundleError.
    """
    sizes, placement = manifest["mesh"], placement_of(manifest)
    at = coordinates_of(sizes, rank)
    place = at.get("pp", 0)
    stages = stages_on(placement, place)
    path = directory / "ranks" / f"rank_{rank:04d}.py"
    if not path.exists():
        return stages, parse(manifest["schedule"][place], "stage")
    file = runpy.run_path(str(path))
    groups = {axis: along(sizes, rank, axis) for axis in sizes}
    for name, expected in (("COORDINATES", at), ("GROUPS", groups), ("STAGES", stages)):
        if file.get(name) != expected:
            raise BundleError(f"{path} says {name} = {file.get(name)!r}, the manifest says {expected!r}")
    try:
        kind = peers_of(stages)
        actions = parse(file["SCHEDULE"], kind)
        if kind == "rank":
            line = groups.get("pp", (rank,))
            actions = to_stages(actions, {line[place]: stage for stage, place in enumerate(placement)})
        return stages, actions
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path}: cannot read SCHEDULE: {error}") from error
