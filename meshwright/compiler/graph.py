"""A function of the program: an fx graph with what the passes know of its values in tables beside it.

Nodes of the graph, after normalization:

- ``placeholder``: an input, by its name (``node.target``);
- ``get_attr``: a parameter, a buffer or the site of a random operator, by its path in the model (relative to the
  instance inside a block; a segment of a parameter ends in ``[start:stop]``);
- ``call_function``: an aten operator, ``operator.getitem`` of one with several results, or a function of
  ``meshwright.runtime`` (conversions and what stands beside them), called as the emitted code calls it;
- ``call_module``: an instance of a block, by its module path; the arguments are the block's placeholders in order;
- ``output``: one tuple of nodes.

Sizes among the arguments are ints or sympy expressions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy
import torch
from torch import fx

from meshwright.compiler.errors import InternalError
from meshwright.compiler.names import Origin
from meshwright.compiler.types import Size, Type

MadeOf = Literal["data", "inputs", "parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What is known of one tensor of the graph.

    shape: the whole shape over the global batch, in elements; sympy expressions of the symbolic sizes.
    grad: whether a gradient flows to it.
    made_of: "parameters" alone, "inputs" (and constants, buffers) alone, or "data": both.
    types: the type on every mesh axis and on "mb"; an axis that is absent is I.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    grad: bool
    made_of: MadeOf
    types: Mapping[str, Type] = field(default_factory=dict)

    def typed(self, axis: str, type_: Type) -> "Value":
        return replace(self, types={**self.types, axis: type_})


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A graph and its tables. Read-only: a pass that changes something builds a new one.

    ``values`` has every node whose value is a tensor; ``origins`` says where nodes come from in the user's source.
    """

    graph: fx.Graph
    values: Mapping[fx.Node, Value]
    origins: Mapping[fx.Node, Origin]

    def verify(self) -> None:
        """Every use is preceded by its definition, every tensor has a value. Raises InternalError."""
        seen: set[fx.Node] = set()
        for node in self.graph.nodes:
            for used in node.all_input_nodes:
                if used not in seen:
                    raise InternalError(f"{node.format_node()} uses {used.name} before it is defined")
            is_tensor = node.op in ("placeholder", "get_attr") or is_operator(node)
            if is_tensor and node not in self.values and not is_multiple(node):
                raise InternalError(f"{node.format_node()} has no value")
            seen.add(node)

    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    def results(self) -> tuple[fx.Node, ...]:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return tuple(output.args[0])

    def place(self, node: fx.Node) -> str:
        """Where in the user's source a node comes from, for messages."""
        origin = self.origins.get(node)
        file, line = origin.statement if origin else ("", 0)
        return f"at {file.rsplit('/', 1)[-1]}:{line}" if file else "in the model"

    def attributes(self) -> tuple[str, ...]:
        """The parameters and buffers that are used, in order of first use."""
        return tuple(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr"))


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of aten (and not a function of the runtime, getitem or a block)."""
    return isinstance(node.target, torch._ops.OpOverload)


def is_multiple(node: fx.Node) -> bool:
    """Whether a node has several results, read by getitem."""
    if not is_operator(node):
        return False
    target: Any = node.target
    returns = target._schema.returns
    return len(returns) > 1 or isinstance(returns[0].type, torch.ListType)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A module of which the model has one or more instances with the same structure.

    name: a class name, unique among the blocks.
    instances: the module paths. The parameters in ``function`` are relative to them.
    """

    name: str
    instances: tuple[str, ...]
    function: Function

    def parameter(self, instance: str, relative: str) -> str:
        """The full name of a parameter or buffer of one instance."""
        return f"{instance}.{relative}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the model, by the name that ``named_parameters()`` gives it.

    trainable: whether it gets a gradient: it is not frozen, and the loss depends on it.
    aliases: the other names under which ``state_dict()`` has the same tensor.
    initial: how its module fills it, as (in-place method name, arguments), if that is known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    aliases: tuple[str, ...] = ()
    initial: tuple[str, tuple[float, ...]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A buffer that the program reads, or that ``state_dict()`` has: then it is ``persistent``.

    unknown_evaluation: where forward writes it, if that says that the loss may be computed otherwise in eval mode.
    initial: as for a parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool
    aliases: tuple[str, ...] = ()
    unknown_evaluation: str | None = None
    initial: tuple[str, tuple[float, ...]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One leaf of the example batch. ``batched``: dim 0 is the batch."""

    name: str
    shape: tuple[Size, ...]
    dtype: torch.dtype
    batched: bool
    example: Any = None


@dataclass(frozen=True, slots=True)
class Segment:
    """The part ``start:start + length`` of a parameter along ``dim``, in elements of that dim."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A call of a random operator: its number in the order of the model's own calls, the function of
    ``meshwright.runtime`` that draws for it, and where the model has it.
    """

    number: int
    operator: str
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """The model as one function: placeholders are the inputs' names, attributes full names, the result is the loss.

    symbols: the symbolic sizes with their values in the example and what they are ("batch", "sequence").
    fixed: sizes that had to stay fixed, with the reason.
    segments: the pieces of fused parameters, by the names they have in graphs ("...weight[0:64]").
    sites: what random operators draw from, by the names they have in graphs.
    in_eval: the modules that were in eval mode inside a model in training mode.
    """

    model: str
    function: Function
    parameters: Mapping[str, Parameter]
    buffers: Mapping[str, Buffer]
    inputs: tuple[Input, ...]
    input_tree: Literal["dict", "tuple"]
    symbols: Mapping[sympy.Symbol, int]
    fixed: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    segments: Mapping[str, tuple[str, Segment]] = field(default_factory=dict)
    sites: Mapping[str, Site] = field(default_factory=dict)
    in_eval: tuple[str, ...] = ()
