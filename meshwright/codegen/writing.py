"""From a function's graph to the lines of a forward: what goes on one line, what it is called, what stands
beside it.
"""

import builtins
import keyword
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from meshwright import runtime
from meshwright.codegen.margin import BATCH_AXES, margin
from meshwright.codegen.shapes import spell_expand, spell_view
from meshwright.codegen.spelling import Text, Use, spell
from meshwright.codegen.views import Line
from meshwright.compiler.capture import BATCH
from meshwright.compiler.errors import InternalError
from meshwright.compiler.graph import Function, Value, is_multiple
from meshwright.compiler.names import Origin
from meshwright.passes.factors import Factor
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import PIECE, groups_of, operands

aten = torch.ops.aten
LINE = 120
WIDTH = 98
"""Characters of code, without the indent of 8, that a line keeps to where it can be cut."""

VIEWS = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.default,
}  # fmt: skip
FOLDED_VIEWS = VIEWS | {
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
}
RESERVED = {*keyword.kwlist, *dir(builtins), "self", "torch", "nn", "F", "param", *runtime.__all__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A written function: its arguments in order and the lines of its forward."""

    arguments: tuple[str, ...]
    lines: tuple[Line, ...]
    runtime: tuple[str, ...]
    uses_functional: bool


@dataclass(slots=True)
class Writer:
    """Writes one function.

    names: what placeholders are called. attributes: parameter or buffer -> attribute of self. axes: sizes by axis,
    "mb" too.
    """

    function: Function
    names: Mapping[fx.Node, str]
    attributes: Mapping[str, str]
    axes: Mapping[str, int]
    modules: Mapping[fx.Node, "Call"] = field(default_factory=dict)
    bound: dict[str, fx.Node] = field(default_factory=dict)
    called: dict[fx.Node, str] = field(default_factory=dict)
    pending: dict[fx.Node, Text] = field(default_factory=dict)
    folded: set[fx.Node] = field(default_factory=set)
    last_use: dict[fx.Node, float] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    runtime: set[str] = field(default_factory=set)
    symbols: set[str] = field(default_factory=set)
    section: str = ""
    margin_above: str = ""

    def write(self) -> Body:
        order = [n for n in self.function.graph.nodes if n.op in ("call_function", "call_module")]
        self._fold(order)
        self._find_last_uses(order)
        for node in self.function.inputs():
            self._bind(node, self.names[node])
        for position, node in enumerate(order):
            if node not in self.folded and node.target is not operator.getitem:
                self._line(node, position)
        results = [self._text(n).code for n in self.function.results()]
        self._return(results)
        lines = self._symbol_lines() + self.lines
        text = "\n".join(line.code for line in lines)
        return Body(
            arguments=tuple(self.names[n] for n in self.function.inputs()),
            lines=tuple(lines),
            runtime=tuple(sorted(self.runtime)),
            uses_functional="F." in text,
        )

    # Which nodes share a line

    def _fold(self, order: list[fx.Node]) -> None:
        results = set(self.function.results())
        for node in order:
            if len(node.users) == 1 and node not in results:
                (user,) = node.users
                if self._may_fold(node, user):
                    self.folded.add(node)

    def _may_fold(self, node: fx.Node, user: fx.Node) -> bool:
        if node.op != "call_function" or conversion_of(node) or user.op == "call_module" or is_multiple(node):
            return False
        if node not in self.function.values:
            return False
        if self._is_bias(node, user):
            return True
        if conversion_of(user) or any(n.op == "get_attr" for n in operands(node)):
            return False
        if node.target in FOLDED_VIEWS:
            takes_parameter = any(n.op == "get_attr" for n in operands(user)) and user.target not in FOLDED_VIEWS
            return not takes_parameter
        origin = self.function.origins.get(node)
        same = self._same_statement(node, user) and PIECE not in node.meta
        named = origin is None or (origin.is_name_of_statement and not same)
        return not named and _is_light(node)

    def _is_bias(self, node: fx.Node, user: fx.Node) -> bool:
        products = (aten.linear.default, aten.matmul.default)
        return (
            node.target in products
            and user.target is aten.add.Tensor
            and user.args[0] is node
            and getattr(user.args[1], "op", "") == "get_attr"
        )

    def _same_statement(self, a: fx.Node, b: fx.Node) -> bool:
        one, two = self.function.origins.get(a), self.function.origins.get(b)
        return one is not None and two is not None and one.statement == two.statement

    def _find_last_uses(self, order: list[fx.Node]) -> None:
        where = {node: i for i, node in enumerate(order)}

        def line_of(node: fx.Node) -> int:
            while node in self.folded:
                (node,) = node.users
            return where.get(node, len(order))

        for node in self.function.graph.nodes:
            self.last_use[node] = max((line_of(user) for user in node.users), default=-1)
            for user in node.users:
                if user.target is operator.getitem and not is_multiple(node):
                    self.last_use[node] = max(self.last_use[node], line_of(user))

    # Lines

    def _line(self, node: fx.Node, position: float) -> None:
        if node in self.modules:
            self._call_line(node, position)
            return
        code = self._fitted(node, position)
        self._open_section(node)
        targets = [node]
        if is_multiple(node):
            found: dict[int, fx.Node] = {int(u.args[1]): u for u in node.users}  # type: ignore[arg-type]
            count = max(found) + 1
            targets = [found[i] for i in sorted(found)]
            names = ["_"] * count
            for i, target in found.items():
                names[i] = self._take(target, position)
            names += [] if self._is_complete(node, found) else ["*_"]
            self._emit(f"{', '.join(names)} = {code}", targets[0])
            return
        if getattr(node.target, "__name__", "") == "shard_range":
            ends = sorted(node.users, key=lambda u: int(u.args[1]))  # type: ignore[arg-type]
            names = [self._take(end, position) for end in ends]
            self._emit(f"{', '.join(names)} = {code}", None)
            return
        if self._returns(node, code):
            return
        name = self._take(node, position)
        self._emit(f"{name} = {code}", node)

    def _is_complete(self, node: fx.Node, found: Mapping[int, fx.Node]) -> bool:
        """Whether an operator has no results beyond those that are read."""
        returns = node.target._schema.returns  # type: ignore[union-attr]
        if len(returns) > 1:
            return max(found) + 1 == len(returns)
        source, values = self.function.values[operands(node)[0]], self.function.values
        parts = [values[part] for part in found.values()]
        cut = [d for d, size in enumerate(source.shape) if any(part.shape[d] != size for part in parts)]
        return len(found) > 1 and all(sum(part.shape[d] for part in parts) == source.shape[d] for d in cut)

    def _fitted(self, node: fx.Node, position: float) -> str:
        """The code of a line; what is too much for it gets lines of its own first."""
        while True:
            code = self._spelled(node).code
            inside = [n for n in self._inside(node) if self._text(n).code.count("(") + self._text(n).code.count("[")]
            beside = len(margin(self.function.values[node], self.axes)) if node in self.function.values else 0
            target = max(len(self._preferred(node)) + 3, 7)
            if (len(code) + target <= WIDTH and len(code) + target + beside <= LINE - 13) or not inside:
                return code
            longest = max(inside, key=lambda n: len(self._text(n).code))
            self.folded.discard(longest)
            self.last_use[longest] = position
            self._release(longest, position - 0.5)
            # Before the line: what the line itself still reads keeps its names.
            self._line(longest, position - 0.5)

    def _release(self, node: fx.Node, position: float) -> None:
        """What only ``node`` reads is read for the last time at ``position``."""
        for operand in operands(node):
            if operand in self.folded:
                self._release(operand, position)
            elif len(operand.users) == 1:
                self.last_use[operand] = position

    def _inside(self, node: fx.Node) -> list[fx.Node]:
        """The folded values directly on a node's line."""
        joined = [n for n in operands(node) if n in self.folded]
        return [n for n in joined if not self._is_bias(n, node)]

    def _returns(self, node: fx.Node, code: str) -> bool:
        """Whether a node is returned directly: the last line of the function is ``return <its code>``."""
        results = self.function.results()
        if results == (node,) and len(node.users) == 1 and conversion_of(node) is None:
            self.pending[node] = Text(code)
            return True
        return False

    def _return(self, results: list[str]) -> None:
        node = self.function.results()[0]
        text = f"return {', '.join(results)}"
        if node in self.pending:
            self._emit(text, node, force=True)
        else:
            self.lines.append(Line(code=text, margin=""))

    def _call_line(self, node: fx.Node, position: float) -> None:
        call = self.modules[node]
        if call.skip:
            return
        self._open_section(node)
        last = call.last
        if call.loop is None:
            arguments = [self._text(n).code for n in node.args]  # type: ignore[arg-type]
            name = self._take_results(node, position)
            self._emit(
                f"{name} = self.{call.attribute}({', '.join(arguments)})",
                node if node in self.function.values else None,
            )
            return
        carried: fx.Node = node.args[call.carried]  # type: ignore[assignment]
        name = self._preferred(last)
        self._keep(name, position, carried)
        if self.called[carried] != name:
            self._emit(f"{name} = {self._text(carried).code}", None, blank=True)
        arguments = [name if n is carried else self._text(n).code for n in node.args]  # type: ignore[arg-type]
        self.lines.append(
            Line(code=f"for {call.variable} in self.{call.loop}:", margin="", blank=not self._was_blank())
        )
        self._rebind(last, name)
        self._emit(f"    {name} = {call.variable}({', '.join(arguments)})", last)

    def _was_blank(self) -> bool:
        return bool(self.lines) and self.lines[-1].blank

    def _take_results(self, node: fx.Node, position: float) -> str:
        if node in self.function.values:
            return self._take(node, position)
        return ", ".join(self._take(u, position) for u in sorted(node.users, key=lambda u: int(u.args[1])))  # type: ignore[arg-type]

    def _emit(self, code: str, node: fx.Node | None, blank: bool = False, force: bool = False) -> None:
        text = ""
        if node is not None and node in self.function.values:
            value = self.function.values[node]
            before = self.function.values.get(node.args[0]) if conversion_of(node) else None  # type: ignore[arg-type]
            text = margin(value, self.axes, before)
        shown = "" if text == self.margin_above and not force else text
        self.lines.append(Line(code=code, margin=shown, blank=blank))
        if text:
            self.margin_above = text

    def _open_section(self, node: fx.Node) -> None:
        origin = self.function.origins.get(node)
        if origin is None or not origin.section:
            return
        file = os.path.basename(origin.statement[0])
        if origin.section != self.section:
            self.section = origin.section
            where = f"{file}:{origin.statement[1]}" if file else ""
            self.lines.append(
                Line(code=f"# {_comment(origin.section)}", margin=_comment(where), blank=True, is_comment=True)
            )

    # Names

    def _preferred(self, node: fx.Node) -> str:
        if node in self.names:
            return self.names[node]
        origin: Origin | None = self.function.origins.get(node)
        name = origin.name if origin else str(node.name)
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in name) or "value"
        if name[0].isdigit() or name in RESERVED or any(name == str(s) for s in self._all_symbols()):
            name = f"{name}_" if not name[0].isdigit() else f"_{name}"
        return name

    def _all_symbols(self) -> set[str]:
        return {
            str(s)
            for v in self.function.values.values()
            for size in v.shape
            if isinstance(size, sympy.Expr)
            for s in size.free_symbols
        }

    def _bind(self, node: fx.Node, name: str) -> None:
        self.bound[name] = node
        self.called[node] = name

    def _rebind(self, node: fx.Node, name: str) -> None:
        self._bind(node, name)

    def _take(self, node: fx.Node, position: float) -> str:
        """The name that ``node`` is bound to at ``position``; a value that still lives keeps its alias, or keeps the
        name.
        """
        name = self._preferred(node)
        if not self._free(name, position):
            number = 2
            while f"{name}_{number}" in self.bound and self.last_use[self.bound[f"{name}_{number}"]] > position:
                number += 1
            name = f"{name}_{number}"
        self._bind(node, name)
        return name

    def _keep(self, name: str, position: float, carried: fx.Node) -> None:
        """Give what ``name`` holds another name, if it is read in or after the loop that is about to take the name."""
        old = self.bound.get(name)
        if old is None or self._free(name, position if old is carried else position - 0.5):
            return
        number = 2
        while f"{name}_{number}" in self.bound:
            number += 1
        self._emit(f"{name}_{number} = {name}", None)
        self._bind(old, f"{name}_{number}")

    def _free(self, name: str, position: float) -> bool:
        """Whether ``name`` may be taken, perhaps after what it holds got an alias that the user's source has."""
        old = self.bound.get(name)
        if old is None or self.called.get(old) != name or self.last_use[old] <= position:
            return True
        origin = self.function.origins.get(old)
        for alias in origin.aliases if origin else ():
            holder = self.bound.get(alias)
            if alias not in RESERVED and (
                holder is None or self.called.get(holder) != alias or self.last_use[holder] <= position
            ):
                self._insert_alias(old, alias, name)
                self._bind(old, alias)
                return True
        return False

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

    # Text

    def _text(self, node: fx.Node) -> Text:
        if node in self.pending:
            return self.pending[node]
        if node in self.folded:
            return self._spelled(node)
        if node.op == "get_attr":
            return Text(f"self.{self.attributes[str(node.target)]}")
        name = self.called[node]
        if self.bound.get(name) is not node:
            raise InternalError(f"{name!r} holds another value where {node.name} is read")
        return Text(name)

    def _spelled(self, node: fx.Node) -> Text:
        values = self.function.values
        if self._joins_bias(node):
            product, bias = node.args
            inner = self._use(product)  # type: ignore[arg-type]
            if product.target is aten.linear.default:  # type: ignore[union-attr]
                return Text(f"F.linear({', '.join(a.code for a in inner.args)}, {self._text(bias).code})")  # type: ignore[arg-type]
        if node.target in (aten.unsqueeze.default, aten.squeeze.dim):
            return spell(self._use(node))
        if node.target in VIEWS:
            source = operands(node)[0]
            return spell_view(self._text(source), values[source], values[node], self._local, self._is_flexible)
        if node.target is aten.expand.default:
            source = operands(node)[0]
            return spell_expand(self._text(source), values[source], values[node], self._local)
        module = getattr(node.target, "__module__", "")
        if module.startswith("meshwright.runtime"):
            self.runtime.add(node.target.__name__)  # type: ignore[union-attr]
        return spell(self._use(node))

    def _joins_bias(self, node: fx.Node) -> bool:
        first = node.args[0] if node.args else None
        return isinstance(first, fx.Node) and first in self.folded and self._is_bias(first, node)

    def _use(self, node: fx.Node) -> Use:
        def written(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return self._text(argument)
            return self._in_code(argument) if isinstance(argument, sympy.Expr) else argument

        args: Any
        kwargs: Any
        args, kwargs = map_aggregate((node.args, dict(node.kwargs)), written)
        given: dict[str, Any] = dict(node.kwargs)
        if conversion_of(node) and isinstance(given.get("groups"), sympy.Expr):
            # The groups of a dim are those that the rank has, whatever it is converted to on this axis.
            axes = {axis: size for axis, size in self.axes.items() if axis != node.args[1]}
            groups = self._in_code(given["groups"], _pieces(self.function.values[node], given["dim"], axes))
            kwargs = {**kwargs, "groups": groups}
        return Use(
            target=node.target,
            args=tuple(args),
            kwargs=kwargs,
            operands=tuple(self.function.values[n] for n in operands(node) if n in self.function.values),
            result=self.function.values.get(node),
            local=self._local,
            device=self._device(),
        )

    def _device(self) -> str:
        names = [self.names[n] for n in self.function.inputs()]
        return f"{names[0]}.device" if names else "None"

    def _is_flexible(self, value: Value, dim: int) -> bool:
        """Whether a size is better not written: it differs with the mesh, or it is the batch."""
        size = value.shape[dim]
        return self._is_split(value, dim) or (isinstance(size, sympy.Expr) and size.has(BATCH))

    def _is_split(self, value: Value, dim: int) -> bool:
        """Whether a rank has a piece of a dim; a symbolic batch is not meant, which B stands for on every rank."""
        fixed = isinstance(value.shape[dim], int)
        return any(t.is_split and t.dim == dim for axis, t in value.types.items() if fixed or axis not in BATCH_AXES)

    def _local(self, value: Value, dim: int, factor: Factor | None = None) -> str:
        """The size of a dim as a rank has it, or of one of its factors, in the symbols of the code."""
        if factor is None:
            return str(self._in_code(value.shape[dim], _pieces(value, dim, self.axes)))
        split = [a for a, t in value.types.items() if groups_of(factor, factor.results[0], t) is not None]
        return str(self._in_code(factor.size, math.prod(self.axes.get(axis, 1) for axis in split)))

    def _in_code(self, size: Any, pieces: int = 1) -> Any:
        """One of ``pieces`` of a size of the whole model, in the symbols of the code: those are the sizes of inputs,
        of which a rank may have a piece.
        """
        if not isinstance(size, sympy.Expr):
            return size // pieces
        self.symbols |= {str(symbol) for symbol in size.free_symbols}
        scales = {symbol: self._place_of(str(symbol))[1] * symbol for symbol in size.free_symbols}
        numerator, denominator = sympy.fraction(sympy.cancel(size.subs(scales, simultaneous=True) / pieces))
        return numerator if denominator == 1 else sympy.Symbol(f"({numerator}) // {denominator}")

    def _symbol_lines(self) -> list[Line]:
        """``T = input_ids.shape[1]`` for every size that the code names."""
        return [Line(code=f"{symbol} = {self._place_of(symbol)[0]}", margin="") for symbol in sorted(self.symbols)]

    def _place_of(self, symbol: str) -> tuple[str, int]:
        """Where the code reads a size, and in how many pieces it is cut there. Raises InternalError if nowhere."""
        found = [
            (_pieces(value, dim, self.axes), self.names[node], dim)
            for node in self.function.inputs()
            for value in (self.function.values[node],)
            for dim, size in enumerate(value.shape)
            if str(size) == symbol
        ]
        if not found:
            raise InternalError(f"no input of the function has the size {symbol}")
        pieces, name, dim = min(found, key=lambda place: place[0])
        return f"{name}.shape[{dim}]", pieces


def _pieces(value: Value, dim: int, axes: Mapping[str, int]) -> int:
    """In how many pieces a dim is cut."""
    return math.prod(axes.get(axis, 1) for axis, t in value.types.items() if t.is_split and t.dim == dim)


def _is_light(node: fx.Node) -> bool:
    """Whether a value may be computed in the middle of another line."""
    light = (
        aten.to.dtype,
        aten.logsumexp.default,
        aten.mean.dim,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.arange.default,
    )
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or node.target in light or node.target in FOLDED_VIEWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How an instance of a block is called: by its own attribute, or as part of a loop over ``count`` instances.

    carried: the argument that each instance hands to the next; last: the last node of the loop. skip: written by the
    loop.
    """

    last: fx.Node
    attribute: str = ""
    loop: str | None = None
    variable: str = "layer"
    count: int = 1
    carried: int = 0
    skip: bool = False


def _comment(text: str) -> str:
    """Text of the model's own as it may stand in a comment: one line."""
    return " ".join(text.split())
