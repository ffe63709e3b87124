"""A rank's parameters: what ``param`` in a stage file declares, checked against the manifest and cut from the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups
from meshwright.runtime.layout import Piece, Split, parse, piece_of
from meshwright.runtime.random import Draws, Random
from meshwright.runtime.weights import Weights

Segment = tuple[int, int, int]
"""(dim, start, length): a part of a parameter that has types of its own."""


@dataclass(slots=True, kw_only=True, eq=False)
class Held:
    """One declared parameter, or segment of one, on this rank.

    parameter: the piece in use. piece: where it lies in the whole. pending: axes over which its gradient is to be
    summed. scattered: whether it rests in pieces over dp (ZeRO-3). stages: those of this rank that declared it.
    holders: all pipeline ranks that hold it. types: as declared.
    """

    name: str
    segment: Segment | None
    parameter: nn.Parameter
    piece: Piece
    pending: tuple[str, ...]
    scattered: bool
    stages: list[int]
    holders: tuple[int, ...]
    trainable: bool
    types: Mapping[str, str]

    @property
    def label(self) -> str:
        """The name for optimizers and messages; a segment of dim 0 is ``name[start:stop]``."""
        if self.segment is None:
            return self.name
        dim, start, length = self.segment
        return f"{self.name}[{':, ' * dim}{start}:{start + length}]"


@dataclass(slots=True, kw_only=True)
class Declared:
    """What the stage files of a rank declared so far; what several of its stages use is there once.

    placement: the pipeline rank of every stage. ``source``: of parameters; ``own``: the bundle's weights.
    """

    manifest: Mapping[str, Any]
    placement: Sequence[int]
    groups: Groups
    source: Weights
    own: Weights
    draws: Draws = field(init=False)
    held: dict[tuple[str, Segment | None], Held] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draws = Draws(groups=self.groups, exact=self.manifest["plan"].get("random") == "exact")

    def check_complete(self, stage: int) -> None:
        """Raises BundleError for a parameter that the manifest places on a stage and its file does not declare."""
        for name, entry in self.manifest["parameters"].items():
            parts: list[Segment | None] = [_segment(part) for part in entry.get("segments", ())] or [None]
            declared = [one.stages for part in parts if (one := self.held.get((name, part))) is not None]
            if stage in entry["stages"] and sum(stage in stages for stages in declared) < len(parts):
                raise BundleError(
                    f"{name!r} is on stage {stage} in the manifest, and the stage file does not declare "
                    f"{'all its segments' if entry.get('segments') else 'it'}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """The ``param`` of the file of ``stage``: declares parameters and buffers by the model's own names."""

    declared: Declared
    stage: int
    prefix: str = ""
    types: Mapping[str, str] = field(default_factory=dict)

    def typed(self, **types: str) -> "Param":
        """The same with types that hold for every parameter declared through it, unless one says otherwise itself."""
        return replace(self, types={**self.types, **types})

    def scope(self, path: str) -> "Param":
        """The same for the parameters below the module ``path``."""
        return replace(self, prefix=f"{self.prefix}{path}.")

    def __call__(
        self, name: str, shape: Sequence[int], *, segment: Sequence[int] | None = None, **types: str
    ) -> nn.Parameter:
        """This rank's piece in use of the parameter ``name`` of whole ``shape``, or of its ``segment``.

        types: axis -> type at rest and in use; an axis without is "I". The same name gives the same piece again.
        Raises BundleError where the manifest says otherwise.
        """
        full = self.prefix + name
        entry = self._entry("parameters", full, shape)
        part = _triple(segment)
        promised = self._promised(full, entry, part)
        self._check_types(full, {**self.types, **types}, promised)
        if (full, part) not in self.declared.held:
            self.declared.held[full, part] = self._held(full, entry, part, promised)
        held = self.declared.held[full, part]
        if self.stage not in held.stages:
            held.stages.append(self.stage)
        return held.parameter

    def buffer(self, name: str, shape: Sequence[int], **types: str) -> torch.Tensor:
        """This rank's piece of the buffer ``name`` of whole ``shape``. types: how it is split, by axis.

        Raises BundleError where the manifest says otherwise or has no value for it.
        """
        full = self.prefix + name
        entry = self._entry("buffers", full, shape)
        promised = entry.get("types", {})
        self._check_types(full, types, promised)
        if full not in self.declared.buffers:
            groups = self.declared.groups
            used = {axis: parse(text)[1] for axis, text in promised.items() if groups.size(axis) > 1}
            piece = piece_of(entry["shape"], None, used, groups.coordinates, groups.sizes)
            # A checkpoint that the user names need not have the buffers that are never saved.
            source = next((s for s in (self.declared.source, self.declared.own) if full in s.files), self.declared.own)
            if full not in source.files and "init" in entry:
                value = source.read(full, entry, piece)
            else:
                value = source.stored(full, piece, getattr(torch, entry["dtype"]))
            self.declared.buffers[full] = value.to(groups.device)
        return self.declared.buffers[full]

    def random(self, name: str, **types: str) -> Random:
        """What the random operator ``name`` draws from. types: how its whole tensor is split, by axis.

        Raises BundleError where the manifest says otherwise.
        """
        full = self.prefix + name
        entry = self.declared.manifest.get("random", {}).get(full)
        if entry is None:
            raise BundleError(f"the stage file draws from {full!r}, which the manifest does not have")
        if types != entry["types"]:
            raise BundleError(
                f"{full}: the stage file draws a tensor split as {types}, the manifest says {entry['types']}"
            )
        batch_first = sorted(types.items(), key=lambda item: item[0] not in ("dp", "mb"))
        splits = tuple((axis, split) for axis, text in batch_first if isinstance(split := parse(text)[1], Split))
        return Random(draws=self.declared.draws, site=entry["site"], splits=splits)

    def _held(self, full: str, entry: Mapping[str, Any], part: Segment | None, types: Mapping[str, str]) -> Held:
        groups = self.declared.groups
        read = {axis: parse(text) for axis, text in types.items() if groups.size(axis) > 1}
        used = {axis: use for axis, (_, use) in read.items()}
        piece = piece_of(entry["shape"], part, used, groups.coordinates, groups.sizes)
        trainable = bool(entry.get("trainable", True))
        value = self.declared.source.read(full, entry, piece)
        return Held(
            name=full,
            segment=part,
            parameter=nn.Parameter(value.to(groups.device), requires_grad=trainable),
            piece=piece,
            pending=tuple(axis for axis in groups.sizes if used.get(axis) == "R" and trainable),
            scattered="dp" in read and isinstance(read["dp"][0], Split) and used["dp"] == "R",
            stages=[],
            holders=tuple(sorted({self.declared.placement[stage] for stage in entry["stages"]})),
            trainable=trainable,
            types=types,
        )

    def _entry(self, kind: str, full: str, shape: Sequence[int]) -> Mapping[str, Any]:
        entries: Mapping[str, Mapping[str, Any]] = self.declared.manifest[kind]
        if full not in entries:
            raise BundleError(f"the stage file declares {full!r}, which is not among the manifest's {kind}")
        entry = entries[full]
        if list(shape) != list(entry["shape"]):
            raise BundleError(f"{full}: the stage file says shape {tuple(shape)}, the manifest {tuple(entry['shape'])}")
        if self.stage not in entry["stages"]:
            raise BundleError(
                f"{full}: the file of stage {self.stage} declares it, "
                f"the manifest has it on stages {', '.join(map(str, entry['stages'])) or 'none'}"
            )
        return entry

    def _promised(self, full: str, entry: Mapping[str, Any], part: Segment | None) -> dict[str, str]:
        """The manifest's types of a parameter or segment. Raises BundleError for a segment that it does not have."""
        types: dict[str, str] = dict(entry["types"])
        segments = {_segment(s): s["types"] for s in entry.get("segments", ())}
        if part is None and not segments:
            return types
        if part not in segments:
            have = ", ".join(map(str, segments)) or "none"
            raise BundleError(f"{full}: the stage file declares the segment {part}, the manifest's segments are {have}")
        return {**types, **segments[part]}

    def _check_types(self, full: str, given: Mapping[str, str], promised: Mapping[str, str]) -> None:
        for axis in sorted({*given, *promised}):
            said, known = given.get(axis, "I"), promised.get(axis, "I")
            if self.declared.groups.size(axis) > 1 and parse(said) != parse(known):
                raise BundleError(
                    f"{full}: the stage file says {axis}={said!r}, the manifest {axis}={known!r}\n"
                    "  types of parameters are decided when compiling: pin them and compile again"
                )


def whole(entry: Mapping[str, Any]) -> Piece:
    """All of a tensor."""
    return piece_of(entry["shape"], None, {}, {}, {})


def _segment(part: Mapping[str, Any]) -> Segment:
    return part["dim"], part["start"], part["length"]


def _triple(segment: Sequence[int] | None) -> Segment | None:
    if segment is None:
        return None
    dim, start, length = segment
    return dim, start, length
