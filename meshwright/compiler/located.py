"""The nodes of a graph beside the user's source: what every frame of a node runs, and where values are used."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from meshwright.compiler.frames import Frame, frames, module_stack
from meshwright.compiler.sources import Place, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One frame of a node with what it runs; ``module`` is the position of its module in the node's module stack."""

    frame: Frame
    place: Place
    module: int


class Located:
    """Reads the graph and the files that it names; levels count the steps of a node from the outermost, 0."""

    def __init__(self, graph: fx.Graph):
        self.stacks = {node: tuple(path for path, _ in module_stack(node)) for node in graph.nodes}
        self._with_submodules = {path.rpartition(".")[0] for stack in self.stacks.values() for path in stack if path}
        self._sources = Sources()
        self._steps: dict[fx.Node, tuple[Step, ...]] = {}

    def steps(self, node: fx.Node) -> tuple[Step, ...]:
        """The frames of a node that have source, outermost first, less decorators that only pass their arguments on."""
        if node not in self._steps:
            last = len(self.stacks[node]) - 1
            located = [(frame, self._sources.locate(frame)) for frame in frames(node)]
            self._steps[node] = tuple(
                Step(frame=frame, place=place, module=last - frame.modules_inside)
                for frame, place in located
                if place is not None and not place.forwards()
            )
        return self._steps[node]

    def enclosing(self, node: fx.Node, level: int) -> fx.Node | None:
        """What uses more than a view of the value in an expression around it, in the same statement at ``level``."""
        place = self.steps(node)[level].place
        for user in node.users:
            if not self._in_same_call(node, user, level) or not place.is_part_of(self.steps(user)[level].place):
                continue
            is_direct = level == len(self.steps(user)) - 1 and not self.steps(user)[level].frame.modules_inside
            found = self.enclosing(user, level) if is_direct and is_view(user) else user
            if found is not None:
                return found
        return None

    def leaves(self, node: fx.Node, level: int) -> bool:
        """Whether the call at ``level`` itself uses only views of the value, or the rest of the same operator."""
        inside = [user for user in node.users if self._in_same_call(node, user, level)]
        return all((is_view(user) or self._in_same_place(node, user)) and self.leaves(user, level) for user in inside)

    def is_helper(self, node: fx.Node, level: int) -> bool:
        """Whether the function at ``level`` is a plain function, or belongs to a module without submodules."""
        module, stack = self.steps(node)[level].module, self.stacks[node]
        return not self.is_module(node, level) or not (0 <= module < len(stack) and self.has_submodules(stack[module]))

    def has_submodules(self, path: str) -> bool:
        """Whether a module, by its path, calls other modules."""
        return path in self._with_submodules

    def is_module(self, node: fx.Node, level: int) -> bool:
        """Whether the function at ``level`` is the ``forward`` of a module, called by the level before."""
        steps = self.steps(node)
        return level == 0 or steps[level].module != steps[level - 1].module

    def _in_same_place(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether two nodes are parts of what the source writes as one operator: a linear and its bias."""
        pairs = zip(self.steps(node), self.steps(user), strict=False)
        same = all(our.place.expression is their.place.expression for our, their in pairs)
        return same and len(self.steps(node)) == len(self.steps(user)) and self.stacks[node] == self.stacks[user]

    def _in_same_call(self, node: fx.Node, user: fx.Node, level: int) -> bool:
        ours, theirs = self.steps(node), self.steps(user)
        if len(theirs) <= level or theirs[level].place.function is not ours[level].place.function:
            return False
        depth = ours[level].module + 1
        if self.stacks[node][:depth] != self.stacks[user][:depth]:
            return False
        pairs = zip(ours[:level], theirs[:level], strict=True)
        return all(our.place.expression is their.place.expression for our, their in pairs)


def is_view(node: fx.Node) -> bool:
    """Whether a value is a view, a cast or a copy of its first input, or one of several results."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.returns:
        return False
    if node.target in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
        return True
    alias: Any = node.target._schema.returns[0].alias_info
    return alias is not None and not alias.is_write


def operator_name(node: fx.Node) -> str:
    """The bare name of what a node calls: "linear", "softmax"."""
    name = node.target.__name__ if callable(node.target) else str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.rpartition("::")[2]
    return name.strip("_")
