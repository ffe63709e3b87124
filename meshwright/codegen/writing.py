"""From a function's graph to the lines of a forward: each with its code, its name and what stands beside it."""

import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import fx

from meshwright.codegen.calls import Call
from meshwright.codegen.expressions import Expressions
from meshwright.codegen.folding import folded, last_uses
from meshwright.codegen.margin import margin
from meshwright.codegen.naming import Names
from meshwright.codegen.sizes import Sizes
from meshwright.codegen.views import Line
from meshwright.codegen.wording import comment
from meshwright.compiler.graph import Function, is_multiple
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import operands

LINE = 120 - 13
"""Characters of code and margin that a line keeps to where it can be cut."""
WIDTH = 98
"""Characters of code, without the indent of 8, that a line keeps to where it can be cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A written function: its arguments in order and the lines of its forward."""

    arguments: tuple[str, ...]
    lines: tuple[Line, ...]
    runtime: tuple[str, ...]
    uses_functional: bool


def write(
    function: Function,
    names: Mapping[fx.Node, str],
    attributes: Mapping[str, str],
    axes: Mapping[str, int],
    calls: Mapping[fx.Node, Call] | None = None,
) -> Body:
    """The code of ``function``.

    names: what placeholders are called. attributes: parameter or buffer -> attribute of self. axes: sizes by axis,
    "mb" too. calls: how instances of blocks are called.
    """
    return _Writer(function, names, attributes, axes, calls or {}).write()


