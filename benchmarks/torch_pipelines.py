"""The same Llama under torch.distributed.pipelining: stages cut by hand, the schedules that both sides have."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from baselines import LEARNING_RATE, Batch, Cut, cross_entropy
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from meshwright.passes.schedules import ALGORITHMS

SCHEDULES: Mapping[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "looped-bfs": ScheduleLoopedBFS,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipe-v": ScheduleDualPipeV,
}
"""Our name of a schedule -> torch's class for it."""


def num_chunks(name: str) -> int:
    """Stages on a rank: one, or two where a schedule runs several."""
    return ALGORITHMS[name].chunks or 2


def stages_of(name: str, num_ranks: int, rank: int) -> list[int]:
    """The stages of a rank, the same on both sides."""
    placement = ALGORITHMS[name].placement(num_ranks, num_chunks(name))
    return [stage for stage, place in enumerate(placement) if place == rank]


class Theirs:
    """A rank under one of torch's schedules."""

    def __init__(self, name: str, model: Any, batch: Batch, num_microbatches: int):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        stages, number = stages_of(name, num_ranks, rank), num_ranks * num_chunks(name)
        self.batch, self.first, self.last = batch, 0 in stages, number - 1 in stages
        self.module = nn.ModuleList(Cut(model, stage, number) for stage in stages)
        cpu = torch.device("cpu")
        pieces = [PipelineStage(cut, stage, number, cpu) for cut, stage in zip(self.module, stages, strict=True)]
        made, several = SCHEDULES[name], issubclass(SCHEDULES[name], PipelineScheduleMulti)
        self.schedule = made(pieces if several else pieces[0], num_microbatches, loss_fn=cross_entropy)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE)

    def forward_backward(self) -> list[torch.Tensor]:
        """Adds to the gradients; the losses of the microbatches on the rank that has them."""
        losses: list[torch.Tensor] = []
        inputs = (self.batch["input_ids"],) if self.first else ()
        labels = {"target": self.batch["labels"], "losses": losses} if self.last else {}
        self.schedule.step(*inputs, **labels, return_outputs=False)
        return losses

    def step(self) -> float:
        self.optimizer.zero_grad()
        losses = self.forward_backward()
        self.optimizer.step()
        value = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.all_reduce(value)
        return value.item()
