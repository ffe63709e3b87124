"""Where initial values come from: safetensors files, or a seed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from meshwright.runtime.errors import BundleError
from meshwright.runtime.layout import Piece

DRAWN_AT_ONCE = 2**22
"""Elements of a tensor that are drawn together, and the reach of one generator."""

FILLS: Mapping[str, bool] = {"normal_": True, "uniform_": True, "fill_": False}
"""The ways to fill a tensor that a manifest may name -> whether they draw random numbers."""


@dataclass(slots=True)
class Weights:
    """The values of a model's tensors by name, from safetensors in ``directory`` (or one file) or else from ``seed``.

    Only the slices that are asked for are read. complete: every parameter has to be in the files, else those that are
    not are drawn. From a seed a tensor depends on seed, name, shape and dtype alone, so that every mesh begins with the
    same values. How it is filled is the manifest's ``init``, read off the model's own initialization; without one:
    normal(0, 0.02) for two and more dims, 0 for biases, 1 for other vectors and scalars (the weights of norms).
    Raises BundleError for a directory without weights.
    """

    directory: Path | None
    seed: int
    complete: bool = False
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.directory is None:
            return
        path = self.directory
        indexes = [path / "index.json", *path.glob("*.safetensors.index.json")]
        for index in [path] if path.suffix == ".json" else indexes:
            if index.exists():
                weight_map = json.loads(index.read_text())["weight_map"]
                self.files = {name: index.parent / file for name, file in weight_map.items()}
                return
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found or not all(file.exists() for file in found):
            raise BundleError(f"{path} has no weights: give a safetensors file, or a directory of them")
        for file in found:
            with safe_open(file, "pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str, entry: Mapping[str, Any], piece: Piece) -> torch.Tensor:
        """A piece of the parameter with this entry in the manifest, on the CPU. Raises BundleError."""
        dtype = getattr(torch, entry["dtype"])
        known = [n for n in (name, *entry.get("aliases", ())) if n in self.files]
        if known or self.complete:
            return self.stored(known[0] if known else name, piece, dtype)
        return _draw(f"{self.seed}:{name}", piece, dtype, entry.get("init"))

    def stored(self, name: str, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        """A piece of a tensor in a file, on the CPU. Raises BundleError for one that is missing or of another shape."""
        if name not in self.files:
            raise BundleError(f"{name!r} is not among the weights in {self.directory or 'the bundle, which has none'}")
        with safe_open(self.files[name], "pt") as file:
            found = file.get_slice(name)
            if tuple(found.get_shape()) != piece.shape:
                raise BundleError(
                    f"{name} has shape {tuple(found.get_shape())} in {self.files[name]}, in the manifest {piece.shape}"
                )
            value = _sliced(found, piece, ()) if piece.shape else file.get_tensor(name)
            return value.to(dtype).contiguous()


def _sliced(found: Any, piece: Piece, chosen: tuple[slice, ...]) -> torch.Tensor:
    """Read the runs of a piece, dim after dim."""
    dim = len(chosen)
    if dim == len(piece.runs):
        return found[chosen]  # type: ignore[no-any-return]
    parts = [_sliced(found, piece, (*chosen, slice(*run))) for run in piece.runs[dim]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _draw(key: str, piece: Piece, dtype: torch.dtype, init: Mapping[str, Any] | None) -> torch.Tensor:
    """Fill block by block of the rows, each with a generator of its own, and keep what lies in the piece."""
    op, args = (init["op"], init["args"]) if init else _default(key, piece.shape)
    if op not in FILLS:
        raise BundleError(f"cannot initialize by {op!r}: a manifest may name {', '.join(FILLS)}")
    shape, runs = piece.shape or (1,), piece.runs or (((0, 1),),)
    inner = Piece(shape=shape[1:], runs=runs[1:])
    height = max(1, DRAWN_AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
    parts = [torch.empty((0, *inner.local_shape), dtype=dtype)]
    for number, top in enumerate(range(0, shape[0], height)):
        bottom = min(top + height, shape[0])
        rows = [(max(start, top), min(stop, bottom)) for start, stop in runs[0] if start < bottom and stop > top]
        if not rows:
            continue
        block = torch.empty((bottom - top, *shape[1:]), dtype=dtype)
        digest = hashlib.sha256(f"{key}:{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        getattr(block, op)(*args, **({"generator": generator} if FILLS[op] else {}))
        cut = Piece(shape=(bottom - top, *shape[1:]), runs=(tuple((a - top, b - top) for a, b in rows), *inner.runs))
        parts.append(cut.cut(block))
    return torch.cat(parts).view(piece.local_shape)


def _default(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[float, ...]]:
    if len(shape) >= 2:
        return "normal_", (0.0, 0.02)
    return "fill_", (0.0 if key.endswith("bias") else 1.0,)
