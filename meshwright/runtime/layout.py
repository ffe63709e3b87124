"""Where the pieces of a tensor lie: types as text, and cutting and placing by them."""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meshwright.runtime.errors import BundleError

_TYPE = re.compile(r"^(?:([RIP])|S\((\d+)(?:/(\w+))?\))$")


@dataclass(frozen=True, slots=True)
class Split:
    """Split along ``dim``, seen as ``groups`` equal blocks each of which is split."""

    dim: int
    groups: int = 1


def parse(text: str) -> tuple[str | Split, str | Split]:
    """A type at rest and in use from ``"S(0) -> R"`` or ``"S(0/3)"``. Raises BundleError."""
    rest, _, use = text.partition("->")
    return _one(rest.strip(), text), _one((use or rest).strip(), text)


def _one(text: str, whole: str) -> str | Split:
    match = _TYPE.match(text)
    if match is None:
        raise BundleError(f"{whole!r} is not a type: types are I, R, P, S(dim) and S(dim/groups)")
    return match[1] or Split(int(match[2]), int(match[3]) if match[3] and match[3].isdigit() else 1)


def largest_piece(length: int, pieces: int) -> int:
    """How long all of ``pieces`` are but the last, which may be shorter."""
    return -(-length // pieces)


def suffices(length: int, pieces: int) -> bool:
    """Whether the last of ``pieces`` gets something too."""
    return largest_piece(length, pieces) * (pieces - 1) < length


def shard_bounds(length: int, index: int, pieces: int) -> tuple[int, int]:
    """Start and stop of piece ``index`` of ``length`` cut in ``pieces``; the last may be shorter."""
    size = largest_piece(length, pieces)
    return min(index * size, length), min((index + 1) * size, length)


Ranges = list[tuple[int, int]]


def ranges_of(length: int, split: Split, index: int, pieces: int) -> Ranges:
    """The (start, stop) runs along a dim of ``length`` that piece ``index`` consists of."""
    block = length // split.groups
    start, stop = shard_bounds(block, index, pieces)
    return [(g * block + start, g * block + stop) for g in range(split.groups)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """This rank's piece of a tensor: the runs along every dim, in order, on the whole tensor."""

    shape: tuple[int, ...]
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The piece of ``whole``."""
        for dim, runs in enumerate(self.runs):
            if runs != ((0, self.shape[dim]),):
                whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in runs], dim)
        return whole

    def place(self, piece: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the piece into ``whole``."""
        self._place(piece, whole, 0)

    def _place(self, piece: torch.Tensor, whole: torch.Tensor, dim: int) -> None:
        if dim == len(self.runs):
            whole.copy_(piece)
            return
        at = 0
        for start, stop in self.runs[dim]:
            self._place(piece.narrow(dim, at, stop - start), whole.narrow(dim, start, stop - start), dim + 1)
            at += stop - start


def piece_of(
    shape: Sequence[int],
    segment: tuple[int, int, int] | None,
    types: Mapping[str, str | Split],
    coordinates: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Piece:
    """The piece at ``coordinates`` of a tensor of ``shape`` (of its ``segment`` (dim, start, length) if given)."""
    runs: list[Ranges] = [[(0, size)] for size in shape]
    if segment is not None:
        dim, start, length = segment
        runs[dim] = [(start, start + length)]
    for axis, type_ in types.items():
        if isinstance(type_, Split) and sizes.get(axis, 1) > 1:
            here = runs[type_.dim]
            if len(here) != 1:
                raise BundleError(
                    f"two axes split dim {type_.dim} of a tensor of shape {tuple(shape)}, one of them in groups"
                )
            base, stop = here[0]
            cut = ranges_of(stop - base, type_, coordinates[axis], sizes[axis])
            runs[type_.dim] = [(base + a, base + b) for a, b in cut]
    return Piece(shape=tuple(shape), runs=tuple(tuple(r) for r in runs))


def evaluate(size: int | str, symbols: Mapping[str, int]) -> int:
    """A size such as ``"B*T"`` or ``"T + 1"`` as a number. Raises BundleError for anything but + - * // and names."""
    if isinstance(size, int):
        return size

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in symbols:
            return symbols[node.id]
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.FloorDiv) and right:
                return left // right
            if isinstance(node.op, ast.Div) and right and left % right == 0:
                return left // right
        raise BundleError(f"cannot read the size {size!r} with {', '.join(symbols) or 'no symbols'}")

    return value(ast.parse(size, mode="eval").body)


def local_shape(
    shape: Sequence[int | str],
    types: Mapping[str, str],
    symbols: Mapping[str, int],
    sizes: Mapping[str, int],
    coordinates: Mapping[str, int],
) -> tuple[int, ...]:
    """The shape of the piece at ``coordinates``. A fixed dim may be cut in pieces of which the last is shorter.

    Raises BundleError for any other dim that its axis does not divide.
    """
    local = [evaluate(size, symbols) for size in shape]
    for axis, text in types.items():
        type_ = parse(text)[1]
        if isinstance(type_, Split):
            pieces, size = sizes.get(axis, 1), local[type_.dim]
            may_differ = isinstance(shape[type_.dim], int) and type_.groups == 1 and suffices(size, pieces)
            if size % pieces and not may_differ:
                raise BundleError(f"cannot cut dim {type_.dim} of {tuple(shape)} in {pieces} equal pieces over {axis}")
            start, stop = shard_bounds(size, coordinates.get(axis, 0), pieces)
            local[type_.dim] = stop - start
    return tuple(local)
