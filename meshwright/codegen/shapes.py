"""Views without sizes: merging and splitting neighbours with flatten and unflatten, so that the code fits every
piece.
"""

from collections.abc import Callable

from meshwright.codegen.spelling import Text
from meshwright.compiler.graph import Value
from meshwright.compiler.types import Size
from meshwright.passes.factors import Factor, of_view

Local = Callable[[Value, int, Factor | None], str]
"""The size of a dim of a value, or of one factor in it, as the code of a rank says it."""
Flexibility = Callable[[Value, int], int]
"""How much better a dim is left to torch (-1): a rank has a piece of it, it is the batch, or nothing says its size."""


def spell_view(x: Text, source: Value, target: Value, local: Local, flexibility: Flexibility) -> Text:
    """Code for ``x`` of shape ``source`` seen as ``target``: without sizes where neighbours are merged and split."""
    code = x.at(20)
    factors = of_view(source.shape, target.shape)
    if _product(tuple(factor.size for factor in factors)) != _product(source.shape):
        fixed = (dim for dim, size in enumerate(target.shape) if isinstance(size, int))
        free = next((dim for dim in fixed if flexibility(target, dim)), None)
        sizes = ("-1" if dim == free else local(target, dim, None) for dim in range(len(target.shape)))
        return Text(f"{code}.reshape({', '.join(sizes)})")
    return Text(_unflattened(code, source, target, factors, local, flexibility))


def _product(sizes: tuple[Size, ...]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def _unflattened(
    code: str, source: Value, target: Value, factors: tuple[Factor, ...], local: Local, flexibility: Flexibility
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
            sizes = _factor_sizes(group, target, local, flexibility)
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


def _factor_sizes(group: list[Factor], target: Value, local: Local, flexibility: Flexibility) -> list[str]:
    """The sizes of the factors of one dim, one of them -1."""
    dims = [factor.results[0].dim for factor in group]  # type: ignore[union-attr]
    free = max(range(len(dims)), key=lambda i: flexibility(target, dims[i]))
    return [
        "-1" if i == free else local(target, dim, factor)
        for i, (dim, factor) in enumerate(zip(dims, group, strict=True))
    ]


def spell_expand(x: Text, source: Value, target: Value, local: Local) -> Text:
    """Code for broadcasting: -1 where a dim stays."""
    shift = len(target.shape) - len(source.shape)
    sizes = [
        "-1" if dim >= shift and source.shape[dim - shift] == length else local(target, dim, None)
        for dim, length in enumerate(target.shape)
    ]
    return Text(f"{x.at(20)}.expand({', '.join(sizes)})")
