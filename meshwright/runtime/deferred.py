"""The backward of a stage in two parts: gradients of its inputs now (I), those of its parameters later (W).

Zero-bubble schedules need both (Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241). While the stage runs,
every operator that mixes weights with data is cut out of autograd's graph into a small graph of its own. I goes
through the large graph, which is freed on the way, and asks small graphs for the gradients of their data; W is one
backward through all small graphs, which accumulates into the parameters as any other does.

What is not cut out is exact too: where weights are still found in the large graph (in autograd functions of users, in
operators that write in place), I computes their gradients as well, and W only adds them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from meshwright.runtime.errors import PlanError

Gradients = tuple[torch.Tensor | None, ...]


class Deferred:
    """What one microbatch leaves of its backward through a stage for later.

    held: the stage's parameters, and tensors that are the same in all microbatches (buffers). Of those that require
    gradients, and of what depends on them and on the others of ``held`` alone, no gradient is computed before W.

    >>> deferred = Deferred([*stage.parameters(), *stage.buffers()])
    >>> with deferred.recording():
    ...     result = stage(received)
    >>> (gradient,) = deferred.backward_inputs([result], [arrived], [received])  # no parameter's .grad changes
    >>> deferred.backward_weights()  # gradients accumulate, hooks of parameters are called; nothing is held any more
    """

    def __init__(self, held: Iterable[torch.Tensor]):
        tensors = list(held)
        self.parameters = [t for t in tensors if t.requires_grad]
        self.constants = {id(t): t for t in tensors if not t.requires_grad}
        # By identity, which holds as long as the tensor is kept; with the version that depends on weights alone.
        self.weights = {id(t): (t, t._version) for t in self.parameters}
        # The large graph reaches this wherever it reaches a small one, so that I runs where no input needs a gradient.
        self.anchor = torch.empty((), requires_grad=True)
        self.pending: list[tuple[GradientEdge, torch.Tensor]] = []

    def recording(self) -> TorchFunctionMode:
        """The context in which the stage runs, on this thread."""
        return _Recording(self)

    def backward_inputs(
        self, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Gradients:
        """I: the gradients of ``inputs`` (leaves), None where nothing reaches one, from those of ``roots``."""
        paired = list(zip(roots, gradients, strict=True))
        self.pending += [(get_gradient_edge(root), gradient) for root, gradient in paired if self.is_weight(root)]
        paired = [(root, gradient) for root, gradient in paired if not self.is_weight(root)]
        self.weights.clear()
        if not paired:
            return (None,) * len(inputs)
        found = torch.autograd.grad(
            [root for root, _ in paired],
            [*inputs, *self.parameters, self.anchor],
            [gradient for _, gradient in paired],
            allow_unused=True,
        )
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
        operands = {id(t): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        weights = [t for t in operands.values() if deferred.is_weight(t)]
        others = [t for t in operands.values() if not deferred.is_weight(t) and id(t) not in deferred.constants]
        if not others:
            return tree_map_only(torch.Tensor, deferred.keep, func(*args, **kwargs))
        if _writes(func):
            return func(*args, **kwargs)
        data = [t for t in others if t.requires_grad]
        entered: tuple[torch.Tensor, ...] = _Enter.apply(deferred.anchor, data) if data else ()  # type: ignore[no-untyped-call]
        versions = [t._version for t in entered]
        inside = dict(zip(map(id, data), entered, strict=True))
        new_args, new_kwargs = tree_map_only(torch.Tensor, lambda t: inside.get(id(t), t), (tuple(args), kwargs))
        leaves, structure = tree_flatten(func(*new_args, **new_kwargs))
        if [t._version for t in entered] != versions:
            raise PlanError(
                f"{getattr(func, '__name__', func)} takes a parameter and writes to another operand, which the split "
                "backward of this schedule does not follow\n"
                "  let it return a new tensor, or take a schedule without W"
            )
        results = {at: t for at, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad}
        bases = {id(t if t._base is None else t._base) for t in (*weights, *entered)}
        if any(id(t if t._base is None else t._base) in bases for t in results.values()):
            # A view is of one operand, and autograd has to know of which: it may be written through.
            return tree_map_only(torch.Tensor, self._keep_view, func(*args, **kwargs))
        if results:
            call = _Call(
                deferred=deferred,
                results=[get_gradient_edge(t) for t in results.values()],
                data=[get_gradient_edge(t) for t in entered],
                weights=[get_gradient_edge(t) for t in weights],
            )
            left = _Leave.apply(call, tuple(results.values()), deferred.anchor, *data)  # type: ignore[no-untyped-call]
            for at, t in zip(results, left, strict=True):
                leaves[at] = t
        return tree_unflatten(leaves, structure)

    def _keep_view(self, t: torch.Tensor) -> torch.Tensor:
        return self.deferred.keep(t) if t._base is not None and self.deferred.is_weight(t._base) else t


def _writes(func: Callable[..., Any]) -> bool:
    """Whether an operator is one that writes to an operand: ``add_``, ``__setitem__``, ``__iadd__`` and the like."""
    name = getattr(func, "__name__", "").partition(".")[0]
    return (name.endswith("_") and not name.endswith("__")) or name.startswith(("__set", "__i"))


@dataclass(slots=True, kw_only=True)
class _Call:
    """The small graph of one operator: where its results, its data and its weights are.

    Edges, not tensors: what autograd did not save is not kept.
    """

    deferred: Deferred
    results: list[GradientEdge]
    data: list[GradientEdge]
    weights: list[GradientEdge]

    def backward(self, gradients: Gradients) -> Gradients:
        """The gradients of the data; those of the weights are put off, or what leads to them."""
        given = [(edge, g) for edge, g in zip(self.results, gradients, strict=True) if g is not None]
        if not given:
            return (None,) * len(self.data)
        edges, present = [edge for edge, _ in given], [g for _, g in given]
        if not self.data:
            self.deferred.put_off(edges, tuple(present))
            return ()
        if self._comes_apart():
            self.deferred.put_off(edges, tuple(present))
            return torch.autograd.grad(edges, self.data, present, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(edges, [*self.data, *self.weights], present, allow_unused=True)
        self.deferred.put_off(self.weights, found[len(self.data) :])
        return found[: len(self.data)]

    def _comes_apart(self) -> bool:
        """Whether data and weights meet in one node of torch's own: then W repeats nothing of what I does.

        Else (recurrent layers, functions of several operators or in Python) both are computed at once.
        """
        data, weights = ({edge.node for edge in edges} for edges in (self.data, self.weights))
        nodes = {edge.node for edge in self.results}
        while len(nodes) == 1 and not nodes & (data | weights):
            (meeting,) = nodes
            if isinstance(meeting, BackwardCFunction):
                return False
            nodes = _following(meeting)
        return not any(_reaches(node, data) and _reaches(node, weights) for node in nodes)


def _reaches(node: Node, ends: set[Node]) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        if one in ends:
            return True
        waiting += _following(one) - seen
        seen |= _following(one)
    return False


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
