"""Emit: the bundle on disk, all of it or nothing."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from meshwright.codegen.edges import edge_names
from meshwright.codegen.manifest import manifest_of
from meshwright.codegen.stages import stage_view
from meshwright.codegen.weights import write_weights
from meshwright.codegen.wording import wrapped
from meshwright.compiler.errors import PlanError
from meshwright.compiler.program import Lowered
from meshwright.runtime.actions import KINDS, Action, Peers, peers_of, render, stages_on, to_ranks

MAX_RANK_FILES = 1024


def emit(lowered: Lowered, directory: Path, *, ranks: Iterable[int] | None, weights: bool, overwrite: bool) -> Path:
    """Write the bundle of ``lowered`` into ``directory``. Raises PlanError for files there that are not ours or were
    edited.
    """
    foreign = [] if overwrite else foreign_files(directory)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise PlanError(
            f"{directory} has files that this would overwrite and that were edited or are not of a bundle: {shown}\n"
            "  choose another directory, or pass overwrite=True"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        files = _texts(lowered, ranks)
        for name, text in files.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if weights:
            write_weights(lowered, building / "weights")
        building.chmod(0o755)
        _replace(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory


def foreign_files(directory: Path) -> list[str]:
    """The files of ``directory`` that emit did not write, or that differ from what it wrote."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        return [directory.name]
    try:
        known: Mapping[str, str] = json.loads((directory / "manifest.json").read_text()).get("files", {})
    except (OSError, json.JSONDecodeError, AttributeError):
        known = {}
    found = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if "__pycache__" in path.parts or (known and (name == "manifest.json" or name.startswith("weights/"))):
            continue
        if name not in known or digest(path.read_bytes()) != known[name]:
            found.append(name)
    return found


def digest(data: bytes) -> str:
    """The digest by which an edited file is known."""
    return hashlib.sha256(data).hexdigest()


