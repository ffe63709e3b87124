"""Why there are no types on an axis: what to say, and to whom."""

from collections.abc import Mapping

from torch import fx

from meshwright.compiler.errors import InternalError, PlanError, UnsupportedError
from meshwright.compiler.graph import Function
from meshwright.compiler.text import function_text
from meshwright.compiler.types import Type
from meshwright.compiler.written import writes
from meshwright.passes.axes import Axis
from meshwright.passes.factors import Factors
from meshwright.passes.rows import operands
from meshwright.passes.rules import a_rule_for


def no_types(
    function: Function,
    axis: Axis,
    factors: Mapping[fx.Node, Factors | None],
    carried: Mapping[fx.Node, Type],
    pins: Mapping[str, tuple[str, Type]],
    store: fx.Node | None,
) -> Exception:
    """The error for a function without types. ``store``: the store but for which there would be some."""
    if axis.in_time:
        return _not_in_microbatches(function, factors, carried, store)
    pinned = sorted(f"{pattern!r} ({axis.name}={type_})" for pattern, type_ in set(pins.values()))
    if pinned:
        return PlanError(
            f"the pins contradict each other on {axis.name}: no types of the other values fit {' and '.join(pinned)}\n"
            "  drop one of them"
        )
    if axis.features:
        return InternalError(f"no types on {axis.name} fit this graph:\n{function_text(function)}")
    return UnsupportedError(
        f"the batch cannot be split over {axis.name}: the loss mixes samples of the batch in a way without a rule"
    )


def _not_in_microbatches(
    function: Function,
    factors: Mapping[fx.Node, Factors | None],
    carried: Mapping[fx.Node, Type],
    store: fx.Node | None,
) -> PlanError:
    unruled = dict.fromkeys(
        f"the batch cannot be cut into microbatches: {node.target} {function.place(node)} has no rule and "
        f"needs it whole\n  {a_rule_for(node.target)}"
        for node, here in factors.items()
        if here is None and any(used in carried for used in operands(node))
    )
    if unruled:
        return PlanError("\n".join(unruled) + ", or use microbatches=1")
    if store is not None:
        name = str(writes(store)[0].target)
        return mixed(f"{name!r} is written {where(function, store)} with a value of the batch")
    return PlanError(
        "the batch cannot be cut into microbatches without changing the result: the loss mixes samples of the batch\n"
        "  use microbatches=1"
    )


def mixed(what: str) -> PlanError:
    """The error for what is of the whole batch and can be taken of each microbatch by the user's choice."""
    return PlanError(
        f"the batch cannot be cut into microbatches without changing the result: {what}\n"
        '  use microbatches=1, or batch_statistics="microbatch" (each by itself, as gradient accumulation has it)'
    )


def where(function: Function, node: fx.Node) -> str:
    """``by layers.0.norm at model.py:12``."""
    origin = function.origins.get(node)
    if origin is None:
        return "in the model"
    file, line = origin.statement
    return f"by {origin.module_path or 'the model'} at {file.rsplit('/', 1)[-1]}:{line}"
