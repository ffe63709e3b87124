"""How calls are written: what is known of one, what its code is, and the general ways to write it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import sympy
import torch
from torch.nn import functional as F

from meshwright.compiler.graph import Value


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of code with the binding strength of its outermost operator (Python's order; 20: never needs
    parentheses).
    """

    code: str
    strength: int = 20

    def at(self, strength: int) -> str:
        """The code, in parentheses where an operator of ``strength`` around it binds more strongly."""
        return self.code if self.strength >= strength else f"({self.code})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One call to be written: arguments as Text (tensors) or plain data, with the values behind them.

    Sizes among the arguments are in the symbols of the code. local: writes the size of a dim of a value as a rank has
    it; device: the code of a device at hand.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value, ...]
    result: Value | None
    local: Callable[[Value, int], str]
    device: str

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Spelling = Callable[[Use], Text]


def plain(value: Any) -> str:
    """Data in code: numbers, dtypes, strings, sizes and sequences of them."""
    if isinstance(value, Text):
        return value.code
    if isinstance(value, (list, tuple)):
        items = ", ".join(plain(v) for v in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return repr(value)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if isinstance(value, str):
        return '"' + repr(value)[1:-1].replace('"', '\\"') + '"'
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def infix(symbol: str, strength: int, commutes: bool = True) -> Spelling:
    def write(use: Use) -> Text:
        left, right = (_operand(a) for a in use.args[:2])
        if use.kwargs.get("alpha", 1) != 1:
            return Text(
                f"torch.{use.target._schema.name.split('::')[1]}({left.code}, {right.code}, "
                f"alpha={use.kwargs['alpha']})"
            )
        return Text(f"{left.at(strength)} {symbol} {right.at(strength if commutes else strength + 1)}", strength)

    return write


def _operand(value: Any) -> Text:
    """Data beside an operator: a size that is itself computed (``2*B``, ``T + 1``) binds no better than ``+``."""
    if isinstance(value, Text):
        return value
    code = plain(value)
    return Text(code, 12) if isinstance(value, sympy.Expr) and not code.isalnum() else Text(code)


def function(name: str, *keywords: str) -> Spelling:
    """``name(x, ...)``: arguments beyond the tensors carry their keyword where one is given."""

    def write(use: Use) -> Text:
        written = [
            plain(a)
            for a in use.args
            if isinstance(a, Text) or (isinstance(a, (list, tuple)) and a and isinstance(a[0], Text))
        ]
        rest = [
            a
            for a in use.args
            if not isinstance(a, Text) and not (isinstance(a, (list, tuple)) and a and isinstance(a[0], Text))
        ]
        named = list(zip(keywords, rest, strict=False)) + list(use.kwargs.items())
        written += [f"{key}={plain(value)}" for key, value in named if value is not None]
        return Text(f"{name}({', '.join(written)})")

    return write


def method(name: str, *keywords: str) -> Spelling:
    """``x.name(...)``; a keyword "" is positional, and trailing defaults are dropped by the caller."""

    def write(use: Use) -> Text:
        first: Text = use.args[0]
        written = []
        for i, value in enumerate(use.args[1:]):
            keyword = keywords[i] if i < len(keywords) else ""
            if keyword.endswith("?"):
                if value in (None, False):
                    continue
                keyword = keyword[:-1]
            written.append(f"{keyword}={plain(value)}" if keyword else plain(value))
        written += [f"{key}={plain(value)}" for key, value in use.kwargs.items() if value is not None]
        return Text(f"{first.at(20)}.{name}({', '.join(written)})")

    return write


def reduction(name: str, use: Use) -> Text:
    dims = use.args[1]
    code = (
        plain(dims[0])
        if isinstance(dims, (list, tuple)) and len(dims) == 1
        else plain(tuple(dims) if dims is not None else None)
    )
    keepdim = ", keepdim=True" if use.argument(2, "keepdim", False) else ""
    dtype = f", dtype={use.kwargs['dtype']}" if use.kwargs.get("dtype") else ""
    return Text(f"{use.args[0].at(20)}.{name}({code}{keepdim}{dtype})")


def runtime(use: Use) -> Text:
    written = [plain(a) for a in use.args] + [f"{k}={plain(v)}" for k, v in use.kwargs.items()]
    return Text(f"{use.target.__name__}({', '.join(written)})")


def by_schema(use: Use) -> Text:
    """``torch.name(...)``, else ``F.name(...)``, else the method, with keywords for what is not positional; the
    operator itself where the public function takes its arguments in another order.
    """
    if not isinstance(use.target, torch._ops.OpOverload):
        return runtime(use)
    name = use.target._schema.name.split("::")[1]
    skipped = {"device", "layout", "pin_memory", "memory_format"}
    arguments = list(use.target._schema.arguments)
    positional = [a for a in arguments if not a.kwarg_only]
    kwargs = {k: v for k, v in use.kwargs.items() if k not in skipped and v is not None}
    values = list(use.args)
    while (
        values
        and len(values) > 1
        and not isinstance(values[-1], Text)
        and positional[len(values) - 1].has_default_value()
        and values[-1] == positional[len(values) - 1].default_value
    ):
        values.pop()
    written = [plain(a) for a in values] + [f"{k}={plain(v)}" for k, v in kwargs.items()]
    if not use.target._schema.name.startswith("aten::"):
        return Text(f"torch.ops.{use.target}({', '.join(written)})")
    for family in ("fft", "linalg", "special"):
        if name.startswith(f"{family}_"):
            return Text(f"torch.{family}.{name.removeprefix(family + '_')}({', '.join(written)})")
    names = [argument.name for argument in positional[: len(values)]]
    owner = next((o for o, m in (("torch", torch), ("F", F)) if _takes(getattr(m, name, None), names)), None)
    if owner is not None:
        return Text(f"{owner}.{name}({', '.join(written)})")
    if not hasattr(F, name) and hasattr(torch.Tensor, name):
        return Text(f"{values[0].at(20)}.{name}({', '.join(written[1:])})")
    return Text(f"torch.ops.{use.target}({', '.join(written)})")


def _takes(function: Any, names: list[str]) -> bool:
    """Whether a public function takes the arguments of an operator by position; those in C share its schema."""
    if function is None or isinstance(function, BuiltinFunctionType):
        return function is not None
    return list(inspect.signature(function).parameters)[1 : len(names)] == names[1:]
