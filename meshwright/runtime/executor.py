"""The executor: runs a rank's actions, with sends and receives around them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.runtime.actions import Action, fuse
from meshwright.runtime.errors import PlanError, RankError
from meshwright.runtime.groups import Groups, rank_at
from meshwright.runtime.layout import local_shape

Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True, kw_only=True)
class Live:
    """What is kept of one microbatch between its forward and its backward."""

    received: dict[str, torch.Tensor]
    sent: dict[str, torch.Tensor]
    loss: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class Executor:
    """Runs one stage. ``before_backward(last)`` is called before every backward, ``last`` on the step's last."""

    stage: nn.Module
    index: int
    manifest: Mapping[str, Any]
    groups: Groups
    before_backward: Callable[[bool], None]
    arguments: tuple[str, ...] = field(init=False)
    live: dict[int, Live] = field(default_factory=dict)
    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arguments = tuple(inspect.signature(self.stage.forward).parameters)

    @property
    def entry(self) -> Mapping[str, Any]:
        return self.manifest["stages"][self.index]  # type: ignore[no-any-return]

    def run(
        self,
        actions: Sequence[Action],
        batches: Sequence[Tensors],
        prepared: Tensors,
        symbols: Mapping[str, int],
        grad: bool,
    ) -> torch.Tensor:
        """Run a step's actions on the microbatches; returns the sum of this rank's losses (0 off the loss stage)."""
        total = torch.zeros((), device=self.groups.device)
        last = max((i for i, a in enumerate(actions) if a.kind == "B"), default=-1)
        arrived: dict[int, dict[str, torch.Tensor]] = {}
        sending: list[tuple[Any, Any]] = []
        for position, (before, after) in enumerate(fuse(actions)):
            try:
                sending += self._exchange(before, after, arrived, symbols)
            except Exception as error:
                raise self._failure(after or before, error, "exchange around ") from error  # type: ignore[arg-type]
            if after is None:
                break
            try:
                if after.kind == "F":
                    loss = self._forward(after.microbatch, arrived.pop(after.microbatch, {}), batches, prepared, grad)
                    if loss is not None:
                        total = (
                            total + loss.detach().to(total.dtype)
                            if total.dtype == loss.dtype
                            else loss.detach() + total
                        )
                else:
                    self.before_backward(position == last)
                    self._backward(after.microbatch, arrived.pop(~after.microbatch, {}))
            except Exception as error:
                raise self._failure(after, error, "") from error
            if not grad:
                self.live.pop(after.microbatch - 1, None)
        for work, _ in sending:
            work.wait()
        self.live.clear()
        self.gradients.clear()
        return total

    def _failure(self, action: Action, error: Exception, doing: str) -> RankError:
        kind = "forward" if action.kind == "F" else "backward"
        name = f"{self.index}{action.kind}{action.microbatch}"
        return RankError(
            f"rank {self.groups.rank} failed in {doing}{name} {kind} of stage {self.index}, microbatch "
            f"{action.microbatch}: "
            f"{type(error).__name__}: {error}"
        )

    # Messages

    def _exchange(
        self,
        before: Action | None,
        after: Action | None,
        arrived: dict[int, dict[str, torch.Tensor]],
        symbols: Mapping[str, int],
    ) -> list[tuple[Any, Any]]:
        """Start the sends after one action and the receives before the next together; wait for what is received."""
        operations: list[dist.P2POp] = []
        if before is not None:
            operations += [
                dist.P2POp(dist.isend, tensor, peer) for peer in before.sends for tensor in self._outgoing(before, peer)
            ]
        sends = len(operations)
        if after is not None and after.receives:
            buffers: dict[str, torch.Tensor] = {}
            for peer in after.receives:
                for name, buffer in self._incoming(after, peer, symbols):
                    buffers[name if after.kind == "F" else f"{peer}:{name}"] = buffer
                    operations.append(dist.P2POp(dist.irecv, buffer, peer))
            arrived[after.microbatch if after.kind == "F" else ~after.microbatch] = buffers
        if not operations:
            return []
        works = dist.batch_isend_irecv(operations)
        if len(works) != len(operations):  # NCCL coalesces a batch into one
            for work in works:
                work.wait()
            return []
        for work in works[sends:]:
            work.wait()
        return [(work, operation) for work, operation in zip(works[:sends], operations[:sends], strict=True)]

    def _stage_of(self, rank: int) -> int:
        for stage in range(self.groups.size("pp")):
            if self._peer(stage) == rank:
                return stage
        raise RankError(f"rank {rank} is no peer of rank {self.groups.rank}")

    def _peer(self, stage: int) -> int:
        return rank_at(self.groups.sizes, {**self.groups.coordinates, "pp": stage})

    def _outgoing(self, action: Action, peer: int) -> list[torch.Tensor]:
        stage = self._stage_of(peer)
        if action.kind == "F":
            sent = self.live[action.microbatch].sent
            return [
                sent[name].detach().contiguous() for name, edge in self.entry["sends"].items() if stage in edge["to"]
            ]
        gradients = (
            self.gradients.pop(action.microbatch) if peer == action.sends[-1] else self.gradients[action.microbatch]
        )
        return [
            gradients[n].contiguous()
            for n, e in self.entry["receives"].items()
            if e["from"] == stage and e["requires_grad"]
        ]

    def _incoming(self, action: Action, peer: int, symbols: Mapping[str, int]) -> list[tuple[str, torch.Tensor]]:
        stage = self._stage_of(peer)
        if action.kind == "F":
            edges = [(n, e) for n, e in self._sends_of(stage) if self.index in e["to"]]
        else:
            edges = [(n, e) for n, e in self._receives_of(stage) if e["from"] == self.index and e["requires_grad"]]
        sizes = {**self.groups.sizes, "mb": self.groups.microbatches}
        return [
            (
                name,
                torch.empty(
                    local_shape(edge["shape"], edge["types"], symbols, sizes),
                    dtype=getattr(torch, edge["dtype"]),
                    device=self.groups.device,
                ),
            )
            for name, edge in edges
        ]

    def _sends_of(self, stage: int) -> list[tuple[str, Any]]:
        return list(self.manifest["stages"][stage]["sends"].items())

    def _receives_of(self, stage: int) -> list[tuple[str, Any]]:
        return list(self.manifest["stages"][stage]["receives"].items())

    # Computation

    def _forward(
        self,
        microbatch: int,
        received: dict[str, torch.Tensor],
        batches: Sequence[Tensors],
        prepared: Tensors,
        grad: bool,
    ) -> torch.Tensor | None:
        for name, tensor in received.items():
            if grad and self.entry["receives"][name]["requires_grad"]:
                tensor.requires_grad_()
        available = {**batches[microbatch], **prepared, **received}
        result = self.stage(**{name: available[name] for name in self.arguments})
        names = list(self.entry["sends"])
        if self.index == self.manifest["loss"]["stage"]:
            self.live[microbatch] = Live(received=received, sent={}, loss=result)
            return result  # type: ignore[no-any-return]
        results = result if isinstance(result, tuple) else (result,)
        self.live[microbatch] = Live(received=received, sent=dict(zip(names, results, strict=True)), loss=None)
        return None

    def _backward(self, microbatch: int, arrived: Mapping[str, torch.Tensor]) -> None:
        live = self.live.pop(microbatch)
        if live.loss is not None:
            live.loss.backward()
        else:
            totals: dict[str, torch.Tensor] = {}
            for key, tensor in arrived.items():
                name = key.partition(":")[2]
                totals[name] = totals[name] + tensor if name in totals else tensor
            names = [name for name in live.sent if name in totals and live.sent[name].requires_grad]
            torch.autograd.backward([live.sent[n] for n in names], [totals[n] for n in names])
        self.gradients[microbatch] = {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in live.received.items()
            if tensor.requires_grad
        }


def symbols_of(inputs: Mapping[str, Any], part: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """The symbolic sizes of a step's global batch from this replica's part. Raises PlanError where inputs
    contradict.
    """
    found: dict[str, int] = {}
    for name, entry in inputs.items():
        tensor = part.get(name)
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.ndim != len(entry["shape"]):
            raise PlanError(
                f"{name!r} has {tensor.ndim} dims; the program was compiled for {len(entry['shape'])}: {entry['shape']}"
            )
        for dim, size in enumerate(entry["shape"]):
            actual = tensor.shape[dim] * (sizes.get("dp", 1) if dim == 0 and "dp" in entry["types"] else 1)
            expected = found.setdefault(size, actual) if isinstance(size, str) and size.isidentifier() else size
            if isinstance(expected, int) and expected != actual:
                raise PlanError(
                    f"{name!r} has size {actual} in dim {dim}, where the program expects {expected} ({size})"
                )
    return found
