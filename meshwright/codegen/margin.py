"""What stands beside a line: the whole shape of what it assigns, what is split, and the types that matter."""

import re
from collections.abc import Iterable, Iterator, Mapping

import sympy

from meshwright.codegen.views import Line
from meshwright.compiler.graph import Value
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.types import I, Size, Type

BATCH_AXES = ("dp", "mb")
"""Axes that split the batch: B in a margin is the batch of one replica and microbatch."""


def shape_text(value: Value, axes: Mapping[str, int]) -> str:
    """``(B, T, 64/tp)``: the shape with symbols, split dims marked with their axes; ``dp*B`` is the whole batch."""
    sizes = [_size_text(value, dim, size, axes) for dim, size in enumerate(value.shape)]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _size_text(value: Value, dim: int, size: Size, sizes: Mapping[str, int]) -> str:
    if isinstance(size, sympy.Expr) and size.has(BATCH):
        split = {axis for axis, t in value.types.items() if t.is_split and t.dim == dim}
        whole = [axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1 and axis not in split]
        size = size.subs(BATCH, sympy.prod([*(sympy.Symbol(axis) for axis in whole), BATCH]))
    text = str(size).replace(" ", "") if "*" in str(size) else str(size)
    axes = [a for a, t in value.types.items() if t.is_split and t.dim == dim and a not in BATCH_AXES]
    return f"{text}/{'/'.join(axes)}" if axes else text


def types_text(value: Value, axes: Mapping[str, int], before: Value | None = None) -> str:
    """``tp I · dp P``: the types on axes larger than 1 that say something, both sides where ``before`` was
    converted.
    """
    parts = []
    for axis in [*(a for a in axes if a not in BATCH_AXES), *(a for a in axes if a in BATCH_AXES)]:
        if axes[axis] == 1:
            continue
        here = value.types.get(axis, I)
        if before is not None and before.types.get(axis, I) != here:
            parts.append(f"{axis} {_short(before.types.get(axis, I))} -> {_short(here)}")
        elif _matters(axis, here, value):
            parts.append(f"{axis} {here}")
    return " · ".join(parts)


def _short(type_: Type) -> str:
    return f"S({type_.dim})" if type_.is_split else str(type_)


def _matters(axis: str, type_: Type, value: Value) -> bool:
    if axis in BATCH_AXES:
        return type_.kind == "P"
    return type_.kind == "P" or (value.grad and type_.kind in "RI")


def margin(value: Value, axes: Mapping[str, int], before: Value | None = None) -> str:
    """The whole margin of a line without its ``#``."""
    types = types_text(value, axes, before)
    shape = shape_text(value, axes)
    return f"{shape}  {types}" if types else shape


def legend(symbols: Iterable[object], axes: Mapping[str, int], lines: Iterable[Line]) -> Iterator[tuple[str, str]]:
    """The terms of the margins that occur in ``lines``, with what they mean."""
    text = " \n".join(line.margin for line in lines if not line.is_comment) + " "
    names = {str(symbol) for symbol in symbols}
    if "B" in names and re.search(r"\bT\b", text):
        yield "B, T", "sequences and tokens of one microbatch of one dp rank"
    elif "B" in names:
        yield "B", "samples of one microbatch of one dp rank"
    for axis, size in axes.items():
        if axis in BATCH_AXES or size == 1:
            continue
        if match := re.search(rf"(\d+)/{axis}", text):
            yield match[0], f"split: each {axis} rank has its piece of the {match[1]}"
        if re.search(rf"\b{axis} I", text):
            yield f"{axis} I", f"the same on every {axis} rank, and so is its gradient"
        if re.search(rf"\b{axis} R|{axis} \S+ -> R", text):
            yield f"{axis} R", f"the same, but of its gradient each {axis} rank has a part, still to be summed"
        if re.search(rf"\b{axis} P", text):
            yield f"{axis} P", f"each {axis} rank has a part, still to be summed"
