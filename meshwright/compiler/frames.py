"""Where in the user's source the nodes of a captured graph come from."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.proxy import TracerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    file: str
    line: int
    function: str


_OWN = re.compile(r"/torch/(nn/modules|nn/functional|_|fx|export|utils|overrides|functional|autograd)")


@contextmanager
def keep_all_frames() -> Iterator[None]:
    before = TracerBase._filter_traceback_frames

    def keep(self: Any, summary: traceback.StackSummary) -> traceback.StackSummary:
        first = next((i for i, f in enumerate(summary) if f.name == "forward"), len(summary))
        return traceback.StackSummary.from_list([f for f in summary[first:] if not _OWN.search(f.filename)])

    TracerBase._filter_traceback_frames = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = before  # type: ignore[method-assign]


_LINE = re.compile(r'File "(.+)", line (\d+), in (\S+)')


def frames(node: fx.Node) -> tuple[Frame, ...]:
    return tuple(Frame(file=a, line=int(b), function=c) for a, b, c in _LINE.findall(node.meta.get("stack_trace") or ""))


def module_stack(node: fx.Node, prefix: str = "model") -> tuple[tuple[str, str], ...]:
    result = []
    for path, cls in (node.meta.get("nn_module_stack") or {}).values():
        if path == prefix or path.startswith(prefix + "."):
            name = cls.rsplit(".", 1)[-1] if isinstance(cls, str) else cls.__name__
            result.append((path[len(prefix):].lstrip("."), name))
    return tuple(result)
