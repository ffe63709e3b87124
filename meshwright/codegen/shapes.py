"""Views without sizes: merging and splitting neighbours with flatten and unflatten, so that the code fits every
piece.
"""

from collections.abc import Callable

from meshwright.codegen.spelling import Text
from meshwright.compiler.errors import InternalError
from meshwright.compiler.graph import Value
from meshwright.compiler.types import Size
from meshwright.passes.factors import Factor, of_view

IsSplit = Callable[[Value, int], bool]


def spell_view(x: Text, source: Value, target: Value, is_split: IsSplit, size: Callable[[Size], str]) -> Text:
    """Code for ``x`` of shape ``source`` seen as ``target``. Raises InternalError where no view without sizes
    exists.
    """
    code = x.at(20)
    factors = of_view(source.shape, target.shape)
    if _product(factors) != _product_of(source.shape):
        return Text(
            f"{code}.reshape({', '.join(_literal(target, d, is_split, size) for d in range(len(target.shape)))})"
        )
    steps = _unflattened(code, source, target, factors, is_split, size)
    return Text(steps)


def _product(factors: tuple[Factor, ...]) -> Size:
    return _product_of(tuple(f.size for f in factors))


def _product_of(sizes: tuple[Size, ...]) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def _literal(value: Value, dim: int, is_split: IsSplit, size: Callable[[Size], str]) -> str:
    if is_split(value, dim):
        raise InternalError(f"no view without sizes gives the shape {value.shape}, which is split on dim {dim}")
    return size(value.shape[dim])


def _unflattened(
    code: str, source: Value, target: Value, factors: tuple[Factor, ...], is_split: IsSplit, size: Callable[[Size], str]
) -> str:
    """Squeeze, split every dim into its factors, merge groups of factors, unsqueeze."""
    inside: list[list[Factor]] = [[] for _ in source.shape]
    outside: list[list[Factor]] = [[] for _ in target.shape]
    for factor in factors:
        inside[factor.operands[0].dim].append(factor)  # type: ignore[union-attr]
        outside[factor.results[0].dim].append(factor)  # type: ignore[union-attr]
    ones = [dim for dim, group in enumerate(inside) if not group]
    new = [dim for dim, group in enumerate(outside) if not group]
    if ones == new and all(len(g) <= 1 for g in (*inside, *outside)):
        ones = new = []  # dims of size 1 stay where they are
    for dim in reversed(ones):
        code += f".squeeze({dim})"
    groups = [group for group in inside if group]
    position = 0
    for group in groups:
        if len(group) > 1:
            sizes = [_factor_size(f, target, is_split, size) for f in group]
            if sizes.count("-1") == 0:
                sizes[0] = "-1"
            dim = -1 if group is groups[-1] and position else position
            code += f".unflatten({dim}, ({', '.join(sizes)}))"
        position += len(group)
    merged = [group for group in outside if group]
    position, total = 0, len(merged)
    for i, group in enumerate(merged):
        if len(group) > 1:
            stop = position + len(group) - 1
            last = i == total - 1
            span = (str(position) if position else "") if last else f"{position}, {stop}"
            code += f".flatten({span})"
        position += 1
    for dim in new:
        code += f".unsqueeze({dim if dim < len(target.shape) - 1 or len(new) > 1 else -1})"
    return code


def _factor_size(factor: Factor, target: Value, is_split: IsSplit, size: Callable[[Size], str]) -> str:
    place = factor.results[0]
    assert place is not None
    if is_split(target, place.dim) or not isinstance(factor.size, int) and str(factor.size).startswith("B"):
        return "-1"
    return size(factor.size)


def spell_expand(x: Text, source: Value, target: Value, size: Callable[[Size], str]) -> Text:
    """Code for broadcasting: -1 where a dim stays."""
    shift = len(target.shape) - len(source.shape)
    sizes = [
        "-1" if dim >= shift and source.shape[dim - shift] == length else size(length)
        for dim, length in enumerate(target.shape)
    ]
    return Text(f"{x.at(20)}.expand({', '.join(sizes)})")
