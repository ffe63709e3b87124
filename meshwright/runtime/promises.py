"""What a manifest promises, checked before anything relies on it: sizes, types, edges and schedules fit each other."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meshwright.runtime.actions import parse as parse_schedule
from meshwright.runtime.actions import stages_on
from meshwright.runtime.errors import BundleError, PlanError
from meshwright.runtime.groups import coordinates_of, placement_of
from meshwright.runtime.layout import Split, largest_piece, parse, suffices

KEYS = ("mesh", "plan", "inputs", "loss", "stages", "schedule", "buffers", "parameters")

RESHARD = ("step", "microbatch")
"""What ZeRO-2 and 3 are whole for: a step, or each microbatch; a manifest without says the latter."""


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises BundleError with the first contradiction."""
    missing = [key for key in KEYS if key not in manifest]
    if missing:
        raise BundleError(f"it has no {', '.join(missing)}")
    _check_mesh(manifest)
    for name, entry in manifest["inputs"].items():
        _check_value(manifest, f"input {name!r}", entry)
    for index, stage in enumerate(manifest["stages"]):
        _check_stage(manifest, index, stage)
    _check_schedule(manifest)
    for kind in ("parameters", "buffers"):
        for name, entry in manifest[kind].items():
            _check_value(manifest, repr(name), entry)
            _check_stages(manifest, repr(name), entry["stages"])
            _check_pieces(manifest, name, entry)
    _check_sites(manifest)
    _check_stages(manifest, "the loss", [manifest["loss"]["stage"]])


def check_evaluation(manifest: Mapping[str, Any]) -> None:
    """Raises PlanError where what the loss is in eval mode is not known: with noise that is no dropout, and where
    it depends on what forward writes to buffers.
    """
    for name, entry in manifest.get("random", {}).items():
        if not entry["operator"].endswith("dropout"):
            raise PlanError(
                f"cannot evaluate: {name} draws noise ({entry['operator']} {entry['at']}), and the program was "
                "captured in training: whether the model draws it in eval mode too is not known\n"
                "  evaluate the model itself with the parameters of full_state_dict()"
            )
    for name, entry in manifest["buffers"].items():
        if "unknown_evaluation" in entry:
            raise PlanError(
                f"cannot evaluate: the loss depends on what forward writes to {name!r} "
                f"({entry['unknown_evaluation']}), or on statistics of the batch in it, and the program was "
                "captured in training: what the model computes in eval mode is not known\n"
                "  evaluate the model itself with the parameters of full_state_dict()"
            )


def _check_mesh(manifest: Mapping[str, Any]) -> None:
    mesh, stages = manifest["mesh"], manifest["stages"]
    for axis, size in mesh.items():
        if not isinstance(size, int) or size < 1:
            raise BundleError(f"the mesh has {axis}={size!r}: a size is a whole number from 1")
    if not isinstance(manifest["schedule"], list) or len(manifest["schedule"]) != mesh.get("pp", 1):
        raise BundleError(f"its schedule is not one row for each of the pp={mesh.get('pp', 1)} pipeline ranks")
    ranks = range(math.prod(mesh.values()))
    lines: dict[int, list[int]] = {place: [] for place in range(mesh.get("pp", 1))}
    for rank in ranks:
        lines[coordinates_of(mesh, rank).get("pp", 0)].append(rank)
    for index, stage in enumerate(stages):
        if stage["ranks"] not in lines.values():
            raise BundleError(f"stage {index} is on the ranks {stage['ranks']}, which are not those of one place on pp")
    for place, line in lines.items():
        if all(stage["ranks"] != line for stage in stages):
            raise BundleError(f"pipeline rank {place} has no stage")
    plan = manifest["plan"]
    if plan["zero"] not in range(4) or plan["microbatches"] < 1:
        raise BundleError(f"its plan has zero={plan['zero']!r} and microbatches={plan['microbatches']!r}")
    if plan.get("reshard", "microbatch") not in RESHARD:
        raise BundleError(f"its plan has reshard={plan['reshard']!r}, which is none of {', '.join(RESHARD)}")


def _check_value(manifest: Mapping[str, Any], what: str, entry: Mapping[str, Any]) -> None:
    """The dtype exists, the axes too, and a split dim is one of the shape's."""
    if not isinstance(getattr(torch, str(entry["dtype"]), None), torch.dtype):
        raise BundleError(f"{what} has the dtype {entry['dtype']!r}, which torch does not have")
    parts = [entry.get("types", {}), *(part["types"] for part in entry.get("segments", ()))]
    for axis, text in ((axis, text) for part in parts for axis, text in part.items()):
        if axis not in manifest["mesh"] and axis != "mb":
            raise BundleError(f"{what} has a type on {axis!r}, which is no axis of the mesh")
        for type_ in parse(text):
            if isinstance(type_, Split) and type_.dim >= max(1, len(entry["shape"])):
                raise BundleError(f"{what} of shape {entry['shape']} has the type {text!r} on {axis}: no such dim")