def _replace(building: Path, directory: Path) -> None:
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
        os.replace(directory, old / "bundle")
        try:
            os.replace(building, directory)
        except OSError:
            os.replace(old / "bundle", directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(building, directory)


def _texts(lowered: Lowered, ranks: Iterable[int] | None) -> dict[str, str]:
    """All text files by name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("meshwright.codegen"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    edges = edge_names(lowered)
    manifest = manifest_of(lowered, edges)
    files: dict[str, str] = {}
    for stage in lowered.stages:
        view = stage_view(lowered, stage, edges)
        files[f"stages/stage_{stage.index}.py"] = environment.get_template("stage.py.j2").render(view=view)
    for rank in _ranks(lowered, ranks):
        files[f"ranks/rank_{rank:04d}.py"] = environment.get_template("rank.py.j2").render(**_rank(lowered, rank))
    files["train.py"] = environment.get_template("train.py.j2").render(**_train(lowered))
    manifest["files"] = {name: digest(text.encode()) for name, text in files.items()}
    files["manifest.json"] = _json(manifest)
    return files


def _json(manifest: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of the second level: to be read and compared."""
    parts = []
    for key, value in manifest.items():
        if (
            isinstance(value, dict)
            and value
            and all(isinstance(v, (dict, str)) for v in value.values())
            and key not in ("versions",)
        ):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        elif isinstance(value, list) and value:
            rows = ",\n".join(f"    {json.dumps(v, ensure_ascii=False)}" for v in value)
            parts.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _ranks(lowered: Lowered, ranks: Iterable[int] | None) -> list[int]:
    count = lowered.mesh.num_ranks
    if ranks is None:
        return list(range(count)) if count <= MAX_RANK_FILES else _roles(lowered)
    chosen = list(ranks)
    for rank in chosen:
        if not 0 <= rank < count:
            raise PlanError(f"ranks={chosen} names rank {rank}: {lowered.mesh} has ranks 0 to {count - 1}")
    return chosen


def _roles(lowered: Lowered) -> list[int]:
    """One rank of every pipeline rank."""
    return [lowered.mesh.rank({"pp": place}) for place in range(lowered.mesh.size("pp"))]


def _rank(lowered: Lowered, rank: int) -> dict[str, Any]:
    mesh, placement = lowered.mesh, lowered.step.placement
    at = mesh.coordinates(rank)
    stages = stages_on(placement, at.get("pp", 0))
    peers = [mesh.rank({**at, "pp": place}) for place in placement]
    actions, kind = lowered.step.rows[at.get("pp", 0)], peers_of(stages)
    if kind == "rank":
        actions = to_ranks(actions, peers)
    return {
        "rank": rank,
        "num_ranks": mesh.num_ranks,
        "stages": stages,
        "num_stages": len(lowered.stages),
        "coordinates": list(at.items()),
        "groups": [(axis, mesh.group(rank, axis)) for axis in at],
        "schedule": _schedule_lines(render(actions, kind)),
        "legend": wrapped(_legend(actions, kind, peers)),
    }


def _legend(actions: Sequence[Action], kind: Peers, peers: Sequence[int]) -> str:
    """What the schedule says, by its own actions."""
    forward = next(action for action in actions if action.kind == "F" and action.runs)
    kinds = {action.kind: action for action in reversed(actions) if action.stage == forward.stage}
    shown = [f"{forward.name} runs the forward of {_what(forward)}"]
    shown += [f"{kinds[each].name} its {KINDS[each]}" for each in ("B", "I", "W") if each in kinds]
    lines = [", ".join(shown)]
    sending = next((a for a in actions if a.sends), None)
    receiving = next((a for a in actions if a.receives and a.runs), None)
    early = next((a for a in actions if a.receives and not a.runs), None)
    if sending is not None:
        one = render([replace(sending, sends=sending.sends[:1])], kind)
        lines.append(f"{one} sends the result to {_peer(sending.sends[0], kind, peers)}")
    if receiving is not None:
        one = render([replace(receiving, receives=receiving.receives[:1], sends=())], kind)
        lines.append(f"{one} first receives from {_peer(receiving.receives[0], kind, peers)}")
    if early is not None:
        one = render([early], kind)
        lines.append(f"{one} begins to receive from {_peer(early.receives[0], kind, peers)} what {early.name} takes")
    starts = ". A send and the receive that follows it start together." if len(lines) > 1 else "."
    return "; ".join(lines) + starts


def _what(action: Action) -> str:
    return f"microbatch {action.microbatch}" + ("" if action.stage is None else f" through stage {action.stage}")


def _peer(number: int, kind: Peers, peers: Sequence[int]) -> str:
    return f"rank {number}" if kind == "rank" else f"stage {number} on rank {peers[number]}"


def _schedule_lines(text: str, width: int = 100) -> list[str]:
    """A schedule as string literals of bounded length."""
    lines, current = [], ""
    for word in text.split("  "):
        if current and len(current) + len(word) + 2 > width:
            lines.append(current + "  ")
            current = ""
        current = f"{current}  {word}" if current else word
    return [f'"{line}"' for line in [*lines, current]]


def _train(lowered: Lowered) -> dict[str, Any]:
    return {
        "model": " ".join(lowered.capture.model.split()),
        "mesh": str(lowered.mesh),
        "num_ranks": lowered.mesh.num_ranks,
        "data": _data(lowered),
    }


def _data(lowered: Lowered) -> list[str]:
    """Synthetic data of the example's shapes and ranges."""
    lines, names = [], []
    for leaf in lowered.capture.inputs:
        value = leaf.example
        name = leaf.name
        if not isinstance(value, torch.Tensor):
            lines.append(f"{name} = {value!r}")
        elif value.is_floating_point():
            lines.append(f"{name} = torch.randn({tuple(value.shape)}, generator=generator, dtype={value.dtype})")
        elif value.dtype == torch.bool:
            lines.append(f"{name} = torch.ones({tuple(value.shape)}, dtype=torch.bool)")
        else:
            high = _high(lowered, value)
            lines.append(
                f"{name} = torch.randint({high}, {tuple(value.shape)}, generator=generator, dtype={value.dtype})"
            )
        names.append(name)
    if {"input_ids", "labels"} <= set(names):
        lines = [line for line in lines if not line.startswith("labels = ")]
        pairs = [f'"{n}": {"input_ids" if n == "labels" else n}' for n in names]
    else:
        pairs = [f'"{n}": {n}' for n in names]
    tree = f"{{{', '.join(pairs)}}}" if lowered.capture.input_tree == "dict" else f"({', '.join(names)},)"
    return [*lines, f"return {tree}"]


def _high(lowered: Lowered, value: torch.Tensor) -> int:
    """An exclusive bound for synthetic integers: the rows of the first table, or what the example has."""
    if value.is_meta or value.numel() == 0:
        return 2
    tables = [p.shape[0] for p in lowered.capture.parameters.values() if len(p.shape) == 2]
    high = int(value.max()) + 1
    return min((t for t in tables if t >= high), default=max(high, 2)) if high > 2 else max(high, 2)
