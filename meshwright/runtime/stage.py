"""One stage on a rank: its forwards and backwards, and what is kept of a microbatch between them."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshwright.runtime.deferred import Deferred, Running
from meshwright.runtime.errors import BundleError
from meshwright.runtime.groups import Groups
from meshwright.runtime.messages import Edge, Links, Shapes

Values = Mapping[str, Any]
"""Arguments of a stage by name: tensors, and what else the user's batch has."""

Arrived = Sequence[tuple[Edge, torch.Tensor]]


@dataclass(slots=True, kw_only=True)
class Live:
    """What is kept of one microbatch between its forward and its backward.

    received: what has its gradient sent back. roots: where the backward begins, by result; results themselves are free
    once they are sent, unless the backward needs them. gradients: of roots that no other stage has one for, the loss.
    deferred: what the backward for the weights is made of, where there is one.
    """

    received: Mapping[str, torch.Tensor]
    roots: Mapping[str, GradientEdge]
    gradients: Mapping[str, torch.Tensor]
    deferred: Deferred | None


@dataclass(slots=True, kw_only=True)
class StageRun:
    """Runs the stage ``index``. expected, awaited: (stage, edge) for what its forward takes from other stages, and for
    the gradients that its backward takes.
    """

    module: nn.Module
    index: int
    manifest: Mapping[str, Any]
    links: Links
    groups: Groups
    running: Running = field(default_factory=Running)
    arguments: tuple[str, ...] = field(init=False)
    expected: tuple[tuple[int, Edge], ...] = field(init=False)
    awaited: tuple[tuple[int, Edge], ...] = field(init=False)
    held: tuple[torch.Tensor, ...] = field(init=False)
    has_loss: bool = field(init=False)
    loss_parts: int = field(init=False)
    live: dict[int, Live] = field(default_factory=dict)
    deferred: dict[int, Deferred] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loss, entry = self.manifest["loss"], self.manifest["stages"][self.index]
        self.arguments = tuple(inspect.signature(self.module.forward).parameters)
        unknown = {*self.arguments} - {*entry["inputs"], *entry["receives"], *entry["prepares"]}
        if unknown:
            raise BundleError(
                f"the forward of stage {self.index} takes {', '.join(sorted(unknown))}: not among the inputs, received "
                "and prepared values that the manifest gives it"
            )
        self.expected = tuple((edge.source, edge) for edge in self.links.received[self.index].values())
        sent = self.links.sent[self.index].values()
        self.awaited = tuple((stage, edge) for edge in sent if edge.requires_grad for stage in edge.destinations)
        self.held = (*self.module.parameters(), *self.module.buffers())
        self.has_loss = self.index == loss["stage"]
        # By what a microbatch's loss is divided: 1 where the loss of the whole is the sum of theirs.
        self.loss_parts = 1 if loss["types"].get("mb") == "P" else self.groups.microbatches

    def prepare(self, inputs: Values) -> Values:
        """What the stage file computes once per step, by name."""
        names = self.manifest["stages"][self.index]["prepares"]
        if not names:
            return {}
        function: Any = self.module.prepare
        with torch.no_grad():
            result = function(**{name: inputs[name] for name in inspect.signature(function).parameters})
        return dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))

    def clear(self) -> None:
        """Keep nothing of a step that failed."""
        self.live.clear()
        self.deferred.clear()

    def forward(
        self, microbatch: int, arrived: Arrived, available: Values, shapes: Shapes, *, grad: bool, split: bool
    ) -> Values:
        """The results by name; of the stage with the loss, the loss as ``"loss"``, detached. split: the backward comes
        in two parts.
        """
        received = {edge.name: value.requires_grad_(grad and edge.requires_grad) for edge, value in arrived}
        arguments = {name: (received if name in received else available)[name] for name in self.arguments}
        deferred = Deferred(self.held, self.running) if grad and split else None
        with deferred.recording() if deferred is not None else nullcontext():
            result = self.module(**arguments)
        if self.has_loss:
            loss = result / self.loss_parts if self.loss_parts > 1 else result
            if grad:
                self._keep(microbatch, received, {"loss": loss}, {"loss": torch.ones_like(loss)}, deferred)
            return {"loss": loss.detach()}
        results, sent = result if isinstance(result, tuple) else (result,), self.links.sent[self.index]
        if len(results) != len(sent):
            raise BundleError(
                f"the forward of stage {self.index} returns {len(results)} values, the manifest says {', '.join(sent)}"
            )
        named = dict(zip(sent, results, strict=True))
        self.links.check(self.index, named, shapes)
        if grad:
            self._keep(microbatch, received, named, {}, deferred)
        return named

    def _keep(
        self,
        microbatch: int,
        received: Mapping[str, torch.Tensor],
        results: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        deferred: Deferred | None,
    ) -> None:
        wanted = {name: tensor for name, tensor in results.items() if tensor.requires_grad}
        edges = [*map(get_gradient_edge, wanted.values())] if deferred is None else deferred.roots([*wanted.values()])
        self.live[microbatch] = Live(
            received={name: tensor for name, tensor in received.items() if tensor.requires_grad},
            roots=dict(zip(wanted, edges, strict=True)),
            gradients=gradients,
            deferred=deferred,
        )

    def backward(self, microbatch: int, arrived: Arrived) -> dict[str, torch.Tensor]:
        """The gradients of what was received, by name; those of parameters go where autograd puts them, or are left to
        ``backward_weights`` where the forward was told so.
        """
        live = self.live.pop(microbatch)
        pairs = [*((edge.name, gradient) for edge, gradient in arrived), *live.gradients.items()]
        pairs = [(name, gradient) for name, gradient in pairs if name in live.roots]
        roots, gradients = [live.roots[name] for name, _ in pairs], [gradient for _, gradient in pairs]
        inputs = list(live.received.values())
        found: Sequence[torch.Tensor | None]
        if live.deferred is not None:
            found = live.deferred.backward_inputs(roots, gradients, inputs)
            self.deferred[microbatch] = live.deferred
        else:
            if roots:
                torch.autograd.backward(roots, gradients)
            found = [tensor.grad for tensor in inputs]
        return {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(live.received.items(), found, strict=True)
        }

    def backward_weights(self, microbatch: int) -> None:
        """The gradients of the parameters, after ``backward``."""
        self.deferred.pop(microbatch).backward_weights()
