"""A rank's parameters: what ``param`` in a stage file declares, checked against the manifest and cut from the whole."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups
from meshwright.runtime.layout import Piece, Split, parse, piece_of

Segment = tuple[int, int, int]


@dataclass(slots=True, kw_only=True, eq=False)
class Held:
    """One declared parameter (or segment) on this rank.

    parameter: the piece in use. piece: where it lies in the whole. pending: axes over which its gradient is to be
    summed;
    scattered: whether it rests in pieces over dp (ZeRO-3). stages: all stages that hold it. scope: the module that
    declared it.
    """

    name: str
    segment: Segment | None
    parameter: nn.Parameter
    piece: Piece
    pending: tuple[str, ...]
    scattered: bool
    stages: tuple[int, ...]
    trainable: bool
    scope: str

    @property
    def label(self) -> str:
        """The name for optimizers and messages; a segment of dim 0 is ``name[start:stop]``."""
        if self.segment is None:
            return self.name
        dim, start, length = self.segment
        return f"{self.name}[{':, ' * dim}{start}:{start + length}]"


@dataclass(slots=True, kw_only=True)
class Declared:
    """What a stage declared so far."""

    manifest: Mapping[str, Any]
    groups: Groups
    source: "Weights"
    held: list[Held] = field(default_factory=list)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """The ``param`` of a stage file: declares parameters and buffers by the model's own names."""

    declared: Declared
    prefix: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    scope_name: str = ""

    def typed(self, **types: str) -> "Param":
        """The same with types that hold for every parameter declared through it, unless one says otherwise itself."""
        return replace(self, types={**self.types, **types})

    def scope(self, path: str) -> "Param":
        """The same for the parameters below ``path``; what is declared through it is one unit (of gathering, of
        buckets).
        """
        return replace(self, prefix=f"{self.prefix}{path}.", scope_name=f"{self.prefix}{path}")

    def __call__(
        self, name: str, shape: Sequence[int], *, segment: Segment | None = None, **types: str
    ) -> nn.Parameter:
        """The piece in use of a parameter of whole ``shape``. Raises BundleError where the manifest says otherwise."""
        full = self.prefix + name
        entry = self._entry("parameters", full)
        given = {**self.types, **types}
        self._check_shape(full, entry, shape)
        promised = dict(entry["types"])
        if segment is not None:
            matching = [s for s in entry.get("segments", ()) if (s["dim"], s["start"], s["length"]) == tuple(segment)]
            if not matching:
                raise BundleError(
                    f"{full}: the stage file declares the segment {tuple(segment)}, which the manifest does not have"
                )
            promised |= matching[0]["types"]
        elif entry.get("segments"):
            raise BundleError(f"{full}: the manifest has it in segments, the stage file declares it whole")
        groups = self.declared.groups
        differs = {a for a in {*given, *promised} if given.get(a, "I") != promised.get(a, "I") and groups.size(a) > 1}
        if differs:
            axis = sorted(differs)[0]
            raise BundleError(
                f"{full}: the stage file says {axis}={given.get(axis, 'I')!r}, the manifest "
                f"{axis}={promised.get(axis, 'I')!r}\n"
                "  the types of parameters are fixed at compilation: change them with pins and compile again"
            )
        read = {axis: parse(text) for axis, text in promised.items() if groups.size(axis) > 1}
        piece = piece_of(shape, segment, {a: use for a, (_, use) in read.items()}, groups.coordinates, groups.sizes)
        trainable = bool(entry.get("trainable", True))
        dtype = getattr(torch, entry["dtype"])
        value = self.declared.source.read(full, piece, dtype, entry.get("init")).to(groups.device)
        parameter = nn.Parameter(value, requires_grad=trainable)
        held = Held(
            name=full,
            segment=tuple(segment) if segment else None,  # type: ignore[arg-type]
            parameter=parameter,
            piece=piece,
            pending=tuple(a for a in groups.sizes if a in read and read[a][1] == "R" and trainable),
            scattered=any(a == "dp" and isinstance(rest, Split) and use == "R" for a, (rest, use) in read.items()),
            stages=tuple(entry["stages"]),
            trainable=trainable,
            scope=self.scope_name,
        )
        self.declared.held.append(held)
        return parameter

    def buffer(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A buffer of the model, whole. Raises BundleError where the manifest says otherwise."""
        full = self.prefix + name
        entry = self._entry("buffers", full)
        self._check_shape(full, entry, shape)
        piece = piece_of(shape, None, {}, {}, {})
        value = self.declared.source.read(full, piece, getattr(torch, entry["dtype"]), None, is_buffer=True)
        self.declared.buffers[full] = value.to(self.declared.groups.device)
        return self.declared.buffers[full]

    def _entry(self, kind: str, full: str) -> Mapping[str, Any]:
        entries: Mapping[str, Mapping[str, Any]] = self.declared.manifest[kind]
        if full not in entries:
            raise BundleError(f"the stage file declares {full!r}, which is not among the manifest's {kind}")
        return entries[full]

    def _check_shape(self, full: str, entry: Mapping[str, Any], shape: Sequence[int]) -> None:
        if list(shape) != list(entry["shape"]):
            raise BundleError(f"{full}: the stage file says shape {tuple(shape)}, the manifest {tuple(entry['shape'])}")


@dataclass(slots=True)
class Weights:
    """Where initial values come from: safetensors files, or a seed.

    From a seed every tensor is drawn whole, by its name alone, and cut: the same values on every mesh. How it is
    drawn is
    the manifest's ``init``, read off the model's own initialization; without one it is normal(0, 0.02), ones for the
    weights of norms, zeros for biases. complete: every parameter has to be in the files.
    """

    directory: Path | None
    seed: int
    complete: bool = False
    index: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.directory is None:
            return
        path = Path(self.directory)
        index = path / "index.json" if path.is_dir() else path
        if path.is_dir() and not index.exists():
            found = sorted(path.glob("*.index.json"))
            index = found[0] if found else index
        if index.exists() and index.suffix == ".json":
            weight_map = json.loads(index.read_text())["weight_map"]
            self.index = {name: index.parent / file for name, file in weight_map.items()}
            return
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(f.exists() for f in files):
            raise BundleError(f"{path} has no weights: a safetensors file, or a directory of them with an index")
        for file in files:
            with safe_open(file, "pt") as opened:
                self.index.update(dict.fromkeys(opened.keys(), file))

    def read(
        self, name: str, piece: Piece, dtype: torch.dtype, init: Mapping[str, Any] | None, is_buffer: bool = False
    ) -> torch.Tensor:
        """A piece of one tensor. Raises BundleError for a tensor that is missing or of another shape."""
        if name in self.index:
            with safe_open(self.index[name], "pt") as file:
                found = file.get_slice(name)
                if list(found.get_shape()) != list(piece.shape):
                    raise BundleError(
                        f"{name} has shape {tuple(found.get_shape())} in {self.index[name]}, the bundle {piece.shape}"
                    )
                single = all(len(runs) == 1 for runs in piece.runs)
                if single and piece.shape:
                    value = found[tuple(slice(*runs[0]) for runs in piece.runs)]
                else:
                    value = piece.cut(file.get_tensor(name))
                return value.to(dtype).contiguous().clone()  # type: ignore[no-any-return]
        if is_buffer:
            raise BundleError(
                f"the value of the buffer {name!r} is not in the bundle: emit it from a model with real buffers"
            )
        if self.complete:
            raise BundleError(f"{name!r} is not among the weights in {self.directory}")
        return piece.cut(self._draw(name, piece.shape, dtype, init)).clone()

    def _draw(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, init: Mapping[str, Any] | None
    ) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(shape, dtype=dtype)
        if init is not None:
            op, args = init["op"], init["args"]
            keywords = {} if op == "fill_" else {"generator": generator}
            return getattr(whole, op)(*args, **keywords)  # type: ignore[no-any-return]
        if len(shape) >= 2:
            return whole.normal_(0.0, 0.02, generator=generator)
        return whole.fill_(0.0 if name.endswith("bias") else 1.0)
