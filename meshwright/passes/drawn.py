"""How the tensors that random operators draw are split: it decides what a rank draws."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from meshwright.compiler.blocks import Blocks
from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.graph import Capture, Function
from meshwright.compiler.program import Drawn, Stage
from meshwright.compiler.types import Type
from meshwright.runtime import random

NUM_DRAWN_DIMS: Mapping[Any, int] = {
    random.feature_dropout: 2,
    random.feature_alpha_dropout: 2,
    random.attention_with_dropout: -2,
}
"""How many leading dims (or all but how many) of the result are those of what is drawn; the others are drawn whole."""


def drawn(capture: Capture, blocks: Blocks, stages: tuple[Stage, ...]) -> dict[str, Drawn]:
    """The sites of all random operators. Raises UnsupportedError for what no rank can draw alone."""
    found: dict[str, Drawn] = {}
    for stage in stages:
        for name, _ in _draws(stage.prepare, capture, "") if stage.prepare else ():
            raise UnsupportedError(
                f"{capture.sites[name].operator} {capture.sites[name].at} draws what the loss of the whole batch is "
                "divided by, which is not supported"
            )
        functions = [(stage.function, "")]
        for call in stage.function.graph.nodes:
            if call.op == "call_module":
                functions.append((blocks.of(str(call.target)).function, f"{call.target}."))
        for function, prefix in functions:
            for name, node in _draws(function, capture, prefix):
                splits = _splits(function, node, capture, name)
                before = found[name].stages if name in found else ()
                found[name] = Drawn(site=capture.sites[name], splits=splits, stages=(*before, stage.index))
    return dict(sorted(found.items(), key=lambda item: item[1].site.number))


def _draws(function: Function, capture: Capture, prefix: str) -> Iterator[tuple[str, fx.Node]]:
    """The random calls of a function, by the names of their sites."""
    for node in function.graph.nodes:
        if node.op == "get_attr" and (name := f"{prefix}{node.target}") in capture.sites:
            for user in node.users:
                yield name, user


def _splits(function: Function, node: fx.Node, capture: Capture, name: str) -> dict[str, Type]:
    value = function.values[node]
    count = NUM_DRAWN_DIMS.get(node.target, len(value.shape))
    dims = range(len(value.shape))[:count]
    splits = {axis: type_ for axis, type_ in value.types.items() if type_.is_split and type_.dim in dims}
    for axis, type_ in splits.items():
        if not isinstance(type_.groups, int):
            raise UnsupportedError(
                f"{capture.sites[name].operator} {capture.sites[name].at} draws a tensor of shape {value.shape} that "
                f"{axis} splits in {type_.groups} groups, a number that differs with the batch\n"
                "  apply it before the dims are merged"
            )
    return splits
