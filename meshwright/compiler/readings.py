"""Under which names the user's source reads a value: aliases, and the formal arguments of modules."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from meshwright.compiler.located import Located
from meshwright.compiler.sources import Place
from meshwright.compiler.statements import base_name, is_method_of_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """``name`` is read by the function at ``level``; ``is_alias``: a plain assignment gave it (``residual = x``)."""

    level: int
    name: str
    is_alias: bool


def aliases(located: Located, value: fx.Node) -> tuple[str, ...]:
    """The names that plain assignments give ``value`` and that its users read."""
    found = [r.name for user in value.users for r in readings(located, value, user) if r.is_alias]
    return tuple(dict.fromkeys(found))


def readings(located: Located, value: fx.Node, user: fx.Node) -> Iterator[Reading]:
    """The names under which ``value`` is passed down to ``user``, from the innermost function outward."""
    steps = located.steps(user)
    level = len(steps) - 1
    made = located.steps(value)
    statements = {step.place.statement for step in made}
    is_inside = bool(steps and made) and made[-1].place.is_part_of(steps[-1].place)
    name = _operand(steps[level].place, value, user) if steps and not is_inside else None
    while name is not None:
        place = steps[level].place
        names, is_parameter = _renamings(place, name, statements)
        for variable, is_alias in names:
            yield Reading(level=level, name=variable, is_alias=is_alias)
        name = _argument(steps[level - 1].place, place, names[-1][0]) if level and is_parameter else None
        level -= 1


def _renamings(
    place: Place, name: str, made_by: set[ast.stmt | ast.Lambda]
) -> tuple[tuple[tuple[str, bool], ...], bool]:
    """``name`` and the variables that it was assigned from before, with whether each was assigned plainly.

    Also whether the last may be a parameter: False when one of the statements ``made_by`` assigned it.
    """
    for statement in place.assignments(name, place.statement.lineno):
        if statement in made_by:
            return ((name, False),), False
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        is_single = isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(targets[0], ast.Name)
        assigned: ast.AST | None = getattr(statement, "value", None) if is_single else None
        source = base_name(assigned, place.source)
        # An assignment that makes another value did not run here, or computes nothing: a cast to the own dtype, say.
        if source is not None:
            names, is_parameter = _renamings(replace(place, statement=statement), source, made_by)
            return ((name, isinstance(assigned, ast.Name)), *names), is_parameter
    return ((name, False),), True


def _operand(place: Place, value: fx.Node, user: fx.Node) -> str | None:
    """The variable that the expression of ``user`` reads ``value`` from."""
    expression = place.expression
    operands: list[ast.AST]
    if isinstance(expression, ast.BinOp):
        operands = [expression.left, expression.right]
    elif isinstance(expression, ast.AugAssign):
        operands = [expression.target, expression.value]
    elif isinstance(expression, ast.Compare):
        operands = [expression.left, *expression.comparators]
    elif isinstance(expression, ast.Call):
        is_method = is_method_of_value(expression, place.source)
        receiver = [expression.func.value] if is_method and isinstance(expression.func, ast.Attribute) else []
        operands = [*receiver, *expression.args, *(keyword.value for keyword in expression.keywords)]
    else:
        operands = [_only_operand(expression)]
    operands = [part for operand in operands for part in getattr(operand, "elts", [operand])]
    every = (*user.args, *user.kwargs.values())
    arguments = [part for item in every for part in (item if isinstance(item, (list, tuple)) else [item])]
    position = next((i for i, argument in enumerate(arguments) if argument is value), len(operands))
    return base_name(operands[position], place.source) if position < len(operands) else None


def _only_operand(expression: ast.AST) -> ast.AST:
    found: ast.AST = getattr(expression, "value", getattr(expression, "operand", expression))
    return found


def _argument(caller: Place, place: Place, name: str) -> str | None:
    """The variable that ``caller`` passes as the parameter ``name`` of the function of ``place``."""
    call, parameters = caller.expression, place.parameters()
    if not isinstance(call, ast.Call) or name not in parameters:
        return None
    by_keyword = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    if by_keyword is not None:
        return base_name(by_keyword, caller.source)
    is_bound = parameters[0] == "self" and not (call.args and getattr(call.args[0], "id", None) == "self")
    position = parameters.index(name) - is_bound
    if position >= len(call.args) or any(isinstance(argument, ast.Starred) for argument in call.args[: position + 1]):
        return None
    return base_name(call.args[position], caller.source)