def _check_stages(manifest: Mapping[str, Any], what: str, stages: Sequence[int]) -> None:
    if any(stage not in range(len(manifest["stages"])) for stage in stages):
        raise BundleError(f"{what} is on stages {stages}, and there are {len(manifest['stages'])}")


def _check_stage(manifest: Mapping[str, Any], index: int, stage: Mapping[str, Any]) -> None:
    """What a stage receives another one sends, as the same."""
    stages = manifest["stages"]
    for name in stage["inputs"]:
        if name not in manifest["inputs"]:
            raise BundleError(f"stage {index} takes the input {name!r}, which the batch does not have")
    for name, edge in stage["receives"].items():
        _check_value(manifest, f"{name!r} for stage {index}", edge)
        source = edge["from"]
        sent = stages[source]["sends"].get(name) if source in range(index) else None
        if sent is None or index not in sent["to"]:
            raise BundleError(f"stage {index} receives {name!r} from stage {source}, which does not send it there")
        for key in ("shape", "dtype", "types"):
            if sent[key] != edge[key]:
                raise BundleError(f"{name!r} leaves stage {source} with {key} {sent[key]} and arrives as {edge[key]}")
        if sent.get("requires_grad", True) != edge.get("requires_grad", True):
            raise BundleError(f"{name!r}: stages {source} and {index} disagree whether its gradient comes back")
    for name, edge in stage["sends"].items():
        for peer in edge["to"]:
            if peer not in range(len(stages)) or name not in stages[peer]["receives"]:
                raise BundleError(f"stage {index} sends {name!r} to stage {peer}, which does not receive it")


def _check_schedule(manifest: Mapping[str, Any]) -> None:
    """Every stage has a forward and a whole backward, or one in two parts, of every microbatch, on its own ranks."""
    placement, microbatches = placement_of(manifest), range(manifest["plan"]["microbatches"])
    for place, text in enumerate(manifest["schedule"]):
        try:
            actions = [action for action in parse_schedule(text, "stage") if action.runs]
        except ValueError as error:
            raise BundleError(f"the schedule of pipeline rank {place}: {error}") from error
        own = stages_on(placement, place)
        kinds: defaultdict[tuple[int | None, int], str] = defaultdict(str)
        for action in actions:
            kinds[own[0] if action.stage is None and len(own) == 1 else action.stage, action.microbatch] += action.kind
        if set(kinds) != set(itertools.product(own, microbatches)) or not set(kinds.values()) <= {"FB", "FIW"}:
            raise BundleError(
                f"the schedule of pipeline rank {place} is not one forward and then one backward of each of "
                f"{len(microbatches)} microbatches through each of its stages: {text}"
            )


def _check_sites(manifest: Mapping[str, Any]) -> None:
    """Every random operator has a number of its own, and is split on axes that exist."""
    sites = manifest.get("random", {})
    if len({entry["site"] for entry in sites.values()}) != len(sites):
        raise BundleError("two of its random operators have the same site")
    for name, entry in sites.items():
        _check_stages(manifest, f"random operator {name!r}", entry["stages"])
        for axis, text in entry["types"].items():
            if (axis not in manifest["mesh"] and axis != "mb") or not isinstance(parse(text)[1], Split):
                raise BundleError(f"random operator {name!r} has the type {text!r} on {axis}, which does not split it")


def _check_pieces(manifest: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    """Every rank has a piece, equally large ones of groups; segments are parts of the whole and do not overlap."""
    shape = entry["shape"]
    segments = sorted(entry.get("segments", ()), key=lambda part: (part["dim"], part["start"]))
    for part, following in itertools.pairwise([*segments, None]):
        stop = part["start"] + part["length"]
        if stop > shape[part["dim"]] or (following and (following["dim"], following["start"]) < (part["dim"], stop)):
            raise BundleError(f"the segments of {name!r} of shape {shape} overlap or reach over its end")
    for part in segments or [None]:
        lengths = list(shape)
        if part is not None:
            lengths[part["dim"]] = part["length"]
        for axis, text in {**entry.get("types", {}), **(part["types"] if part else {})}.items():
            use, pieces = parse(text)[1], manifest["mesh"].get(axis, 1)
            if isinstance(use, Split):
                length = lengths[use.dim]
                if length % (use.groups * pieces) and (use.groups > 1 or not suffices(length, pieces)):
                    raise BundleError(
                        f"{name!r}: cannot cut dim {use.dim} of {lengths} by {text!r} over {axis}={pieces}"
                    )
                lengths[use.dim] = largest_piece(length, pieces)
