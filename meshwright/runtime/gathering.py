"""Whole tensors on every rank, by the model's names: for looking, comparing and exporting."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from meshwright.runtime.errors import RankError
from meshwright.runtime.groups import Groups, num_ranks, rank_at
from meshwright.runtime.layout import Piece, Split, parse, piece_of
from meshwright.runtime.parameters import Segment, whole
from meshwright.runtime.weights import Weights

TOLERANCE = 1e-6
"""How much replicas that must agree may differ, relative to the largest element."""

Local = Mapping[tuple[str, Segment | None], torch.Tensor]
"""A rank's pieces by name and segment."""


def gather(
    entries: Mapping[str, Any], placement: Sequence[int], groups: Groups, names: Iterable[str], local: Local, what: str
) -> dict[str, Any]:
    """The whole tensor of every parameter or buffer in ``names``, put together from one holder of every piece.

    entries: the manifest's. placement: the pipeline rank of every stage. Raises RankError with the names of those on
    which ranks that must agree differ by more than 1e-6 (relative).
    """
    result: dict[str, torch.Tensor] = {}
    different: list[str] = []
    for name in names:
        entry = entries[name]
        result[name] = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=groups.device)
        for part in entry.get("segments") or [None]:
            segment = (part["dim"], part["start"], part["length"]) if part else None
            types = {**entry.get("types", {}), **(part["types"] if part else {})}
            mine = local.get((name, segment))
            holders = [placement[stage] for stage in entry["stages"]]
            for rank, piece, is_mine in _pieces(entry, holders, segment, types, groups):
                value = _sent(mine if is_mine else None, piece, rank, result[name], groups)
                piece.place(value, result[name])
                if is_mine and mine is not None and not _agree(mine, value):
                    different.append(f"{name} (rank {groups.rank} against rank {rank})")
    _raise_together(different, groups, what)
    return result


def _pieces(
    entry: Mapping[str, Any],
    holders: Sequence[int],
    segment: Segment | None,
    types: Mapping[str, str],
    groups: Groups,
) -> list[tuple[int, Piece, bool]]:
    """Every distinct piece with the first rank that holds it, and whether this rank holds the same one."""
    used = {axis: parse(text)[1] for axis, text in types.items()}
    axes = [axis for axis in groups.sizes if isinstance(used.get(axis), Split)]
    first = {axis: 0 for axis in groups.sizes} | ({"pp": holders[0]} if "pp" in groups.sizes else {})
    found = []
    for indices in itertools.product(*(range(groups.sizes[axis]) for axis in axes)):
        at = first | dict(zip(axes, indices, strict=True))
        piece = piece_of(entry["shape"], segment, used, at, groups.sizes)
        mine = groups.index("pp") in holders and all(groups.index(axis) == at[axis] for axis in axes)
        found.append((rank_at(groups.sizes, at), piece, mine))
    return found


def _sent(mine: torch.Tensor | None, piece: Piece, rank: int, like: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A piece on every rank, sent by ``rank``."""
    own = mine is not None and rank == groups.rank
    value = mine.detach().clone().contiguous() if own and mine is not None else like.new_empty(piece.local_shape)
    if num_ranks(groups.sizes) > 1 and value.numel():
        groups.wire.world.broadcast(value, rank)
    return value


def _agree(mine: torch.Tensor, sent: torch.Tensor) -> bool:
    if not (sent.is_floating_point() or sent.is_complex()):
        return torch.equal(mine, sent)
    limit = TOLERANCE * float(sent.abs().amax()) if sent.numel() else 0.0
    return torch.allclose(mine, sent, rtol=0.0, atol=limit + 1e-12, equal_nan=True)


def _raise_together(different: list[str], groups: Groups, what: str) -> None:
    """Raise on every rank what any of them found."""
    found = [different]
    if num_ranks(groups.sizes) > 1:
        found = groups.wire.world.gather_objects(different)
    names = [name for rank in found for name in rank]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise RankError(
            f"the {what}s of replicas that must agree differ: {', '.join(names[:5])}{more}\n"
            "  a conversion is missing in a stage file (see the types in its margin), or replicas got different data"
        )


def complete(manifest: Mapping[str, Any], found: dict[str, torch.Tensor], source: Weights) -> dict[str, torch.Tensor]:
    """Add what no stage uses, as it was at the start, and the further names of what is tied."""
    for name, entry in manifest["parameters"].items():
        if name not in found:
            found[name] = source.read(name, entry, whole(entry))
    for name, entry in manifest["buffers"].items():
        if entry["persistent"] and name not in found and (name in source.files or "init" in entry):
            found[name] = source.read(name, entry, whole(entry))
    for name, entry in [*manifest["parameters"].items(), *manifest["buffers"].items()]:
        for alias in entry.get("aliases", ()) if name in found else ():
            found[alias] = found[name]
    return found
