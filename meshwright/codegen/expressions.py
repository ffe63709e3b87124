"""The code of a value: its operator with its operands, those that share its line written out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from meshwright.codegen.folding import VIEWS, is_bias
from meshwright.codegen.naming import Names
from meshwright.codegen.operators import spell
from meshwright.codegen.shapes import spell_expand, spell_view
from meshwright.codegen.sizes import Sizes, pieces
from meshwright.codegen.spelling import Text, Use
from meshwright.compiler.graph import Function
from meshwright.passes.reshard import conversion_of
from meshwright.passes.rows import operands

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Expressions:
    """Writes the values of one function.

    attributes: parameter or buffer -> attribute of self. folded: the values that are written into their user's line.
    runtime: the names of meshwright.runtime that were written so far.
    """

    function: Function
    names: Names
    attributes: Mapping[str, str]
    sizes: Sizes
    folded: set[fx.Node]
    runtime: set[str] = field(default_factory=set)

    def read(self, node: fx.Node) -> Text:
        """A value where it is read: its code if it shares the line, else its name."""
        if node in self.folded:
            return self.written(node)
        if node.op == "get_attr":
            return Text(f"self.{self.attributes[str(node.target)]}")
        return Text(self.names.of(node))

    def written(self, node: fx.Node) -> Text:
        """The code that computes a value."""
        values = self.function.values
        if self._joins_bias(node):
            product, bias = operands(node)
            if product.target is aten.linear.default:
                arguments = [*(argument.code for argument in self._use(product).args), self.read(bias).code]
                return Text(f"F.linear({', '.join(arguments)})")
        if node.target in (aten.unsqueeze.default, aten.squeeze.dim):
            return spell(self._use(node))
        if node.target in VIEWS:
            source = operands(node)[0]
            local, flexibility = self.sizes.local, self.sizes.flexibility
            return spell_view(self.read(source), values[source], values[node], local, flexibility)
        if node.target is aten.expand.default:
            source = operands(node)[0]
            return spell_expand(self.read(source), values[source], values[node], self.sizes.local)
        if getattr(node.target, "__module__", "").startswith("meshwright.runtime"):
            self.runtime.add(node.target.__name__)  # type: ignore[union-attr]
        return spell(self._use(node))

    def inside(self, node: fx.Node) -> list[fx.Node]:
        """The folded values directly on a node's line that could have a line of their own."""
        return [n for n in operands(node) if n in self.folded and not is_bias(n, node)]

    def _joins_bias(self, node: fx.Node) -> bool:
        first = node.args[0] if node.args else None
        return isinstance(first, fx.Node) and first in self.folded and is_bias(first, node)

    def _use(self, node: fx.Node) -> Use:
        def written(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return self.read(argument)
            return self.sizes.in_code(argument) if isinstance(argument, sympy.Expr) else argument

        args: Any
        kwargs: Any
        args, kwargs = map_aggregate((node.args, dict(node.kwargs)), written)
        given: dict[str, Any] = dict(node.kwargs)
        if conversion_of(node) and isinstance(given.get("groups"), sympy.Expr):
            # The groups of a dim are those that the rank has, whatever it is converted to on this axis.
            axes = {axis: size for axis, size in self.sizes.axes.items() if axis != node.args[1]}
            count = pieces(self.function.values[node], given["dim"], axes)
            kwargs = {**kwargs, "groups": self.sizes.in_code(given["groups"], count)}
        return Use(
            target=node.target,
            args=tuple(args),
            kwargs=kwargs,
            operands=tuple(self.function.values[n] for n in operands(node) if n in self.function.values),
            result=self.function.values.get(node),
            local=self.sizes.local,
            device=self._device(),
        )

    def _device(self) -> str:
        inputs = self.function.inputs()
        return f"{self.names.given[inputs[0]]}.device" if inputs else "None"
