"""The executor: runs a rank's actions, with the messages before and after them."""

import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshwright.runtime.actions import KINDS, Action, fuse
from meshwright.runtime.errors import BundleError, RankError
from meshwright.runtime.groups import Groups
from meshwright.runtime.messages import Messages, Shapes
from meshwright.runtime.wire import Finish, Message

Values = Mapping[str, Any]
"""Arguments of a stage by name: tensors, and what else the user's batch has."""


@dataclass(slots=True, kw_only=True)
class Live:
    """What is kept of one microbatch between its forward and its backward."""

    received: Mapping[str, torch.Tensor]
    results: Mapping[str, torch.Tensor]
    loss: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class Executor:
    """Runs one stage.

    before_backward(last): called before every backward, ``last`` on the step's last. after_backward(): after it.
    entering(microbatch): called before every forward and every backward.
    loss_parts: by what a microbatch's loss is divided, 1 where the loss of the whole is their sum.
    """

    stage: nn.Module
    index: int
    manifest: Mapping[str, Any]
    groups: Groups
    before_backward: Callable[[bool], None]
    after_backward: Callable[[], None]
    entering: Callable[[int], None] = lambda microbatch: None
    arguments: tuple[str, ...] = field(init=False)
    messages: Messages = field(init=False)
    has_loss: bool = field(init=False)
    loss_parts: int = field(init=False)
    grad: bool = True
    live: dict[int, Live] = field(default_factory=dict)
    arrived: dict[tuple[str, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    sending: deque[list[tuple[Finish, Message]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        loss = self.manifest["loss"]
        entry = self.manifest["stages"][self.index]
        self.arguments = tuple(inspect.signature(self.stage.forward).parameters)
        unknown = {*self.arguments} - {*entry["inputs"], *entry["receives"], *entry["prepares"]}
        if unknown:
            raise BundleError(
                f"the forward of stage {self.index} takes {', '.join(sorted(unknown))}: not among the inputs, received "
                "and prepared values that the manifest gives it"
            )
        self.messages = Messages(manifest=self.manifest, index=self.index, groups=self.groups)
        self.has_loss = self.index == loss["stage"]
        self.loss_parts = 1 if loss["types"].get("mb") == "P" else self.groups.microbatches

    def run(
        self,
        actions: Sequence[Action],
        batches: Sequence[Values],
        prepared: Values,
        symbols: Mapping[str, int],
        grad: bool,
    ) -> torch.Tensor | None:
        """Run a step's actions on the microbatches; returns the sum of their losses on the stage that has it.

        Raises RankError naming the action that failed and why.
        """
        shapes = self.messages.shapes(symbols)
        self.grad = grad
        for kept in (self.live, self.arrived, self.gradients, self.sending):
            kept.clear()
        last = max((i for i, a in enumerate(actions) if a.kind == "B"), default=-1)
        total: torch.Tensor | None = None
        for position, (before, after) in enumerate(fuse(actions)):
            try:
                self._exchange(before, after, shapes)
            except Exception as error:
                raise self._failure(after or before, error, "in the messages before " if after else "after ") from error
            if after is None:
                break
            try:
                self.entering(after.microbatch)
                if after.kind == "F":
                    loss = self._forward(after.microbatch, {**batches[after.microbatch], **prepared}, shapes)
                    total = loss if total is None else total + loss if loss is not None else total
                else:
                    self.before_backward(position == last)
                    self._backward(after.microbatch)
                    self.after_backward()
            except Exception as error:
                raise self._failure(after, error, "in ") from error
        while self.sending:
            self._wait_for_oldest()
        return total

    def _failure(self, action: Action | None, error: Exception, where: str) -> RankError:
        assert action is not None
        return RankError(
            f"rank {self.groups.rank} failed {where}{self.index}{action.kind}{action.microbatch} {KINDS[action.kind]} "
            f"of stage {self.index}, microbatch {action.microbatch}: {type(error).__name__}: {error}"
        )

    # Messages

    def _exchange(self, before: Action | None, after: Action | None, shapes: Shapes) -> None:
        """Start the sends after one action and the receives before the next together; wait for what is received."""
        sends = self._outgoing(before) if before is not None and before.sends else []
        receives = [] if after is None else [m for peer in after.receives for m in self._incoming(after, peer, shapes)]
        if not sends and not receives:
            return
        sent, received = self.groups.group(["pp"]).begin_exchange(sends, receives)
        for finish in received:
            finish()
        if sends:
            # A schedule is proven as if every exchange waited for its sends. Waiting a little later lets this rank go
            # on, and keeps what is being sent from piling up.
            self.sending.append(list(zip(sent, sends, strict=True)))
            if len(self.sending) > self.groups.size("pp"):
                self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for finish, _ in self.sending.popleft():
            finish()

    def _outgoing(self, action: Action) -> list[Message]:
        """What an action sends, by peer; afterwards a gradient, and without backward a result, has no other owner."""
        if action.kind == "B":
            values: Mapping[str, torch.Tensor] = self.gradients.pop(action.microbatch)
        else:
            live = self.live[action.microbatch] if self.grad else self.live.pop(action.microbatch)
            values = live.results
        return [
            (peer, values[edge.name].detach().contiguous())
            for peer in action.sends
            for edge in self.messages.outgoing[action.kind, peer]
        ]

    def _incoming(self, action: Action, peer: int, shapes: Shapes) -> list[Message]:
        """Room for what a peer sends. Gradients from several peers are added up in the order of the peers."""
        arrived = self.arrived.setdefault((action.kind, action.microbatch), {})
        messages = []
        for edge in self.messages.incoming[action.kind, peer]:
            buffer = torch.empty(shapes[edge.name], dtype=edge.dtype, device=self.groups.device)
            arrived[edge.name if action.kind == "F" else f"{edge.name} from {peer}"] = buffer
            messages.append((peer, buffer))
        return messages

    # Computation

    def _forward(self, microbatch: int, available: Values, shapes: Shapes) -> torch.Tensor | None:
        received = self.arrived.pop(("F", microbatch), {})
        if self.grad:
            for name, tensor in received.items():
                tensor.requires_grad_(self.messages.received[name].requires_grad)
        result = self.stage(**{name: (received if name in received else available)[name] for name in self.arguments})
        if self.has_loss:
            loss = result / self.loss_parts if self.loss_parts > 1 else result
            if self.grad:
                self.live[microbatch] = Live(received=received, results={}, loss=loss)
            return loss.detach()  # type: ignore[no-any-return]
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(self.messages.sent):
            raise BundleError(
                f"the forward of stage {self.index} returns {len(results)} values, the manifest says "
                f"{', '.join(self.messages.sent)}"
            )
        named = dict(zip(self.messages.sent, results, strict=True))
        self.messages.check(named, shapes)
        self.live[microbatch] = Live(received=received, results=named, loss=None)
        return None

    def _backward(self, microbatch: int) -> None:
        live = self.live.pop(microbatch)
        gradients: dict[str, torch.Tensor] = {}
        for key, gradient in self.arrived.pop(("B", microbatch), {}).items():
            name = key.partition(" ")[0]
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        roots = [(live.results[name], gradient) for name, gradient in gradients.items()]
        if live.loss is not None:
            roots.append((live.loss, torch.ones_like(live.loss)))
        roots = [(tensor, gradient) for tensor, gradient in roots if tensor.requires_grad]
        if roots:
            torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        self.gradients[microbatch] = {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in live.received.items()
            if tensor.requires_grad
        }
