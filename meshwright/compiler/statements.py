"""What statements of the user's source name: variables read, functions called, targets assigned, values returned."""

import ast
import itertools

from meshwright.compiler.sources import Place, Source

_SAYS_NOTHING = frozenset({"out", "output", "outputs", "res", "result", "results", "ret", "tmp"})


def says_nothing(name: str) -> bool:
    """Whether a name is so general that the caller's is better."""
    return len(name) == 1 or name in _SAYS_NOTHING


def base_name(node: ast.AST | None, source: Source) -> str | None:
    """The variable that a chain of attributes, subscripts and method calls begins with, also an attribute of ``self``.

    ``hidden_states[:, -1].float()`` -> "hidden_states", ``self.weight.T`` -> "weight", ``torch.cat(x)`` -> None
    """
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr
        elif isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        else:
            break
    is_variable = isinstance(node, ast.Name) and node.id != "self" and node.id not in source.imported
    return node.id if is_variable else None  # type: ignore[union-attr]


def callee(node: ast.AST | None) -> str | None:
    """The last name of what is called: ``self.mlp.up_proj(x)`` -> "up_proj", ``self.experts[i](x)`` -> "experts"."""
    function = node.func if isinstance(node, ast.Call) else None
    while isinstance(function, ast.Subscript):
        function = function.value
    return getattr(function, "attr", getattr(function, "id", None))


def is_of_self(node: ast.AST) -> bool:
    """Whether a call calls something of ``self``: a submodule, or a method."""
    return isinstance(node, ast.Call) and _root(node.func) == "self"


def is_method_of_value(node: ast.AST, source: Source) -> bool:
    """Whether a call calls a method of a value, such as ``x.pow(2)``, and not a function, or something of ``self``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return _root(node.func) not in {"self", *source.imported}


def _root(node: ast.AST) -> str | None:
    """The variable that a chain of attributes and subscripts begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assigned_name(place: Place, item: int | None = None, count: int | None = None) -> str | None:
    """The name that the statement gives to the value of the expression, or to item ``item`` of ``count`` of it.

    None where it gives none, where the numbers do not agree, and for ``_``.
    """
    around, statement = place.source.parents.get(place.expression), place.statement
    if isinstance(around, ast.NamedExpr):
        return around.target.id if item is None else None
    field = field_of(place)
    if isinstance(field, str):
        return field
    for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
        if isinstance(target, (ast.Tuple, ast.List)):
            if field is not None:
                item, count = field, len(getattr(place.value(), "elts", ()))
            elements = list(itertools.takewhile(lambda element: not isinstance(element, ast.Starred), target.elts))
            agrees = item is not None and item < len(elements) and count in (None, len(target.elts))
            found = target_name(elements[item], place.source) if agrees and item is not None else None
        elif item is None and field is None:
            found = target_name(target, place.source)
        else:
            found = _unpacked(place, target, field if item is None else item)
        if found and found != "_":
            return found
    return None


def field_of(place: Place) -> int | str | None:
    """Where in the statement's tuple, dict or dataclass the expression stands: 1, or "logits"; None if in none."""
    value = place.value()
    chain = [place.expression, *place.source.around(place.expression)]
    if value not in chain:
        return None
    inside = chain[: chain.index(value)]
    if isinstance(value, (ast.Tuple, ast.List)) and inside:
        return value.elts.index(inside[-1])  # type: ignore[arg-type]
    if isinstance(value, ast.Dict) and inside and inside[-1] in value.values:
        key = value.keys[value.values.index(inside[-1])]
        return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
    is_class = (callee(value) or "")[:1].isupper()
    return inside[-1].arg if is_class and inside and isinstance(inside[-1], ast.keyword) else None


def _unpacked(place: Place, target: ast.AST | None, item: int | None) -> str | None:
    """The name under which the function takes ``item`` out of ``target`` later: ``hidden_states = outputs[0]``."""
    for node in place.inside():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and isinstance(target, ast.Name):
            source, index = node.value.value, node.value.slice
            is_same = isinstance(source, ast.Name) and source.id == target.id
            if is_same and isinstance(index, ast.Constant) and index.value == item:
                return target_name(node.targets[0], place.source)
    return None


def target_name(target: ast.AST | None, source: Source) -> str | None:
    """The name that an assignment to ``target`` gives: a variable, an attribute, a constant key."""
    if isinstance(target, ast.Subscript):
        key = target.slice.value if isinstance(target.slice, ast.Constant) else None
        return key if isinstance(key, str) and key.isidentifier() else base_name(target, source)
    return getattr(target, "attr", getattr(target, "id", None))


def returned_as(place: Place, name: str) -> tuple[int | None, int | None] | None:
    """How the function returns a variable: (None, None) alone, (item, count) in a tuple; None if it does not."""
    for node in place.inside():
        if not isinstance(node, ast.Return) or node.lineno < place.statement.lineno:
            continue
        if base_name(node.value, place.source) == name:
            return None, None
        if isinstance(node.value, ast.Tuple):
            names = [base_name(element, place.source) for element in node.value.elts]
            if names.count(name) == 1:
                return names.index(name), len(names)
    return None
