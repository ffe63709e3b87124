"""Checking a bundle from its manifest and files alone: what the compiler proved holds for what lies on disk, edited
or not.
"""

import ast
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from meshwright.codegen.emit import digest
from meshwright.codegen.steps import edges_of
from meshwright.compiler.errors import BundleError
from meshwright.compiler.plan import SCHEDULES
from meshwright.passes.prove import prove
from meshwright.runtime.actions import forwards, parse
from meshwright.runtime.groups import coordinates_of, placement_of
from meshwright.runtime.layout import parse as parse_type
from meshwright.runtime.manifest import actions_of, load_manifest


def verify_bundle(directory: Path) -> list[str]:
    """Check names, shapes and types of parameters, edges, and schedules; returns one line for each thing that was
    shown.

    Raises BundleError with the first thing that does not fit.
    """
    manifest = load_manifest(directory)
    edited = [name for name, known in manifest.get("files", {}).items() if _digest(directory / name) != known]
    declared = [_check_stage(directory, manifest, index) for index in range(len(manifest["stages"]))]
    _check_edges(manifest)
    ranks = _check_schedules(directory, manifest)
    return [
        f"{len(manifest['stages'])} stage files declare {sum(declared)} parameters and buffers as the "
        f"manifest has them",
        "every value that is sent is received, with the same shape and types",
        f"the schedule is proven: every microbatch forward and backward once, no circle, messages match "
        f"({ranks} rank files)",
        f"edited since they were emitted: {', '.join(edited)}" if edited else "no file was edited",
    ]


def _digest(path: Path) -> str:
    if not path.exists():
        raise BundleError(f"{path} is missing")
    return digest(path.read_bytes())


def _check_stage(directory: Path, manifest: Mapping[str, Any], index: int) -> int:
    """The stage file parses, and what it declares by literal names and shapes is in the manifest."""
    path = directory / manifest["stages"][index]["file"]
    try:
        tree = ast.parse(path.read_text(), filename=str(path))
    except SyntaxError as error:
        raise BundleError(f"{path}:{error.lineno} is no Python: {error.msg}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Stage" not in classes:
        raise BundleError(f"{path} defines no class Stage")
    known = {**manifest["parameters"], **manifest["buffers"]}
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_site(node.func):
            _check_site(f"{path}:{node.lineno}", node, manifest["random"])
        if not isinstance(node, ast.Call) or len(node.args) < 2 or not _is_declaration(node.func):
            continue
        name, shape = ast.literal_eval(node.args[0]), ast.literal_eval(node.args[1])
        matching = [full for full in known if full == name or full.endswith(f".{name}")]
        if not matching:
            raise BundleError(f"{path}:{node.lineno} declares {name!r}, which the manifest does not have")
        if not any(list(shape) == known[full]["shape"] for full in matching):
            raise BundleError(
                f"{path}:{node.lineno} declares {name!r} with shape {shape}, the manifest says "
                f"{tuple(known[matching[0]]['shape'])}"
            )
        for keyword in node.keywords:
            if keyword.arg != "segment" and keyword.arg is not None:
                parse_type(ast.literal_eval(keyword.value))
        count += 1
    return count


def _is_site(function: ast.expr) -> bool:
    """``param.random(...)``."""
    if not isinstance(function, ast.Attribute) or function.attr != "random":
        return False
    return isinstance(function.value, ast.Name) and function.value.id == "param"


def _check_site(where: str, node: ast.Call, known: Mapping[str, Any]) -> None:
    name = ast.literal_eval(node.args[0])
    types = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    matching = [entry for full, entry in known.items() if full == name or full.endswith(f".{name}")]
    if not any(entry["types"] == types for entry in matching):
        raise BundleError(f"{where} draws from {name!r}, split as {types}, which the manifest does not have")


def _is_declaration(function: ast.expr) -> bool:
    """``param(...)`` or ``param.buffer(...)``."""
    if isinstance(function, ast.Attribute):
        return function.attr == "buffer" and isinstance(function.value, ast.Name) and function.value.id == "param"
    return isinstance(function, ast.Name) and function.id == "param"


def _check_edges(manifest: Mapping[str, Any]) -> None:
    for index, stage in enumerate(manifest["stages"]):
        for name, edge in stage["receives"].items():
            sent = manifest["stages"][edge["from"]]["sends"].get(name)
            if sent is None or index not in sent["to"]:
                raise BundleError(
                    f"stage {index} receives {name!r} from stage {edge['from']}, which does not send it there"
                )
            for key in ("shape", "dtype", "types", "requires_grad"):
                if sent[key] != edge[key]:
                    raise BundleError(
                        f"{name!r} leaves stage {edge['from']} with {key} {sent[key]} and enters stage "
                        f"{index} with {edge[key]}"
                    )


def _check_schedules(directory: Path, manifest: Mapping[str, Any]) -> int:
    """The schedule is proven, and every rank file says the same."""
    try:
        rows = [parse(text, "stage") for text in manifest["schedule"]]
    except ValueError as error:
        raise BundleError(f"the schedule cannot be read: {error}") from error
    proven = partial(
        prove,
        num_microbatches=manifest["plan"]["microbatches"],
        edges=edges_of(manifest),
        placement=placement_of(manifest),
        ascending=manifest["plan"]["schedule"] in SCHEDULES,
        error=BundleError,
    )
    proven(rows)
    proven(list(map(forwards, rows)), forward_only=True)
    files = sorted((directory / "ranks").glob("rank_*.py"))
    for path in files:
        rank = int(path.stem.removeprefix("rank_"))
        _, actions = actions_of(directory, manifest, rank)
        place = coordinates_of(manifest["mesh"], rank).get("pp", 0)
        if actions != rows[place]:
            raise BundleError(f"{path} has another schedule than the manifest has for pipeline rank {place}")
    return len(files)
