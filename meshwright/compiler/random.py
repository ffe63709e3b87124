"""Random operators of the model as functions of the runtime that draw from a site of their own.

Sites are numbered in the order of the model's calls, unused ones too: so a program on any mesh, and one device under
``meshwright.testing.exact_random``, give the same call the same number.
"""

import random as python_random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.frames import module_stack
from meshwright.compiler.graph import Site
from meshwright.compiler.rewriting import arguments_of, aten, insert, place
from meshwright.runtime import random

_SIZED = {aten.empty.memory_format, aten.new_empty.default, aten.zeros.default, aten.new_zeros.default}
"""What a random operator that fills it reads nothing of but the shape."""


def is_random(target: Any) -> bool:
    """Whether torch says that an operator may draw random numbers."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def draws(target: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a random operator draws with these arguments: dropout with p = 0 or 1, or not in training, does not."""
    if target in (aten.bernoulli.p, aten.bernoulli_.float):
        return True
    switches = [arguments[name] for name in ("train", "training") if name in arguments]
    chances = [arguments.get(name) for name in ("p", "dropout", "dropout_p")]
    certain = any(isinstance(chance, (int, float)) and chance in (0, 1) for chance in chances)
    return is_random(target) and not certain and not any(value is False for value in switches)


class Sites:
    """Gives every random call of a graph its site, in the order of the graph.

    found: filled, by names that are not among ``taken``.
    """

    def __init__(self, found: dict[str, Site], taken: Iterable[str]):
        self.found, self.taken = found, set(taken)
        self.attention: dict[fx.Node, str] = {}

    def rewrite(self, node: fx.Node) -> fx.Node | None:
        """What a random operator is replaced by; None for other nodes, and for attention, which ``finish`` replaces.

        Raises UnsupportedError for a random operator that has no place in the table.
        """
        arguments = arguments_of(node) if is_random(node.target) else {}
        if not draws(node.target, arguments):
            return _without_drawing(node, arguments) if node.target in _REPLACED else None
        if node.target is aten.scaled_dot_product_attention.default:
            self.attention[node] = self._name(node, "attention_with_dropout")
            return None
        if node.target not in _REPLACED:
            raise UnsupportedError(
                f"{node.target} {place(node)} draws random numbers in a way that is not supported: dropout, bernoulli, "
                "rand, randn, uniform_ and normal_ are\n  write it with one of these"
            )
        name, replaced = _REPLACED[node.target]
        return replaced(node, _site(node, self._name(node, name)))

    def finish(self) -> None:
        """Replace attention with dropout, once its mask is known."""
        for node, name in self.attention.items():
            if node._erased:
                continue
            given = arguments_of(node)
            kwargs = {name: given[name] for name in ("attn_mask", "is_causal", "scale", "enable_gqa") if given[name]}
            args = (given["query"], given["key"], given["value"], given["dropout_p"], True, _site(node, name))
            new = _call(node, random.attention_with_dropout, args, kwargs)
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)

    def _name(self, node: fx.Node, operator: str) -> str:
        """A new site, named by its module where that is a dropout, else by what the module calls."""
        path, kind = (module_stack(node) or (("", ""),))[-1]
        called = operator.removesuffix("_with_dropout")
        name = base = path if path and "Dropout" in kind else f"{path}.{called}".lstrip(".")
        number = 1
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        self.found[name] = Site(number=len(self.found), operator=operator, at=place(node))
        return name


def _site(node: fx.Node, name: str) -> fx.Node:
    """A site as an attribute, which counts as a number: what is drawn depends on it alone."""
    with node.graph.inserting_before(node):
        site = node.graph.create_node("get_attr", name)
    value: Any = node.meta["val"]
    tensor: Any = value[0] if isinstance(value, tuple) else value
    with tensor.fake_mode:
        site.meta["val"] = torch.zeros((), dtype=torch.int64)
    return site


