"""Names for values, from the user's source: what the emitted code calls them, and under which comment they stand.

A value is named by the assignment target of the innermost statement whose value it is. What leaves a helper takes the
caller's target where the numbers agree, and so does what leaves a module without submodules, which is like an operator;
what leaves another module keeps its own name. ``return`` passes the question to the caller. A part of a larger
expression is named by what is called (``rotate_half``, ``gate_proj``), or goes by the name of the whole.
"""

import ast
import builtins
import keyword
import operator
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import fx

from meshwright.compiler.frames import frames
from meshwright.compiler.located import Located, is_view, operator_name
from meshwright.compiler.readings import aliases, readings
from meshwright.compiler.sections import Sections
from meshwright.compiler.sources import Place
from meshwright.compiler.statements import (
    assigned_name,
    base_name,
    callee,
    field_of,
    is_method_of_value,
    returned_as,
    says_nothing,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value comes from in the user's source.

    name: the preferred variable name, an identifier that is neither a keyword nor a builtin; not unique.
    statement: (file, first line) of the innermost statement; ("", 0) where nothing is known.
    outer: (file, first line) of the statement in the ``forward`` of the enclosing block, or else of the model.
    module_path: the innermost module around it, in the model.
    section: the text of the section comment it stands under; "" for what the enclosing ``forward`` does itself, which
        goes on with the section before (at the top: belongs to the one that follows).
    is_name_of_statement: False for a nameless part of a larger expression: a user of it, or of a view of it, is in the
        same statement, into which it may be folded.
    aliases: further names that plain assignments give it and its users read (``residual = hidden_states``).
    """

    name: str
    statement: tuple[str, int]
    outer: tuple[str, int]
    module_path: str
    section: str
    is_name_of_statement: bool
    aliases: tuple[str, ...]


def origins(graph: fx.Graph, reserved: Set[str] = frozenset()) -> dict[fx.Node, Origin]:
    """The origin of every input and every call of ``graph``, from "stack_trace" and "nn_module_stack" in ``meta``.

    A pass that makes a node gives it the two of the node that it stands for, and may name it in ``meta["name"]``.

    Names in ``reserved`` get an underscore behind them, as builtins and keywords do. Never raises on odd or missing
    source: names then come from modules and operators (``linear``), without numbers.
    """
    located = Located(graph)
    sections = Sections(located.stacks.values())
    result: dict[fx.Node, Origin] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function"):
            continue
        steps, stack = located.steps(node), located.stacks[node]
        named = _named(located, node)
        name = free_name(named.name or _fallback(located, node, result), reserved)
        section, outer = sections.of(stack, steps, operator_name(node))
        found = frames(node)
        somewhere = (found[-1].file, found[-1].line) if found else ("", 0)
        result[node] = Origin(
            name=name,
            statement=(steps[-1].frame.file, steps[-1].place.statement.lineno) if steps else somewhere,
            outer=(outer.frame.file, outer.place.statement.lineno) if outer else somewhere,
            module_path=stack[-1] if stack else "",
            section=section,
            is_name_of_statement=named.is_whole,
            aliases=tuple(a for alias in aliases(located, node) if (a := free_name(alias, reserved)) != name),
        )
    return result


def formal_name(value: fx.Node, users: Mapping[fx.Node, None], module_path: str) -> str | None:
    """The name under which the module at ``module_path`` reads ``value``, found from those of ``users`` inside it.

    For the arguments of a block: what the model calls ``inputs_embeds`` is ``hidden_states`` inside its first layer.
    """
    located = Located(value.graph)
    for user in users:
        stack = located.stacks[user]
        if module_path in stack:
            steps = located.steps(user)
            read = [r.name for r in readings(located, value, user) if steps[r.level].module >= stack.index(module_path)]
            if read:
                return free_name(read[-1])
    return None


def free_name(name: str, reserved: Set[str] = frozenset()) -> str:
    """``name`` as an identifier that is no keyword, builtin or reserved name: ``input`` -> "input_"."""
    name = re.sub(r"\W", "_", name).strip("_") or "value"
    name = f"_{name}" if name[0].isdigit() else name
    return f"{name}_" if name in reserved or name in _TAKEN else name


_TAKEN = frozenset({"self", *keyword.kwlist, *dir(builtins)})


@dataclass(frozen=True, slots=True)
class _Named:
    """``is_whole``: the name is that of the whole statement, not of a part."""

    name: str | None
    is_whole: bool


def _named(located: Located, node: fx.Node) -> _Named:
    if node.op == "placeholder" or "name" in node.meta:
        return _Named(str(node.meta.get("name", node.target)), True)
    steps = located.steps(node)
    if not steps:
        return _Named(None, True)
    level = len(steps) - 1
    item = node.args[1] if node.target is operator.getitem and isinstance(node.args[1], int) else None
    found = _by_expression(located, node, level, item, None)
    return found if found.name else _Named(_part_name(located, node, level), False)


def _by_expression(located: Located, node: fx.Node, level: int, item: int | None, count: int | None) -> _Named:
    """What the frame at ``level`` calls the result of its expression, or item ``item`` of ``count`` of it."""
    if located.enclosing(node, level) is not None:
        return _Named(_part_name(located, node, level), False)
    return _by_statement(located, node, level, item, count)


def _by_statement(located: Located, node: fx.Node, level: int, item: int | None, count: int | None) -> _Named:
    """The same, when only views follow in its statement: the target, or the caller's name for what is returned."""
    place = located.steps(node)[level].place
    statement = place.statement
    name = assigned_name(place, item, count)
    if name is not None:
        return _at_caller(located, node, level, name)
    if not isinstance(statement, (ast.Return, ast.Lambda)) or level == 0:
        return _Named(None, False)
    field = field_of(place)
    if field is not None and (item is not None or isinstance(field, str)):
        return _Named(None, False)
    if isinstance(field, int):
        item, count = field, len(getattr(place.value(), "elts", ()))
    return _by_expression(located, node, level - 1, item, count)


def _at_caller(located: Located, node: fx.Node, level: int, name: str) -> _Named:
    """``name``, or the caller's name for what leaves the function under it."""
    own = _Named(name, True)
    if level == 0 or not (says_nothing(name) or located.is_helper(node, level)) or not located.leaves(node, level):
        return own
    returned = returned_as(located.steps(node)[level].place, name)
    caller = _by_expression(located, node, level - 1, *returned) if returned else own
    name_there = caller.name or (_part_name(located, node, level - 1) if says_nothing(name) else None)
    is_part_named = says_nothing(name) or located.is_module(node, level)
    return _Named(name_there, True) if name_there and (caller.is_whole or is_part_named) else own


def _part_name(located: Located, node: fx.Node, level: int) -> str | None:
    """A name for a part of a larger expression: what is called, or what is viewed; else that of the whole."""
    step = located.steps(node)[level]
    expression, source = step.place.expression, step.place.source
    is_operator = level == len(located.steps(node)) - 1 and not step.frame.modules_inside
    if isinstance(expression, ast.Call) and not (is_operator and is_method_of_value(expression, source)):
        return callee(expression)
    if is_view(node) or isinstance(expression, (ast.Subscript, ast.Attribute)):
        name = base_name(expression, source)
        return None if name in _loop_variables(step.place) else name
    whole = node
    while (user := located.enclosing(whole, level)) is not None:
        whole = user
    return _named(located, whole).name if whole is not node else None


def _loop_variables(place: Place) -> set[str]:
    """The variables of the comprehensions around, which stand for another value each time."""
    around = place.source.around(place.expression)
    loops = [node for node in around if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))]
    targets = [generator.target for loop in loops for generator in loop.generators]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _fallback(located: Located, node: fx.Node, named: Mapping[fx.Node, Origin]) -> str:
    """A name without source: that of what is viewed, of the module without submodules around it, of the operator."""
    sources, stack = node.all_input_nodes, located.stacks[node]
    if is_view(node) and sources and sources[0] in named:
        return named[sources[0]].name
    attribute = stack[-1].rpartition(".")[2] if stack and not located.has_submodules(stack[-1]) else ""
    return attribute if attribute and not attribute.isdigit() else operator_name(node)
