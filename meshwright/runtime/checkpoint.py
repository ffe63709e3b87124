"""Checkpoints for the same layout, with torch.distributed.checkpoint: parameters, buffers, optimizer, steps, seed."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from meshwright.runtime.errors import BundleError

if TYPE_CHECKING:
    from meshwright.runtime.trainer import Trainer

HEAD = "meshwright"
State = dict[str, torch.Tensor]


def save(trainer: "Trainer", path: Path) -> None:
    """Write the state of all ranks to the directory ``path``; what dp replicas share is written once."""
    optimizer = trainer.optimizer.state_dict()
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    others: dict[int, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, torch.Tensor) else others).setdefault(index, {})[key] = value
    state = {**_kept(trainer), HEAD: _packed(_head(trainer))}
    place = _place(trainer, "dp" in trainer.manifest["mesh"])
    state[f"{place}/optimizer"] = _packed({"param_groups": optimizer["param_groups"], "others": others})
    for index, entries in tensors.items():
        state |= {f"{place}/optimizer/{index}/{key}": value for key, value in entries.items()}
    trainer.groups.wire.save(state, str(path))


def load(trainer: "Trainer", path: Path) -> None:
    """Read what ``save`` wrote into the trainer. Raises BundleError for another layout or no checkpoint at all."""
    try:
        metadata = filesystem.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    except OSError as error:
        raise BundleError(f"{path} is no checkpoint: {error}") from error
    if HEAD not in metadata:
        raise BundleError(f"{path} is no checkpoint of a Trainer")
    head = _unpacked(_read(trainer, metadata, [HEAD], path)[HEAD])
    if head["layout"] != layout(trainer.manifest):
        raise BundleError(
            f"{path} was saved under another layout: mesh, ZeRO, stages or types of parameters differ\n"
            "  continue with the bundle that wrote it, or move the weights by full_state_dict()"
        )
    place = _place(trainer, "dp" in trainer.manifest["mesh"])
    kept = _kept(trainer)
    optimizer = [key for key in metadata if key == f"{place}/optimizer" or key.startswith(f"{place}/optimizer/")]
    state = _read(trainer, metadata, [*kept, *optimizer], path)
    with torch.no_grad():
        for key, tensor in kept.items():
            tensor.copy_(state[key])
    packed = _unpacked(state.pop(f"{place}/optimizer"))
    entries: dict[int, dict[str, Any]] = packed["others"]
    for key in optimizer:
        if key in state:
            index, name = key.removeprefix(f"{place}/optimizer/").split("/", 1)
            entries.setdefault(int(index), {})[name] = state[key]
    trainer.optimizer.load_state_dict({"state": entries, "param_groups": packed["param_groups"]})
    trainer.update()
    trainer.num_steps, trainer.seed = head["num_steps"], head["seed"]


def layout(manifest: Mapping[str, Any]) -> str:
    """A digest of everything that decides which rank holds what."""
    parts = [
        manifest["mesh"],
        manifest["plan"]["zero"],
        manifest["parameters"],
        {name: entry["types"] for name, entry in manifest["buffers"].items() if "types" in entry},
        [s["ranks"] for s in manifest["stages"]],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _head(trainer: "Trainer") -> dict[str, Any]:
    return {"layout": layout(trainer.manifest), "num_steps": trainer.num_steps, "seed": trainer.seed}


def _kept(trainer: "Trainer") -> State:
    """What a rank keeps between steps apart from the optimizer's state, by key. Replicas over dp use the same keys."""
    state: State = {}
    for number, unit in enumerate(trainer.units):
        state[f"{_place(trainer, unit.split)}/units/{number}"] = unit.rest
    for number, (_, gathered) in enumerate(trainer.frozen):
        state[f"{_place(trainer, True)}/frozen/{number}"] = gathered.rest
    gathered_names = {h.label for members, _ in trainer.frozen for h in members}
    for held in trainer.declared.held.values():
        if not held.trainable and held.label not in gathered_names:
            state[f"{_place(trainer, False)}/frozen/{held.label}"] = held.parameter.detach()
    for name, buffer in trainer.declared.buffers.items():
        state[f"{_place(trainer, False)}/buffers/{name}"] = buffer
    return state


def _place(trainer: "Trainer", with_dp: bool) -> str:
    """The coordinates as text, such as ``dp0.pp1.tp0``, or without dp."""
    at = trainer.groups.coordinates
    return ".".join(f"{axis}{index}" for axis, index in at.items() if with_dp or axis != "dp") or "all"


def _read(trainer: "Trainer", metadata: Mapping[str, Any], keys: list[str], path: Path) -> State:
    """Tensors of a checkpoint. Raises BundleError for a key that it does not have."""
    state: State = {}
    for key in keys:
        entry = metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise BundleError(f"{path} has no tensor {key!r}")
        state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    trainer.groups.wire.load(state, str(path))
    return state


def _packed(value: Any) -> torch.Tensor:
    """Plain data as bytes: the checkpoint would take containers apart."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