def _call(
    node: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> fx.Node:
    """A call of the runtime in the place of ``node``, with its value."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack", "val")}
    if dtype is not None:
        with node.meta["val"].fake_mode:
            new.meta["val"] = node.meta["val"].to(dtype)
    return new


def _without_drawing(node: fx.Node, arguments: Mapping[str, Any]) -> fx.Node | None:
    """Dropout that drops nothing, or everything."""
    if node.target not in _DROPOUTS:
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return insert(aten.mul.Tensor, (source, 0.0), like=node) if arguments["p"] == 1 and arguments["train"] else source


Replace = Callable[[fx.Node, fx.Node], fx.Node | None]


def _dropout(function: Any) -> Replace:
    return lambda node, site: _call(node, function, (node.args[0], node.args[1], True, site), {})


def _native_dropout(node: fx.Node, site: fx.Node) -> None:
    readers = {int(user.args[1]): user for user in node.users}  # type: ignore[arg-type]
    if set(readers) - {0} and readers[1].users:
        raise UnsupportedError(
            f"the mask of native_dropout {place(node)} is read, which is not supported\n"
            "  draw it with torch.rand_like(x) < 1 - p"
        )
    if 0 in readers:
        new = _call(readers[0], random.dropout, (node.args[0], node.args[1], True, site), {})
        readers[0].replace_all_uses_with(new)


def _fraction(node: fx.Node, site: fx.Node, function: str, dtype: torch.dtype | None = None) -> fx.Node:
    """Noise of the shape of ``node``: like its first operand, or of its own where that is empty or none."""
    dtype = dtype or node.meta["val"].dtype
    like = node.args[0] if node.args else None
    maker = like if isinstance(like, fx.Node) else node
    if maker.target in _SIZED or maker is node:
        return _call(node, getattr(random, function), (arguments_of(maker)["size"], site), {"dtype": dtype}, dtype)
    source = maker.args[0] if maker.target is aten.empty_like.default else maker
    return _call(node, getattr(random, f"{function}_like"), (source, site), {"dtype": dtype}, dtype)


def _bernoulli(node: fx.Node, site: fx.Node) -> fx.Node:
    """Compared in float64, so that every dtype draws the same."""
    chance = node.args[1] if len(node.args) > 1 else node.args[0]
    compare = aten.lt.Tensor if isinstance(chance, fx.Node) else aten.lt.Scalar
    hit = insert(compare, (_fraction(node, site, "rand", torch.float64), chance), like=node)
    return insert(aten.to.dtype, (hit, node.meta["val"].dtype), like=node)


def _scaled(node: fx.Node, noise: fx.Node, scale: float, shift: float) -> fx.Node:
    if scale != 1:
        noise = insert(aten.mul.Tensor, (noise, scale), like=node)
    return insert(aten.add.Tensor, (noise, shift), like=node) if shift else noise


def _uniform(node: fx.Node, site: fx.Node) -> fx.Node:
    given = arguments_of(node)
    return _scaled(node, _fraction(node, site, "rand"), given["to"] - given["from"], given["from"])


def _normal(node: fx.Node, site: fx.Node) -> fx.Node:
    given = arguments_of(node)
    return _scaled(node, _fraction(node, site, "randn"), given["std"], given["mean"])


_DROPOUTS: Mapping[Any, str] = {
    aten.dropout.default: "dropout",
    aten.feature_dropout.default: "feature_dropout",
    aten.alpha_dropout.default: "alpha_dropout",
    aten.feature_alpha_dropout.default: "feature_alpha_dropout",
}

_REPLACED: Mapping[Any, tuple[str, Replace]] = {
    **{target: (name, _dropout(getattr(random, name))) for target, name in _DROPOUTS.items()},
    aten.native_dropout.default: ("dropout", _native_dropout),
    aten.bernoulli.default: ("rand", _bernoulli),
    aten.bernoulli.p: ("rand", _bernoulli),
    aten.bernoulli.Tensor: ("rand", _bernoulli),
    aten.rand.default: ("rand", lambda node, site: _fraction(node, site, "rand")),
    aten.rand_like.default: ("rand", lambda node, site: _fraction(node, site, "rand")),
    aten.uniform.default: ("rand", _uniform),
    aten.randn.default: ("randn", lambda node, site: _fraction(node, site, "randn")),
    aten.randn_like.default: ("randn", lambda node, site: _fraction(node, site, "randn")),
    aten.normal_functional.default: ("randn", _normal),
    aten.normal.float_float: ("randn", _normal),
}
"""Random operator -> the function of the runtime that draws for it, and how it is written with that."""


@contextmanager
def refusing_other_generators() -> Iterator[None]:
    """Raises UnsupportedError where Python's or NumPy's generator is drawn from inside: its numbers would be frozen."""
    before = _states()
    yield
    drawn = [name for name, state in _states().items() if name in before and state != before[name]]
    if drawn:
        raise UnsupportedError(
            f"the model draws random numbers with {' and '.join(drawn)} in its forward: a captured program would "
            "repeat those of the capture in every step\n"
            "  draw them with torch, or turn that part of the model off (such as layerdrop and masking in the config)"
        )


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"Python's random": python_random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        states["numpy.random"] = (state[1].tobytes(), *state[2:])
    return states
