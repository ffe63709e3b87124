"""Random small models as Python source: what is drawn reads as a model that somebody wrote, and can be pasted."""

import linecache
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import sympy
import torch
from hypothesis import strategies as st
from torch import nn

Size = Any  # an int, or a sympy expression of B and T
B, T = sympy.symbols("B T", positive=True, integer=True)
Draw = Callable[[st.SearchStrategy[Any]], Any]
Kind = Literal["float", "int", "bool"]
Item = TypeVar("Item")

SIZES = (4, 6, 8, 3, 5, 7, 2, 12, 1)
"""Sizes of features, those first that most axes divide; hypothesis prefers the first."""
NAMES = ("hidden", "gate", "scores", "mixed", "state", "left", "right", "inner", "update", "y", "z")
HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor of the program. ``limit``: integers are from 0 to below it."""

    name: str
    dims: tuple[Size, ...]
    kind: Kind = "float"
    limit: int = 0

    @property
    def last(self) -> int | None:
        """The size of the last dim where it is a number."""
        return self.dims[-1] if self.dims and isinstance(self.dims[-1], int) else None


@dataclass(slots=True)
class Module:
    """A class in the making: its members and the lines of its forward."""

    name: str
    members: dict[str, str] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    arguments: Sequence[str] = ()
    lines: list[str] = field(default_factory=list)
    mixes: bool = False

    def member(self, stem: str, text: str) -> str:
        """A new member and how forward reads it."""
        name = stem
        while name in self.members:
            name = f"{stem}_{len(self.members)}"
        self.members[name] = text
        return f"self.{name}"

    def buffer(self, stem: str, text: str) -> str:
        """A new buffer and how forward reads it."""
        name = self.member(stem, "")
        self.after.append(f'self.register_buffer("{name.removeprefix("self.")}", {text}, persistent=False)')
        return name

    def text(self) -> str:
        first = f"        B, T = {self.arguments[0]}.shape[:2]\n" if self.reads_sizes() else ""
        members = "".join(f"        self.{name} = {text}\n" for name, text in self.members.items() if text)
        after = "".join(f"        {line}\n" for line in self.after)
        lines = "".join(f"        {line}\n" for line in self.lines)
        return (
            f"class {self.name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{members}{after}\n"
            f"    def forward(self, {', '.join(self.arguments)}):\n{first}{lines}"
        )

    def reads_sizes(self) -> bool:
        return any(words(line) & {"B", "T"} for line in self.lines)


@dataclass(slots=True)
class Body:
    """A forward in the making: what is drawn, and the values that can be read."""

    draw: Draw
    module: Module
    values: dict[str, Value]

    def choose(self, options: Iterable[Item]) -> Item:
        return self.draw(st.sampled_from(list(options)))  # type: ignore[no-any-return]

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))  # type: ignore[no-any-return]

    def chance(self, one_in: int) -> bool:
        return self.number(0, one_in - 1) == one_in - 1

    def size(self) -> int:
        return self.choose(SIZES)

    def floats(self) -> list[Value]:
        """The newest first."""
        return [value for value in reversed(self.values.values()) if value.kind == "float"]

    def pick(self, fits: Callable[[Value], bool] = lambda value: True, kind: Kind = "float") -> Value | None:
        """A value, the newest most often."""
        every = [v for v in reversed(self.values.values()) if v.kind == kind and v.name != "labels"]
        found = [v for v in every if fits(v)]
        return self.choose(found[:1] * 6 + found[1:4]) if found else None

    def unread(self) -> list[Value]:
        """Values that no line reads, the newest first: the program would be without them."""
        text = self.module.lines
        found = []
        for value in self.floats():
            defined = max((i for i, line in enumerate(text) if line.lstrip().startswith(value.name)), default=-1)
            if not any(value.name in words(line) for line in text[defined + 1 :]):
                found.append(value)
        return found

    def dim(self, value: Value, fits: Callable[[Size], bool] = lambda size: True) -> int | None:
        """A dim to compute along; only sometimes one that mixes the samples of the batch."""
        dims = [d for d, size in enumerate(value.dims) if fits(size)][::-1]
        apart = [d for d in dims if not has_batch(value.dims[d])]
        chosen = self.choose(dims) if dims and self.chance(24) else self.choose(apart) if apart else None
        if chosen is not None and has_batch(value.dims[chosen]):
            self.module.mixes = True
        return chosen

    def bind(
        self, text: str, dims: Sequence[Size], kind: Kind = "float", limit: int = 0, of: Value | None = None
    ) -> Value:
        """A line that names a value: as what it is made of, or anew."""
        fresh = [name for name in NAMES if name not in self.values]
        again = of is not None and of.name in (*NAMES, "x") and (of.name != "x" or of.dims == tuple(dims))
        if of is not None and again and self.chance(3):
            name = of.name
        else:
            name = fresh[0] if fresh else NAMES[-1]
        self.values.pop(name, None)
        self.module.lines.append(f"{name} = {text}")
        self.values[name] = value = Value(name=name, dims=tuple(dims), kind=kind, limit=limit)
        return value


def words(line: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in line).split())


def has_batch(size: Size) -> bool:
    return not isinstance(size, int) and B in size.free_symbols


def product(sizes: Iterable[Size]) -> Size:
    result = math.prod(sizes)
    return int(result) if isinstance(result, int) or result.is_number else result


def text_of(sizes: Sequence[Size]) -> str:
    return ", ".join(str(size) for size in sizes) + ("," if len(sizes) == 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A drawn model and the shape of its batch.

    inputs: name -> the value and how to fill it. mixes: samples of the batch may meet, so microbatches may be refused.
    """

    source: str
    inputs: Mapping[str, Value]
    mixes: bool
    sizes: Mapping[str, int]

    def build(self) -> nn.Module:
        """The model, every parameter random."""
        file = f"<random program {abs(hash(self.source)):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        space: dict[str, Any] = {"__name__": "random_program"}
        exec(compile(self.source, file, "exec"), space)
        model: nn.Module = space["Model"]()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.3
                offset = 0.5 if parameter.ndim < 2 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
        return model

    def batch(self, **sizes: int) -> dict[str, torch.Tensor]:
        """A batch of the example's sizes, or of others."""
        generator = torch.Generator().manual_seed(1)
        given = {B: sizes.get("B", self.sizes["B"]), T: sizes.get("T", self.sizes["T"])}
        batch = {}
        for name, value in self.inputs.items():
            shape = [size if isinstance(size, int) else int(size.subs(given)) for size in value.dims]
            if value.kind == "float":
                batch[name] = (
                    torch.rand(shape, generator=generator)
                    if name == "weights"
                    else torch.randn(shape, generator=generator)
                )
            elif value.kind == "bool":
                batch[name] = torch.rand(shape, generator=generator) < 0.6
                batch[name][..., 0] = True
            else:
                batch[name] = torch.randint(value.limit, shape, generator=generator)
            if name == "labels":  # unevenly ignored, and the first half has next to nothing to learn
                batch[name][torch.rand(shape, generator=generator) < 0.3] = -100
                batch[name][: shape[0] // 2] = -100
                batch[name].view(-1)[-1] = 0
        return batch

    def __str__(self) -> str:
        limits = {name: f" <{value.limit}" if value.kind == "int" else "" for name, value in self.inputs.items()}
        inputs = ", ".join(f"{v.name} {v.kind} ({text_of(v.dims)}){limits[v.name]}" for v in self.inputs.values())
        return f"{self.source}\n# {inputs}; B = {self.sizes['B']}, T = {self.sizes['T']}"
