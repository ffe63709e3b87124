"""The backward of a stage in two parts: gradients of its inputs now (I), those of its parameters later (W).

Zero-bubble schedules need both (Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241). While the stage runs,
every operator that mixes weights with data is cut out of autograd's graph into a small graph of its own. I goes
through the large graph, which is freed on the way, and asks small graphs for the gradients of their data; W is one
backward through all small graphs, which accumulates into the parameters as any other does.

What is not cut out is exact too: where weights are still found in the large graph (in autograd functions of users, in
operators that write in place), I computes their gradients as well, and W only adds them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from meshwright.runtime.errors import PlanError

Gradients = tuple[torch.Tensor | None, ...]


@dataclass(slots=True)
class Running:
    """The I that runs now on this rank, for compiled blocks, which compute their backward by themselves.

    On a GPU that is on a thread of autograd's.
    """

    deferred: "Deferred | None" = None


class Deferred:
    """What one microbatch leaves of its backward through a stage for later.

    held: the stage's parameters, and tensors that are the same in all microbatches (buffers). Of those that require
    gradients, and of what depends on them and on the others of ``held`` alone, no gradient is computed before W.
    running: where compiled blocks find it.

    >>> deferred = Deferred([*stage.parameters(), *stage.buffers()])
    >>> with deferred.recording():
    ...     result = stage(received)
    >>> roots = deferred.roots([result])  # the result itself may go
    >>> (gradient,) = deferred.backward_inputs(roots, [arrived], [received])  # no parameter's .grad changes
    >>> deferred.backward_weights()  # gradients accumulate, hooks of parameters are called; nothing is held any more
    """

    def __init__(self, held: Iterable[torch.Tensor], running: Running | None = None):
        tensors, self.running = list(held), running or Running()
        self.parameters = [t for t in tensors if t.requires_grad]
        self.constants = {id(t): t for t in tensors if not t.requires_grad}
        # By identity, which holds as long as the tensor is kept; with the version that depends on weights alone.
        self.weights = {id(t): (t, t._version) for t in self.parameters}
        # The large graph reaches this wherever it reaches a small one, so that I runs where no input needs a gradient.
        self.anchor = torch.empty((), requires_grad=True)
        self.own: set[Node] = set()  # of results that are weights
        self.pending: list[tuple[GradientEdge, torch.Tensor]] = []

    def recording(self) -> TorchFunctionMode:
        """The context in which the stage runs, on this thread."""
        return _Recording(self)

    def roots(self, results: Sequence[torch.Tensor]) -> list[GradientEdge]:
        """Where the backward of these results of the stage begins; the recording is over."""
        edges = [get_gradient_edge(result) for result in results]
        self.own = {e.node for e, result in zip(edges, results, strict=True) if self.is_weight(result)}
        self.weights.clear()
        return edges

    def backward_inputs(
        self, roots: Sequence[GradientEdge], gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Gradients:
        """I: the gradients of ``inputs`` (leaves), None where nothing reaches one, from those of ``roots``."""
        paired = list(zip(roots, gradients, strict=True))
        self.pending += [(root, gradient) for root, gradient in paired if root.node in self.own]
        paired = [(root, gradient) for root, gradient in paired if root.node not in self.own]
        self.own.clear()
        if not paired:
            return (None,) * len(inputs)
        self.running.deferred = self
        try:
            found = torch.autograd.grad(
                [root for root, _ in paired],
                [*inputs, *self.parameters, self.anchor],
                [gradient for _, gradient in paired],
                allow_unused=True,
            )
        finally:
            self.running.deferred = None
        self.put_off([get_gradient_edge(p) for p in self.parameters], found[len(inputs) : -1])
        return found[: len(inputs)]

    def backward_weights(self) -> None:
        """W: the gradients of the parameters, after I."""
        pending, self.pending = self.pending, []
        if pending:
            edges, gradients = [edge for edge, _ in pending], [gradient for _, gradient in pending]
            pending.clear()
            # To the parameters and not to data, whose gradients were computed before.
            torch.autograd.backward(edges, gradients, inputs=self.parameters)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether it depends on the parameters alone, and nothing was written to it since that was known."""
        found = self.weights.get(id(tensor))
        return found is not None and (found[0].is_leaf or found[1] == tensor._version)

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """Know a tensor as a weight from now on."""
        if weight.requires_grad:
            self.weights[id(weight)] = weight, weight._version
        return weight

    def put_off(self, edges: Sequence[GradientEdge], gradients: Gradients) -> None:
        """Leave it to W to go on from ``edges`` with those of ``gradients`` that are there."""
        self.pending += [(edge, g) for edge, g in zip(edges, gradients, strict=True) if g is not None]


