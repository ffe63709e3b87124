"""Under which comment a value stands in the emitted code."""

import re
from collections import Counter
from collections.abc import Collection

from meshwright.compiler.located import Step
from meshwright.compiler.statements import assigned_name, callee, is_of_self, says_nothing

OWN_SECTION = ("cross_entropy", "nll_loss")
"""Operators that open a section of their own where no module does."""

_MIN_OPERATORS = 3
"""A numbered module with fewer values (a lone Linear in a Sequential) is no block."""


class Sections:
    """Knows the blocks among the modules: the outermost in numbered lists."""

    def __init__(self, stacks: Collection[tuple[str, ...]]):
        numbered = Counter(path for stack in stacks if (path := next(filter(_is_numbered, stack), None)))
        self._blocks = {path for path, count in numbered.items() if count >= _MIN_OPERATORS}
        self._around = {path[:end] for path in self._blocks for end in range(len(path)) if path[end] == "."} | {""}

    def of(self, stack: tuple[str, ...], steps: tuple[Step, ...], operator_name: str) -> tuple[str, Step | None]:
        """The text of the comment, and the step of the enclosing block's (or else the model's) ``forward``.

        A section is the submodule of the block; else the helper of ``self``, or what its result is assigned to.
        """
        home = max((i for i, path in enumerate(stack) if path in self._around or path in self._blocks), default=0)
        inside = [step for step in steps if step.module >= home]
        outer = inside[0] if inside else next(reversed(steps), None)
        if len(stack) > home + 1:
            path, parent = stack[home + 1], stack[home]
            return path.removeprefix(f"{parent}.") if parent else path, outer
        for name in (operator_name, callee(steps[-1].place.expression) if steps else None):
            if name and name.startswith(OWN_SECTION):
                return next(own for own in OWN_SECTION if name.startswith(own)), outer
        if outer is None or outer is steps[-1]:
            return "", outer
        called = callee(outer.place.expression)
        title = None if is_of_self(outer.place.expression) else assigned_name(outer.place)
        return (called if title is None or says_nothing(title) else title) or "", outer


def _is_numbered(path: str) -> bool:
    return re.search(r"(^|\.)\d+$", path) is not None
