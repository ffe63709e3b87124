"""What the templates read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a function: code, what stands in the margin, and whether an empty line comes before it."""

    code: str
    margin: str
    blank: bool = False
    is_comment: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassView:
    """A class of a stage file. ``init`` and ``forward`` are finished lines without their indent."""

    name: str
    docstring: str
    init: tuple[str, ...]
    arguments: str
    inputs: str
    forward: tuple[str, ...]
    prepare_arguments: str = ""
    prepare_docstring: str = ""
    prepare: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """A stage file. ``registering``: (module, the operators that its import registers)."""

    docstring: str
    legend: tuple[tuple[str, str], ...]
    uses_functional: bool
    uses_torch: bool
    runtime: str
    registering: tuple[tuple[str, str], ...]
    classes: tuple[ClassView, ...]
