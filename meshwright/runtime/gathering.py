"""Whole tensors on every rank, by the model's names: for looking, comparing and exporting."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from meshwright.runtime.errors import RankError
from meshwright.runtime.groups import Groups, coordinates_of, num_ranks
from meshwright.runtime.layout import Piece, parse, piece_of
from meshwright.runtime.parameters import Held, Weights

TOLERANCE = 1e-6


def gather(
    manifest: Mapping[str, Any], groups: Groups, held: Sequence[Held], local: Mapping[int, torch.Tensor], what: str
) -> dict[str, torch.Tensor]:
    """The whole tensor of every parameter that has a local one, assembled from one holder of every piece.

    Raises RankError with the name of a parameter on which ranks that must agree differ by more than 1e-6 (relative).
    """
    mine = {(h.name, h.segment): local[id(h)] for h in held if id(h) in local}
    whole: dict[str, torch.Tensor] = {}
    different: list[str] = []
    for name, entry in manifest["parameters"].items():
        if not entry["stages"] or (what == "gradient" and not entry.get("trainable", True)):
            continue
        result = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=groups.device)
        for part in entry.get("segments") or [None]:
            segment = (part["dim"], part["start"], part["length"]) if part else None
            types = {**entry["types"], **(part["types"] if part else {})}
            different += _fill(result, name, segment, types, entry, groups, mine)
        whole[name] = result
    _raise_together(different, groups, what)
    return whole


def _fill(
    result: torch.Tensor,
    name: str,
    segment: tuple[int, int, int] | None,
    types: Mapping[str, str],
    entry: Mapping[str, Any],
    groups: Groups,
    mine: Mapping[tuple[str, Any], torch.Tensor],
) -> list[str]:
    """Place every distinct piece, sent by the first rank that holds it, and compare it with one's own."""
    use = {axis: parse(text)[1] for axis, text in types.items()}
    seen: dict[tuple[Any, ...], tuple[int, Piece]] = {}
    own: tuple[Any, ...] | None = None
    for rank in range(num_ranks(groups.sizes)):
        at = coordinates_of(groups.sizes, rank)
        if at.get("pp", 0) not in entry["stages"]:
            continue
        piece = piece_of(entry["shape"], segment, use, at, groups.sizes)
        seen.setdefault(piece.runs, (rank, piece))
        if rank == groups.rank:
            own = piece.runs
    different = []
    for runs, (rank, piece) in seen.items():
        held = mine.get((name, segment)) if runs == own else None
        value = (
            held.detach().clone().contiguous()
            if held is not None and rank == groups.rank
            else result.new_empty(piece.local_shape)
        )
        if num_ranks(groups.sizes) > 1:
            dist.broadcast(value, src=rank)
        piece.place(value, result)
        if held is not None and rank != groups.rank:
            scale = value.abs().max() if value.numel() else 0
            if value.numel() and not bool((held - value).abs().max() <= TOLERANCE * scale + 1e-12):
                different.append(f"{name} (rank {groups.rank} against rank {rank})")
    return different


def _raise_together(different: list[str], groups: Groups, what: str) -> None:
    found: list[list[str]] = [different]
    if num_ranks(groups.sizes) > 1:
        found = [[] for _ in range(num_ranks(groups.sizes))]
        dist.all_gather_object(found, different)
    names = [name for rank in found for name in rank]
    if names:
        raise RankError(
            f"the {what}s of replicas that must agree differ: {', '.join(names[:5])}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}\n"
            "  a conversion is missing in a stage file (see the types in its margins), or replicas were "
            "fed different data"
        )


def gather_buffers(
    manifest: Mapping[str, Any], groups: Groups, local: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The persistent buffers, each sent by the first rank that holds it."""
    whole: dict[str, torch.Tensor] = {}
    for name, entry in manifest["buffers"].items():
        if not entry["persistent"]:
            continue
        source = next(
            r for r in range(num_ranks(groups.sizes)) if coordinates_of(groups.sizes, r).get("pp", 0) in entry["stages"]
        )
        empty = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=groups.device)
        whole[name] = local[name].clone() if source == groups.rank else empty
        if num_ranks(groups.sizes) > 1:
            dist.broadcast(whole[name], src=source)
    return whole


def complete(manifest: Mapping[str, Any], whole: dict[str, torch.Tensor], source: Weights) -> dict[str, torch.Tensor]:
    """Add what no stage uses, as it was at the start, and the further names of tied tensors."""
    for name, entry in manifest["parameters"].items():
        if name not in whole:
            piece = piece_of(entry["shape"], None, {}, {}, {})
            whole[name] = source.read(name, piece, getattr(torch, entry["dtype"]), entry.get("init"))
        for alias in entry.get("aliases", ()):
            whole[alias] = whole[name]
    return whole
