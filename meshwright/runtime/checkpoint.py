"""Checkpoints of one layout, with torch.distributed.checkpoint: every rank's own pieces under its own keys."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from meshwright.runtime.errors import BundleError

if TYPE_CHECKING:
    from meshwright.runtime.trainer import Trainer


def save(trainer: "Trainer", path: Path) -> None:
    """Write the state of all ranks to ``path``."""
    optimizer = trainer.optimizer.state_dict()
    state: dict[str, Any] = {
        f"{_prefix(trainer)}/parameters/{k}": p.detach() for k, p in enumerate(_parameters(trainer))
    }
    for index, entries in optimizer["state"].items():
        state |= {f"{_prefix(trainer)}/optimizer/{index}/{key}": value for key, value in entries.items()}
    state[f"{_prefix(trainer)}/groups"] = optimizer["param_groups"]
    state["meshwright"] = {"layout": layout(trainer.manifest), "num_steps": trainer.num_steps, "seed": trainer.seed}
    state_dict_saver.save(state, checkpoint_id=str(path))


def load(trainer: "Trainer", path: Path) -> None:
    """Read the state that ``save`` wrote. Raises BundleError for another layout."""
    reader = filesystem.FileSystemReader(str(path))
    try:
        metadata: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise BundleError(f"{path} is no checkpoint: {error}") from error
    head: dict[str, Any] = {"meshwright": {}}
    _read(head, metadata, "meshwright", path)
    known = _unflattened(head, "meshwright")
    if known.get("layout") != layout(trainer.manifest):
        raise BundleError(
            f"{path} was saved under another layout (mesh, ZeRO or types of parameters differ)\n"
            "  continue with the bundle that wrote it; export full_state_dict() to move the weights"
        )
    state: dict[str, Any] = {}
    _read(state, metadata, _prefix(trainer), path)
    with torch.no_grad():
        for k, parameter in enumerate(_parameters(trainer)):
            parameter.copy_(state[f"{_prefix(trainer)}/parameters/{k}"])
    entries: dict[int, dict[str, Any]] = {}
    start = f"{_prefix(trainer)}/optimizer/"
    for key, value in state.items():
        if key.startswith(start):
            index, _, name = key.removeprefix(start).partition("/")
            entries.setdefault(int(index), {})[name] = value
    groups = _unflattened(state, f"{_prefix(trainer)}/groups")
    trainer.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    for work in [work for unit in trainer.units if (work := unit.updated()) is not None]:
        work.wait()
    trainer.num_steps = known["num_steps"]


def layout(manifest: Mapping[str, Any]) -> str:
    """A digest of everything that decides which rank holds what."""
    parts = [
        manifest["mesh"],
        manifest["plan"]["zero"],
        manifest["parameters"],
        [s["ranks"] for s in manifest["stages"]],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _prefix(trainer: "Trainer") -> str:
    return f"rank_{trainer.rank}"


def _parameters(trainer: "Trainer") -> list[torch.Tensor]:
    """What this rank keeps between steps: the pieces that the optimizer updates, then frozen parameters."""
    pieces: list[torch.Tensor] = [piece for unit in trainer.units for _, piece in unit.pieces]
    return [*pieces, *(h.parameter for h in trainer.declared.held if not h.trainable)]


def _read(state: dict[str, Any], metadata: Mapping[str, Any], prefix: str, path: Path) -> None:
    """Read all entries below ``prefix`` into ``state``."""
    state.clear()
    for key, entry in metadata.items():
        if key == prefix or key.startswith((f"{prefix}/", f"{prefix}.")):
            if isinstance(entry, TensorStorageMetadata):
                state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            elif isinstance(entry, BytesStorageMetadata):
                state[key] = None
    if not state:
        raise BundleError(f"{path} has no entries for {prefix}: it was saved by fewer ranks")
    state_dict_loader.load(state, checkpoint_id=str(path))


def _unflattened(state: Mapping[str, Any], prefix: str) -> Any:
    """A nested value that torch.distributed.checkpoint flattened to keys joined with dots."""
    if prefix in state:
        return state[prefix]
    below: dict[str, Any] = {}
    for key in state:
        if key.startswith(f"{prefix}."):
            below.setdefault(key.removeprefix(f"{prefix}.").split(".")[0], None)
    values = {name: _unflattened(state, f"{prefix}.{name}") for name in below}
    return [values[str(i)] for i in range(len(values))] if values and all(k.isdigit() for k in values) else values