class _Writer:
    def __init__(
        self,
        function: Function,
        names: Mapping[fx.Node, str],
        attributes: Mapping[str, str],
        axes: Mapping[str, int],
        calls: Mapping[fx.Node, Call],
    ):
        self.function, self.axes, self.calls = function, axes, calls
        self.lines: list[Line] = []
        self.section = self.margin_above = self.returned = ""
        self.num_calls = 0
        self.folded = folded(function)
        self.sizes = Sizes(function=function, names=names, axes=axes)
        self.names = Names(function, names, last_uses(function, self.folded), self._insert_alias)
        self.code = Expressions(
            function=function, names=self.names, attributes=attributes, sizes=self.sizes, folded=self.folded
        )

    def write(self) -> Body:
        nodes = [n for n in self.function.graph.nodes if n.op in ("call_function", "call_module")]
        self.num_calls = len(nodes)
        for position, node in enumerate(nodes):
            if node not in self.folded and node.target is not operator.getitem:
                self._line(node, position)
        self._return()
        lines = self.sizes.lines() + self.lines
        return Body(
            arguments=tuple(self.names.given[n] for n in self.function.inputs()),
            lines=tuple(lines),
            runtime=tuple(sorted(self.code.runtime)),
            uses_functional=any("F." in line.code for line in lines),
        )

    # Lines

    def _line(self, node: fx.Node, position: float) -> None:
        if node in self.calls:
            self._call_line(node, position)
            return
        code = self._fitted(node, position)
        self._open_section(node)
        if is_multiple(node):
            found: dict[int, fx.Node] = {int(u.args[1]): u for u in node.users}  # type: ignore[arg-type]
            targets = [self.names.take(found[i], position) if i in found else "_" for i in range(max(found) + 1)]
            targets += [] if _is_complete(self.function, node, found) else ["*_"]
            self._emit(f"{', '.join(targets)} = {code}", found[min(found)])
        elif getattr(node.target, "__name__", "") == "shard_range":
            ends = sorted(node.users, key=lambda u: int(u.args[1]))  # type: ignore[arg-type]
            self._emit(f"{', '.join(self.names.take(end, position) for end in ends)} = {code}", None)
        elif self._is_returned(node, position):
            self.returned = code
        elif not node.users:
            self._emit(code, None)
        else:
            self._emit(f"{self.names.take(node, position)} = {code}", node)

    def _is_returned(self, node: fx.Node, position: float) -> bool:
        """Whether the line of a value is the function's last one."""
        alone = self.function.results() == (node,) and len(node.users) == 1 and conversion_of(node) is None
        return alone and position == self.num_calls - 1

    def _fitted(self, node: fx.Node, position: float) -> str:
        """The code of a line; what is too much for it gets lines of its own first."""
        while True:
            code = self.code.written(node).code
            inside = [n for n in self.code.inside(node) if any(c in self.code.read(n).code for c in "([")]
            beside = len(margin(self.function.values[node], self.axes)) if node in self.function.values else 0
            length = len(code) + max(len(self.names.preferred(node)) + 3, 7)
            if (length <= WIDTH and length + beside <= LINE) or not inside:
                return code
            longest = max(inside, key=lambda n: len(self.code.read(n).code))
            self.folded.discard(longest)
            self.names.last_use[longest] = position
            self._release(longest, position - 0.5)
            # Before the line: what the line itself still reads keeps its names.
            self._line(longest, position - 0.5)

    def _release(self, node: fx.Node, position: float) -> None:
        """What only ``node`` reads is read for the last time at ``position``."""
        for operand in operands(node):
            if operand in self.folded:
                self._release(operand, position)
            elif len(operand.users) == 1:
                self.names.last_use[operand] = position

    def _return(self) -> None:
        results = self.function.results()
        if self.returned:
            self._emit(f"return {self.returned}", results[0], force=True)
        else:
            codes = ", ".join(self.code.read(n).code for n in results)
            self.lines.append(Line(code=f"return {codes}", margin=""))

    def _call_line(self, node: fx.Node, position: float) -> None:
        call = self.calls[node]
        if call.skip:
            return
        self._open_section(node)
        arguments = [self.code.read(n).code for n in operands(node)]
        if call.loop is None:
            results = (
                [node] if node in self.function.values else sorted(node.users, key=lambda u: int(u.args[1]))  # type: ignore[arg-type]
            )
            targets = ", ".join(self.names.take(n, position) for n in results)
            self._emit(f"{targets} = self.{call.attribute}({', '.join(arguments)})", node)
            return
        carried = operands(node)[call.carried]
        name = self.names.preferred(call.last)
        self._keep(name, position, carried)
        if self.names.called[carried] != name:
            self._emit(f"{name} = {self.code.read(carried).code}", None, blank=True)
        arguments = [name if n is carried else self.code.read(n).code for n in operands(node)]
        was_blank = bool(self.lines) and self.lines[-1].blank
        self.lines.append(Line(code=f"for {call.variable} in self.{call.loop}:", margin="", blank=not was_blank))
        self.names.bind(call.last, name, position)
        self._emit(f"    {name} = {call.variable}({', '.join(arguments)})", call.last)

    def _keep(self, name: str, position: float, carried: fx.Node) -> None:
        """Give what ``name`` holds another name, if it is read in or after the loop that is about to take the name."""
        old = self.names.bound.get(name)
        if old is None or self.names.is_free(name, position if old is carried else position - 0.5):
            return
        other = self.names.numbered(name)
        self._emit(f"{other} = {name}", None)
        self.names.bind(old, other, position)

    def _emit(self, code: str, node: fx.Node | None, blank: bool = False, force: bool = False) -> None:
        text = ""
        if node is not None and node in self.function.values:
            before = self.function.values[operands(node)[0]] if conversion_of(node) else None
            text = margin(self.function.values[node], self.axes, before)
        shown = "" if text == self.margin_above and not force else text
        self.lines.append(Line(code=code, margin=shown, blank=blank))
        if text:
            self.margin_above = text

    def _open_section(self, node: fx.Node) -> None:
        origin = self.function.origins.get(node)
        if origin is None or origin.section in ("", self.section):
            return
        self.section = origin.section
        file = os.path.basename(origin.statement[0])
        where = f"{file}:{origin.statement[1]}" if file else ""
        self.lines.append(Line(code=f"# {comment(origin.section)}", margin=comment(where), blank=True, is_comment=True))

    def _insert_alias(self, node: fx.Node, alias: str, name: str) -> None:
        """Put ``residual = hidden_states`` where the user has it: after the first line since the value was bound."""
        index = len(self.lines)
        for i in range(len(self.lines) - 1, -1, -1):
            if self.lines[i].code.startswith(f"{name} = ") or self.lines[i].code.startswith(f"    {name} = "):
                index = i + 1
                break
        else:
            index = 0
        while index < len(self.lines) and self.lines[index].is_comment:
            index += 1
        value = self.function.values.get(node)
        first = index <= 1 and value is not None
        self.lines.insert(
            index, Line(code=f"{alias} = {name}", margin=margin(value, self.axes) if first and value else "")
        )


def _is_complete(function: Function, node: fx.Node, found: Mapping[int, fx.Node]) -> bool:
    """Whether an operator has no results beyond those that are read."""
    returns = node.target._schema.returns  # type: ignore[union-attr]
    if len(returns) > 1:
        return max(found) + 1 == len(returns)
    source, *parts = (function.values[n].shape for n in (operands(node)[0], *found.values()))
    rest = math.prod(source) - sum(math.prod(part) for part in parts)
    return len(found) > 1 and sympy.expand(rest) == 0
