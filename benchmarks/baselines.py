"""torch's own ways to train the same Llama on two ranks; each gives a step function that returns the global loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Batch = Mapping[str, torch.Tensor]
Step = Callable[[], float]
LEARNING_RATE = 1e-4


def _half(batch: Batch, rank: int) -> dict[str, torch.Tensor]:
    return {name: value.chunk(2)[rank] for name, value in batch.items()}


def _mean(loss: torch.Tensor) -> float:
    value = loss.detach().clone()
    dist.all_reduce(value)
    return value.item() / 2


def ddp(model: Any, batch: Batch, rank: int) -> Step:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    part = _half(batch, rank)

    def step() -> float:
        optimizer.zero_grad()
        loss = wrapped(**part).loss
        loss.backward()
        optimizer.step()
        return _mean(loss)

    return step


def fsdp2(model: Any, batch: Batch, rank: int) -> Step:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    part = _half(batch, rank)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        return _mean(loss)

    return step


def dtensor(model: Any, batch: Batch, rank: int) -> Step:
    """Megatron's split; logits stay split over the vocabulary for loss_parallel, as torchtitan has it."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[name] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[name] = RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    parameters = list(model.parameters())
    groups = [[p for p in parameters if isinstance(p, DTensor) is split] for split in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=LEARNING_RATE)  # one kind for foreach

    def step() -> float:
        optimizer.zero_grad()
        with loss_parallel():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        value = loss.detach()
        return float(value.full_tensor() if isinstance(value, DTensor) else value)

    return step


class Cut(nn.Module):
    """One of ``num_stages`` stages with as many layers each; the first has the embedding, the last the head."""

    def __init__(self, model: Any, index: int, num_stages: int):
        super().__init__()
        length = len(model.model.layers) // num_stages
        self.rotary_emb = model.model.rotary_emb
        self.layers = nn.ModuleList(model.model.layers[length * index : length * (index + 1)])
        self.embed_tokens = model.model.embed_tokens if index == 0 else None
        self.norm = model.model.norm if index == num_stages - 1 else None
        self.lm_head = model.lm_head if index == num_stages - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(x) if self.embed_tokens is not None else x
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        return self.lm_head(self.norm(hidden)) if self.lm_head is not None and self.norm is not None else hidden


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def pipelining(model: Any, batch: Batch, rank: int) -> Step:
    half = Cut(model, rank, 2)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"))
    optimizer = torch.optim.AdamW(half.parameters(), lr=LEARNING_RATE)

    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=cross_entropy)

    def step() -> float:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(batch["input_ids"], return_outputs=False)
        else:
            schedule.step(target=batch["labels"], losses=losses, return_outputs=False)
        optimizer.step()
        value = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.all_reduce(value)
        return value.item()

    return step


def one_rank(model: Any, batch: Batch, rank: int) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        value = torch.zeros(())
        if rank == 0:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            value = loss.detach().clone()
        dist.all_reduce(value)
        return value.item()

    return step


BASELINES: Mapping[str, Callable[[Any, Batch, int], Step]] = {
    "torch DDP": ddp,
    "torch FSDP2": fsdp2,
    "torch DTensor tp2": dtensor,
    "torch 1F1B": pipelining,
    "one rank": one_rank,
}
"""Name -> (model, global batch, rank) -> step."""
