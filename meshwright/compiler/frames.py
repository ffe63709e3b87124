"""Where in the user's source the nodes of a captured graph come from.

While ``keep_all_frames`` is active every node's ``meta["stack_trace"]`` has the model's frames, helpers included, less
those of torch and Meshwright. A comment behind each source line says which columns run and how many modules were
entered further in, because the line alone does not tell the parts of an expression apart.
"""

import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import fx
from torch.fx.proxy import TracerBase

Span = tuple[int, int, int, int]
"""First line, its column, last line, its column after the last character; lines from 1, columns in bytes from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One call on the way from the model's ``forward`` to an operator.

    span: the expression that runs, if Python knows its columns.
    modules_inside: how many modules were entered after this frame.
    """

    file: str
    line: int
    function: str
    span: Span | None = None
    modules_inside: int = 0


_OWN = tuple(f"{Path(package).parent}/" for package in (torch.__file__, Path(__file__).parent))
_DISPATCH = ("__torch_function__", "__torch_dispatch__")
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def raised_at(error: BaseException) -> str:
    """``model.py:28 in forward``: the innermost of the user's lines that raised ``error``, or nothing."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN) and f.lineno]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


@contextmanager
def keep_all_frames() -> Iterator[None]:
    """Enter this around ``torch.export.export(..., strict=False)``; afterwards ``frames`` knows helpers and columns.

    torch keeps only the frames of functions called ``forward``, so that all values of a helper would share one line.
    """
    before = TracerBase._filter_traceback_frames
    positions: dict[CodeType, list[tuple[int | None, ...]]] = {}

    def keep(self: TracerBase, user_stack_summary: traceback.StackSummary) -> traceback.StackSummary:
        kept = _user_frames(sys._getframe(1), positions)
        return traceback.StackSummary.from_list([_summary(frame) for frame in kept])

    TracerBase._filter_traceback_frames = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = before  # type: ignore[method-assign]


def _user_frames(innermost: FrameType, positions: dict[CodeType, list[tuple[int | None, ...]]]) -> list[Frame]:
    """The frames of the model's code, outermost first."""
    stack, current = [], innermost
    while current.f_back is not None:
        stack.append(current)
        current = current.f_back
    entered, found = 0, []
    for frame in reversed(stack):
        code = frame.f_code
        if code.co_name == "_call_impl" and code.co_filename.endswith("/nn/modules/module.py"):
            entered += 1
        elif entered and not code.co_filename.startswith(_OWN) and code.co_name not in _DISPATCH:
            found.append((frame, entered))
    result: list[Frame] = []
    for frame, modules in found:
        code = frame.f_code
        if code not in positions:
            positions[code] = list(code.co_positions())
        line, last, column, end = positions[code][frame.f_lasti // 2]
        known = line is not None and last is not None and column is not None and end is not None
        here = Frame(
            file=code.co_filename, line=frame.f_lineno, function=code.co_name, modules_inside=entered - modules,
            span=(line, column, last, end) if known else None,  # type: ignore[arg-type]
        )  # fmt: skip
        # Python 3.12 has no frames for comprehensions any more: the same picture for 3.11.
        if here.function in _COMPREHENSIONS and result and result[-1].file == here.file:
            result.pop()
        result.append(here)
    return result


def _summary(frame: Frame) -> traceback.FrameSummary:
    line = linecache.getline(frame.file, frame.line).strip()
    place = "{}:{}-{}:{}".format(*frame.span) if frame.span else "?"
    return traceback.FrameSummary(
        frame.file, frame.line, frame.function, lookup_line=False, line=f"{line}  # {place} +{frame.modules_inside}"
    )


_FRAME = re.compile(
    r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>\S+)'
    r"(?:\n.*  # (?:(?P<span>\d+:\d+-\d+:\d+)|\?) \+(?P<inside>\d+)$)?",
    re.MULTILINE,
)


def frames(node: fx.Node) -> tuple[Frame, ...]:
    """The frames of a node, outermost first; empty for nodes without a source."""
    result = []
    for match in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        numbers = [int(number) for number in re.findall(r"\d+", match["span"] or "")]
        result.append(
            Frame(
                file=match["file"],
                line=int(match["line"]),
                function=match["function"],
                span=(numbers[0], numbers[1], numbers[2], numbers[3]) if numbers else None,
                modules_inside=int(match["inside"] or 0),
            )  # fmt: skip
        )
    return tuple(result)


def module_stack(node: fx.Node, prefix: str = "model") -> tuple[tuple[str, str], ...]:
    """(module path, class name) of the modules around a node, outermost first.

    prefix: the attribute of the captured wrapper that is the model; the model's own path becomes "", and modules
    outside of it are left out.
    """
    result = []
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        path = re.sub(r"@\d+$", "", path)  # torch numbers the calls of a module that is called again
        if not prefix or path == prefix or path.startswith(f"{prefix}."):
            name = cls.rsplit(".", 1)[-1] if isinstance(cls, str) else cls.__name__
            result.append((path.removeprefix(prefix).lstrip("."), name))
    return tuple(result)
