"""Reading the user's source: which expression of which statement a frame runs, and which names it binds and reads."""

import ast
import linecache
from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.compiler.frames import Frame, Span

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A parsed file.

    parents: the node around each node. spans: the nodes at each span, outermost first.
    imported: the names that imports bind.
    """

    parents: dict[ast.AST, ast.AST]
    spans: dict[Span, list[ast.AST]]
    imported: frozenset[str]

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around ``node``, innermost first."""
        while node in self.parents:
            node = self.parents[node]
            yield node


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """What one frame runs.

    statement: the innermost statement around the expression; a lambda when the expression is inside its result.
    function: the function or lambda around the statement; None at the top of a file.
    """

    source: Source
    expression: ast.AST
    statement: ast.stmt | ast.Lambda
    function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None

    def is_part_of(self, other: "Place") -> bool:
        """Whether ``other`` runs an expression around this one."""
        return self.expression is not other.expression and other.expression in self.source.around(self.expression)

    def parameters(self) -> list[str]:
        """The names of the positional parameters of the function, in order."""
        arguments = self.function.args if self.function else None
        return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)] if arguments else []

    def assignments(self, name: str, before: int) -> list[ast.stmt]:
        """The statements of the function that bind ``name`` before a line, the latest first."""
        names = [node for node in self.inside() if isinstance(node, ast.Name) and node.lineno < before]
        bound = [node for node in names if node.id == name and isinstance(node.ctx, ast.Store)]
        found = [next(n for n in self.source.around(node) if isinstance(n, ast.stmt)) for node in bound]
        return sorted(found, key=lambda statement: -statement.lineno)

    def value(self) -> ast.expr | None:
        """The value of the statement, if it has one."""
        value = getattr(self.statement, "body" if isinstance(self.statement, ast.Lambda) else "value", None)
        return value if isinstance(value, ast.expr) else None

    def inside(self) -> list[ast.AST]:
        """The nodes of the function."""
        return list(ast.walk(self.function)) if self.function else []

    def forwards(self) -> bool:
        """Whether the frame only passes its arguments on, as decorators do: ``f(*args, **kwargs)``."""
        call, function = self.expression, self.function
        if not isinstance(call, ast.Call) or function is None or not (function.args.vararg and function.args.kwarg):
            return False
        starred = {getattr(a.value, "id", "") for a in call.args if isinstance(a, ast.Starred)}
        double = {getattr(keyword.value, "id", "") for keyword in call.keywords if keyword.arg is None}
        return function.args.vararg.arg in starred and function.args.kwarg.arg in double


class Sources:
    """Parses every file once. Source that is missing or odd gives None, never an error."""

    def __init__(self) -> None:
        self._files: dict[str, Source | None] = {}
        self._places: dict[Frame, Place | None] = {}

    def locate(self, frame: Frame) -> Place | None:
        """What ``frame`` runs, as exactly as its span tells; without a span the value of the statement on its line."""
        if frame not in self._places:
            self._places[frame] = self._locate(frame)
        return self._places[frame]

    def _locate(self, frame: Frame) -> Place | None:
        if frame.file not in self._files:
            self._files[frame.file] = _parse(frame.file)
        source = self._files[frame.file]
        expression = _expression(source, frame) if source is not None else None
        if source is None or expression is None:
            return None
        around = [*source.around(expression)]
        enclosing = [expression, *around] if isinstance(expression, ast.stmt) else around
        statement = next((node for node in enclosing if isinstance(node, (ast.stmt, ast.Lambda))), None)
        if statement is None:
            return None
        outer = [statement] if isinstance(statement, ast.Lambda) else [*source.around(statement)]
        function = next((node for node in outer if isinstance(node, _FUNCTIONS)), None)
        return Place(source=source, expression=expression, statement=statement, function=function)


def _parse(file: str) -> Source | None:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError, RecursionError):
        return None
    parents: dict[ast.AST, ast.AST] = {}
    spans: dict[Span, list[ast.AST]] = {}
    imported: set[str] = set()
    for node in ast.walk(tree):
        parents.update((child, node) for child in ast.iter_child_nodes(node))
        if isinstance(node, (ast.expr, ast.stmt)):
            spans.setdefault(_span(node), []).append(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return Source(parents=parents, spans=spans, imported=frozenset(imported)) if spans else None


def _span(node: ast.expr | ast.stmt) -> Span:
    return node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def _expression(source: Source, frame: Frame) -> ast.AST | None:
    """The expression that a frame runs, or the statement itself for an augmented assignment."""
    if frame.span in source.spans:
        found = source.spans[frame.span]
        # `f(x)` as a statement of its own has the same span twice.
        return next((node for node in found if isinstance(node, (ast.expr, ast.AugAssign))), found[0])
    if frame.span is not None:
        # Python gives a method call that goes over several lines the line of the method's name as its first.
        ends = [node for span, nodes in source.spans.items() if span[2:] == frame.span[2:] for node in nodes]
        calls = [node for node in ends if isinstance(node, ast.Call)]
        if calls:
            return calls[0]
    on_line = [
        node
        for span, nodes in source.spans.items()
        if span[0] <= frame.line <= span[2]
        for node in nodes
        if isinstance(node, ast.stmt) and not hasattr(node, "body")
    ]
    if not on_line:
        return None
    statement = min(on_line, key=lambda node: (node.end_lineno or 0) - node.lineno)
    value = getattr(statement, "value", None)
    return value if isinstance(value, ast.expr) and not isinstance(statement, ast.AugAssign) else statement
