"""What a function's values are called while its lines are written: a name is free when what it holds is read no
more.
"""

import builtins
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from meshwright import runtime
from meshwright.codegen.sizes import symbols_of
from meshwright.compiler.errors import InternalError
from meshwright.compiler.graph import Function

RESERVED = {*keyword.kwlist, *dir(builtins), "self", "torch", "nn", "F", "param", *runtime.__all__}


@dataclass(slots=True)
class Names:
    """The names of one function's values; positions count its calls.

    given: what placeholders are called. last_use: the position of the last line that reads a value; since: that of the
    line that made it. write_alias: writes ``alias = name`` behind the line that bound ``name``, for a value that still
    lives.
    """

    function: Function
    given: Mapping[fx.Node, str]
    last_use: dict[fx.Node, float]
    write_alias: Callable[[fx.Node, str, str], None]
    bound: dict[str, fx.Node] = field(default_factory=dict)
    called: dict[fx.Node, str] = field(default_factory=dict)
    since: dict[fx.Node, float] = field(default_factory=dict)
    symbols: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.symbols = symbols_of(self.function)
        for node in self.function.inputs():
            self.bind(node, self.given[node], -1)

    def of(self, node: fx.Node) -> str:
        """What ``node`` is called now. Raises InternalError if the name holds another value."""
        name = self.called[node]
        if self.bound.get(name) is not node:
            raise InternalError(f"{name!r} holds another value where {node.name} is read")
        return name

    def preferred(self, node: fx.Node) -> str:
        """What the user's source calls a value, as an identifier that the emitted file does not use itself."""
        if node in self.given:
            return self.given[node]
        origin = self.function.origins.get(node)
        name = origin.name if origin else str(node.name)
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "value"
        if name[0].isdigit() or name in RESERVED or name in self.symbols:
            name = f"{name}_" if not name[0].isdigit() else f"_{name}"
        return name

    def bind(self, node: fx.Node, name: str, position: float) -> None:
        """Call a value by a name, from the line at ``position`` on."""
        self.bound[name] = node
        self.called[node] = name
        self.since.setdefault(node, position)

    def take(self, node: fx.Node, position: float) -> str:
        """The name that ``node`` is bound to at ``position``; a value that still lives keeps its alias, or keeps the
        name.
        """
        name = self.preferred(node)
        if not self.is_free(name, position):
            number = 2
            while f"{name}_{number}" in self.bound and self.last_use[self.bound[f"{name}_{number}"]] > position:
                number += 1
            name = f"{name}_{number}"
        self.bind(node, name, position)
        return name

    def numbered(self, name: str) -> str:
        """The first of ``name_2``, ``name_3``, ... that was never bound."""
        number = 2
        while f"{name}_{number}" in self.bound:
            number += 1
        return f"{name}_{number}"

    def is_free(self, name: str, position: float) -> bool:
        """Whether ``name`` may be taken, perhaps after what it holds got an alias that the user's source has."""
        old = self.bound.get(name)
        if old is None or not self._is_held(name, position):
            return True
        origin = self.function.origins.get(old)
        for alias in origin.aliases if origin else ():
            if alias not in RESERVED | self.symbols and self._is_unused(alias, self.since[old]):
                self.write_alias(old, alias, name)
                self.bind(old, alias, position)
                return True
        return False

    def _is_held(self, name: str, position: float) -> bool:
        """Whether ``name`` holds a value that is read after ``position``."""
        holder = self.bound.get(name)
        return holder is not None and self.called.get(holder) == name and self.last_use[holder] > position

    def _is_unused(self, name: str, position: float) -> bool:
        """Whether nothing was or will be called by ``name`` after ``position``, where an alias is to be written."""
        holder = self.bound.get(name)
        return holder is None or max(self.since[holder], self.last_use[holder]) <= position
