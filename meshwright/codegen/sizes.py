"""Sizes in the code of a rank: what it has of a size of the whole model, in the symbols that the code knows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch import fx

from meshwright.codegen.margin import BATCH_AXES
from meshwright.codegen.views import Line
from meshwright.compiler.errors import InternalError
from meshwright.compiler.graph import Function, Value
from meshwright.compiler.leaves import BATCH
from meshwright.passes.factors import Factor
from meshwright.passes.rows import groups_of


class _Python(StrPrinter):  # type: ignore[misc]
    """Sizes as Python computes them; torch's own floor division says so itself."""

    def _print_Max(self, expression: Any) -> str:  # noqa: N802
        return f"max({self.stringify(expression.args, ', ')})"

    def _print_Min(self, expression: Any) -> str:  # noqa: N802
        return f"min({self.stringify(expression.args, ', ')})"

    def _print_Mod(self, expression: Any) -> str:  # noqa: N802
        a, b = (self.parenthesize(argument, PRECEDENCE["Pow"]) for argument in expression.args)
        return f"({a} % {b})"

    _print_PythonMod = _print_Mod


_in_python = _Python().doprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Writes the sizes of one function.

    names: what placeholders are called. axes: sizes by axis, "mb" too. symbols: those that were written so far.
    """

    function: Function
    names: Mapping[fx.Node, str]
    axes: Mapping[str, int]
    symbols: set[str] = field(default_factory=set)

    def flexibility(self, value: Value, dim: int) -> int:
        """How much better a size is not written: 2 where no input has it, 1 where it differs with the mesh or is the
        batch, else 0.
        """
        size = value.shape[dim]
        symbols = size.free_symbols if isinstance(size, sympy.Expr) else set()
        if any(not self._places_of(str(symbol)) for symbol in symbols):
            return 2
        return 1 if _is_split(value, dim) or BATCH in symbols else 0

    def local(self, value: Value, dim: int, factor: Factor | None = None) -> str:
        """The size of a dim as a rank has it, or of one of its factors, in the symbols of the code."""
        if factor is None:
            return str(self.in_code(value.shape[dim], pieces(value, dim, self.axes)))
        split = [a for a, t in value.types.items() if groups_of(factor, factor.results[0], t) is not None]
        return str(self.in_code(factor.size, math.prod(self.axes.get(axis, 1) for axis in split)))

    def in_code(self, size: Any, count: int = 1) -> Any:
        """One of ``count`` pieces of a size of the whole model, in the symbols of the code: those are the sizes of
        inputs, of which a rank may have a piece.
        """
        if not isinstance(size, sympy.Expr):
            if size % count:
                raise InternalError(f"a size of {size} in {count} pieces is not the same on every rank")
            return size // count
        self.symbols.update(str(symbol) for symbol in size.free_symbols)
        scales = {symbol: self._place_of(str(symbol))[1] * symbol for symbol in size.free_symbols}
        numerator, denominator = sympy.fraction(sympy.cancel(size.subs(scales, simultaneous=True) / count))
        divided = "//" if size.is_integer else "/"
        if denominator != 1:
            return sympy.Symbol(f"({_in_python(numerator)}) {divided} ({_in_python(denominator)})")
        return sympy.Symbol(_in_python(numerator)) if numerator.atoms(sympy.core.function.Application) else numerator

    def lines(self) -> list[Line]:
        """``T = input_ids.shape[1]`` for every size that the code names."""
        return [Line(code=f"{symbol} = {self._place_of(symbol)[0]}", margin="") for symbol in sorted(self.symbols)]

    def _places_of(self, symbol: str) -> list[tuple[int, str, int]]:
        """In how many pieces each input has a size, its name and the dim."""
        return [
            (pieces(value, dim, self.axes), self.names[node], dim)
            for node in self.function.inputs()
            for value in (self.function.values[node],)
            for dim, size in enumerate(value.shape)
            if str(size) == symbol
        ]

    def _place_of(self, symbol: str) -> tuple[str, int]:
        """Where the code reads a size, and in how many pieces it is cut there. Raises InternalError if nowhere."""
        found = self._places_of(symbol)
        if not found:
            raise InternalError(f"no input of the function has the size {symbol}")
        count, name, dim = min(found, key=lambda place: place[0])
        return f"{name}.shape[{dim}]", count


def pieces(value: Value, dim: int, axes: Mapping[str, int]) -> int:
    """In how many pieces a dim is cut."""
    return math.prod(axes.get(axis, 1) for axis, t in value.types.items() if t.is_split and t.dim == dim)


def symbols_of(function: Function) -> frozenset[str]:
    """The symbols in the shapes of a function."""
    sizes = [size for value in function.values.values() for size in value.shape if isinstance(size, sympy.Expr)]
    return frozenset(str(symbol) for size in sizes for symbol in size.free_symbols)


def _is_split(value: Value, dim: int) -> bool:
    """Whether a rank has a piece of a dim; a symbolic batch is not meant, which B stands for on every rank."""
    fixed = isinstance(value.shape[dim], int)
    return any(t.is_split and t.dim == dim for axis, t in value.types.items() if fixed or axis not in BATCH_AXES)
