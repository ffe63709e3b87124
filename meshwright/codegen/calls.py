"""How a stage calls the instances of its blocks: each by an attribute of its own, or a run of them in a loop."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from meshwright.codegen.wording import identifier, quoted, unused
from meshwright.compiler.graph import Block, Function


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How an instance of a block is called: by its own attribute, or as part of a loop.

    carried: the argument that each instance hands to the next; last: the last node of the loop. skip: written by the
    loop.
    """

    last: fx.Node
    attribute: str = ""
    loop: str | None = None
    variable: str = "layer"
    carried: int = 0
    skip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """The calls of a stage, and the attributes that hold the instances, each with its line in ``__init__``."""

    calls: Mapping[fx.Node, Call]
    attributes: tuple[tuple[str, str], ...]


def instances_of(function: Function, blocks: Mapping[str, Block]) -> Instances:
    """How ``function`` calls the instances of ``blocks``, which are found by their module paths."""
    calls: dict[fx.Node, Call] = {}
    attributes: dict[str, str] = {}
    nodes = [n for n in function.graph.nodes if n.op == "call_module"]
    while nodes:
        run = _run(nodes)
        block = identifier(blocks[str(run[0].target)].name)
        paths = [str(n.target) for n in run]
        name = identifier(re.sub(r"\.?\d+$", "", paths[0]).rsplit(".", 1)[-1] or "layers")
        if len(run) == 1:
            attribute = unused(f"{name}_{paths[0].rsplit('.', 1)[-1]}", attributes)
            attributes[attribute] = f"self.{attribute} = {block}(param.scope({quoted(paths[0])}))"
            calls[run[0]] = Call(last=run[0], attribute=attribute)
        else:
            attribute = unused(name, attributes)
            attributes[attribute] = f"self.{attribute} = nn.ModuleList({_list(block, paths)})"
            carried = run[1].args.index(run[0])
            calls[run[0]] = Call(last=run[-1], loop=attribute, variable=_variable(name), carried=carried)
            calls |= {node: Call(last=run[-1], skip=True) for node in run[1:]}
        nodes = nodes[len(run) :]
    return Instances(calls=calls, attributes=tuple(attributes.items()))


def _variable(name: str) -> str:
    """The variable of a loop over ``name``: ``layers`` -> "layer", ``h`` -> "block"."""
    if name.endswith("s") and len(name) > 2:
        return name[:-1]
    return "block" if name != "block" else "layer"


def _run(nodes: list[fx.Node]) -> list[fx.Node]:
    """The longest start of ``nodes`` that is a loop: the same block, each fed by the one before, all else the same."""
    run = [nodes[0]]
    for node in nodes[1:]:
        last = run[-1]
        fed = [i for i, argument in enumerate(node.args) if argument is last]
        same = len(fed) == 1 and all(
            a is b for i, (a, b) in enumerate(zip(node.args, last.args, strict=False)) if i != fed[0]
        )
        alone = all(user is node for user in last.users)
        if not (
            same
            and alone
            and len(node.args) == len(last.args)
            and (len(run) == 1 or run[1].args.index(run[0]) == fed[0])
        ):
            break
        if last.args and _stem(str(node.target)) != _stem(str(last.target)):
            break
        run.append(node)
    return run


def _list(block: str, paths: list[str]) -> str:
    """The generator over instances: a range where the paths count, else a tuple of paths."""
    stems = {_stem(path) for path in paths}
    numbers = [int(match[0]) if (match := re.search(r"\d+$", path)) else -1 for path in paths]
    if len(stems) == 1 and numbers == list(range(numbers[0], numbers[0] + len(paths))) and "{" not in paths[0]:
        pattern = quoted(stems.pop() + "{i}")
        return f"{block}(param.scope(f{pattern})) for i in range({numbers[0]}, {numbers[-1] + 1})"
    names = ", ".join(quoted(p) for p in paths)
    return f"{block}(param.scope(path)) for path in ({names})"


def _stem(path: str) -> str:
    return re.sub(r"\d+$", "", path)
