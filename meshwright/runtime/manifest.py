"""Reading a bundle: its manifest, and the files of one rank."""

import importlib.util
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.runtime.actions import Action, parse, to_ranks
from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import coordinates_of, rank_at

FORMAT = 1


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the bundle in ``directory``. Raises BundleError."""
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise BundleError(f"{directory} is no bundle: cannot read manifest.json: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"{path} is no JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} has format {manifest.get('format')!r}, this version of Meshwright reads {FORMAT}")
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


def actions_of(directory: Path, manifest: Mapping[str, Any], rank: int) -> tuple[int, tuple[Action, ...]]:
    """The stage and the actions of a rank: from its file where there is one, else derived. Raises BundleError."""
    at = coordinates_of(manifest["mesh"], rank)
    stage = at.get("pp", 0)
    path = directory / "ranks" / f"rank_{rank:04d}.py"
    if path.exists():
        file = runpy.run_path(str(path))
        for name, expected in (("COORDINATES", at), ("STAGE", stage)):
            if file.get(name) != expected:
                raise BundleError(f"{path} says {name} = {file.get(name)!r}, the manifest {expected!r}")
        try:
            return stage, parse(file["SCHEDULE"])
        except (KeyError, ValueError) as error:
            raise BundleError(f"{path}: cannot read SCHEDULE: {error}") from error
    actions = parse(manifest["stages"][stage]["schedule"], "stage")
    peers = [rank_at(manifest["mesh"], {**at, "pp": k}) for k in range(len(manifest["stages"]))]
    return stage, to_ranks(actions, peers)
