"""Where code and margin stand on a line: the margins in one column, lines that are too long broken."""

import ast
from collections.abc import Iterable

from meshwright.codegen.views import Line

CODE = 82
"""Width of the code of a forward; the margin follows."""
LINE = 120 - 8
"""Width of a line without its indent."""


def forward_lines(lines: Iterable[Line]) -> list[str]:
    """Lines with their margins in one column, empty lines between sections."""
    out: list[str] = []
    for line in lines:
        if line.blank and out and out[-1] != "":
            out.append("")
        if line.is_comment:
            out.append(f"{line.code:<{CODE}}  {line.margin}".rstrip())
        elif line.margin and max(CODE, len(line.code)) + len(line.margin) + 4 <= LINE:
            out.append(f"{line.code:<{CODE}}  # {line.margin}")
        else:
            out += broken(line.code, line.margin)
    return out


def declared_lines(lines: Iterable[Line]) -> list[str]:
    """Lines with their margins behind the longest that has room for one."""
    lines = list(lines)
    short = [line for line in lines if len(line.code) + len(line.margin) + 4 <= LINE]
    width = max((len(line.code) for line in short), default=0)
    out: list[str] = []
    for line in lines:
        aligned = f"{line.code:<{width}}  # {line.margin}"
        out += [aligned] if line in short and len(aligned) <= LINE else broken(line.code, line.margin)
    return out


def broken(code: str, margin: str = "") -> list[str]:
    """A line that is too long, broken behind the parenthesis of its outermost call as a formatter would."""
    beside = f"  # {margin}" if margin else ""
    if len(code) <= LINE:
        return [f"{code}{beside}" if len(code) + len(beside) <= LINE else code]
    start = code.find("(", code.find(" = ") + 1)
    if not code.endswith(")") or start < 0:
        return [code]
    inside = code[start + 1 : -1]
    parts = [inside] if len(inside) + 4 <= LINE else [f"{argument}," for argument in _arguments(inside)]
    return [code[: start + 1], *(f"    {part}" for part in parts), f"){beside}"]


def imported(names: Iterable[str]) -> str:
    """Names behind ``from meshwright.runtime import``, one on a line where they are too many for one."""
    names = sorted(names)
    line = ", ".join(names)
    inside = "".join(f"    {name},\n" for name in names)
    return line if len(line) <= 120 - len("from meshwright.runtime import ") else f"(\n{inside})"


def _arguments(inside: str) -> list[str]:
    """The arguments of a call, from the text between its parentheses; all as one where that is no call's."""
    (statement,) = ast.parse(f"_({inside})").body
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return [inside]
    parts: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    text = inside.encode()  # what ast counts is bytes
    return [text[part.col_offset - 2 : (part.end_col_offset or 0) - 2].decode() for part in parts]
