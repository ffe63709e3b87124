"""Operators of other libraries: the emitted program imports the module that registers them."""

import importlib.util
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import OPDEFS

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.rewriting import place

_OWN = ("aten", "prims")


def is_foreign(target: Any) -> bool:
    """Whether an operator is registered by another library than torch."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in _OWN


def module_of(target: torch._ops.OpOverload) -> str | None:
    """The module whose import registers an operator made by ``torch.library.custom_op``; None for one that is made
    otherwise, or where the emitted program could not import it.
    """
    definition = OPDEFS.get(target._schema.name)
    module = definition._init_fn.__module__ if definition is not None else "__main__"
    return None if module == "__main__" or importlib.util.find_spec(module) is None else module


def refuse_foreign(graph: fx.Graph) -> None:
    """Raise UnsupportedError that names every operator which the emitted program could not run."""
    reasons: dict[str, None] = {}
    for node in graph.nodes:
        if not is_foreign(node.target):
            continue
        if module_of(node.target) is None:
            reasons.setdefault(
                f"{node.target} {place(node)} is no operator of torch's own, and no module is known whose import "
                "registers it\n  register it with torch.library.custom_op, in a module that can be imported, or choose "
                "another implementation"
            )
        elif node.target._schema.is_mutable:
            reasons.setdefault(
                f"{node.target} {place(node)} changes its arguments, which is not supported for operators that are "
                "not torch's own\n  let it return what it changes"
            )
    if reasons:
        raise UnsupportedError("\n".join(reasons))