class _Recording(TorchFunctionMode):
    """Sees every operator of a stage."""

    def __init__(self, deferred: Deferred):
        super().__init__()
        self.deferred = deferred
        self.weights = deferred.weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        weights = self.weights
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in weights or (isinstance(value, (list, tuple)) and any(id(v) in weights for v in value)):
                break
        else:  # most operators, and what asks for shapes
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._run(func, args, kwargs or {})

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes weights: as it is where it takes nothing else, else in a small graph."""
        deferred = self.deferred
        weights: dict[int, torch.Tensor] = {}
        others: dict[int, torch.Tensor] = {}
        for t in _tensors((*args, *kwargs.values())):
            if deferred.is_weight(t):
                weights[id(t)] = t
            elif id(t) not in deferred.constants:
                others[id(t)] = t
        if not others:
            return _mapped(deferred.keep, func(*args, **kwargs))
        if _writes(func):
            return func(*args, **kwargs)
        data = [t for t in others.values() if t.requires_grad]
        entered: tuple[torch.Tensor, ...] = _Enter.apply(deferred.anchor, data) if data else ()  # type: ignore[no-untyped-call]
        versions = [t._version for t in entered]
        inside = dict(zip(map(id, data), entered, strict=True))
        result = func(
            *_mapped(lambda t: inside.get(id(t), t), tuple(args)),
            **{name: _mapped(lambda t: inside.get(id(t), t), value) for name, value in kwargs.items()},
        )
        if [t._version for t in entered] != versions:
            raise PlanError(
                f"{getattr(func, '__name__', func)} takes a parameter and writes to another operand, which the split "
                "backward of this schedule does not follow\n"
                "  let it return a new tensor, or take a schedule without W"
            )
        results = [t for t in _tensors([result]) if t.requires_grad]
        bases = {id(_base(t)) for t in (*weights.values(), *entered)}
        if any(id(_base(t)) in bases for t in results):
            # A view is of one operand, and autograd has to know of which: it may be written through.
            return _mapped(self._keep_view, func(*args, **kwargs))
        if not results:
            return result
        call = _Call(
            deferred=deferred,
            results=[get_gradient_edge(t) for t in results],
            data=[get_gradient_edge(t) for t in entered],
            weights=list(weights.values()),
        )
        left = _Leave.apply(call, results, deferred.anchor, *data)  # type: ignore[no-untyped-call]
        outside = dict(zip(map(id, results), left, strict=True))
        return _mapped(lambda t: outside.get(id(t), t), result)

    def _keep_view(self, t: torch.Tensor) -> torch.Tensor:
        return self.deferred.keep(t) if self.deferred.is_weight(_base(t)) else t


def _base(t: torch.Tensor) -> torch.Tensor:
    """The tensor of which this is a view, or itself."""
    return t if t._base is None else t._base


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results, in tuples and lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Arguments or results with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(function, one) for one in value])
    return tree_map_only(torch.Tensor, function, value) if isinstance(value, tuple) else value


def _writes(func: Callable[..., Any]) -> bool:
    """Whether an operator is one that writes to an operand: ``add_``, ``__setitem__``, ``__iadd__`` and the like."""
    name = getattr(func, "__name__", "").partition(".")[0]
    return (name.endswith("_") and not name.endswith("__")) or name.startswith(("__set", "__i"))


@dataclass(slots=True, kw_only=True)
class _Call:
    """The small graph of one operator. Results and data as edges, so that what autograd did not save is not kept."""

    deferred: Deferred
    results: list[GradientEdge]
    data: list[GradientEdge]
    weights: list[torch.Tensor]

    def backward(self, gradients: Gradients) -> Gradients:
        """The gradients of the data; those of the weights are put off, or what leads to them."""
        given = [(edge, g) for edge, g in zip(self.results, gradients, strict=True) if g is not None]
        if not given:
            return (None,) * len(self.data)
        edges, present = [edge for edge, _ in given], [g for _, g in given]
        if not self.data:
            self.deferred.put_off(edges, tuple(present))
            return ()
        weights = [get_gradient_edge(t) for t in self.weights]
        if _come_apart(self.results, {edge.node for edge in self.data}, {edge.node for edge in weights}):
            self.deferred.put_off(edges, tuple(present))
            return torch.autograd.grad(edges, self.data, present, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(edges, [*self.data, *weights], present, allow_unused=True)
        self.deferred.put_off(weights, found[len(self.data) :])
        return found[: len(self.data)]


def _come_apart(results: Sequence[GradientEdge], data: set[Node], weights: set[Node]) -> bool:
    """Whether data and weights meet in one node of torch's own: then W repeats nothing of what I does.

    Else (recurrent layers, functions of several operators or in Python) both are computed at once.
    """
    nodes = {edge.node for edge in results}
    while len(nodes) == 1 and nodes.isdisjoint(data) and nodes.isdisjoint(weights):
        (meeting,) = nodes
        if isinstance(meeting, BackwardCFunction):
            return False
        nodes = _following(meeting)
    return not any(_reaches_both(node, data, weights) for node in nodes)


def _reaches_both(node: Node, data: set[Node], weights: set[Node]) -> bool:
    seen, waiting, missing = {node}, [node], [data, weights]
    while waiting and missing:
        one = waiting.pop()
        if one in data or one in weights:
            missing = [ends for ends in missing if one not in ends]
        else:
            following = _following(one)
            waiting += following - seen
            seen |= following
    return not missing


def _following(node: Node) -> set[Node]:
    return {following for following, _ in node.next_functions if following is not None}


class _Enter(torch.autograd.Function):
    """Data as the small graph has it: the same values, where gradients end."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, data: Sequence[torch.Tensor]) -> Any:
        return tuple(t.detach() for t in data)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("gradients end here")


class _Leave(torch.autograd.Function):
    """The results of a small graph as the large graph has them, where they depend on the data."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, results: Sequence[torch.Tensor], anchor: torch.Tensor, *data: torch.Tensor
    ) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return None, None, None, *ctx.call.backward(gradients)
