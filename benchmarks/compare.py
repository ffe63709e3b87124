"""Step times side by side with torch's own parallelisms, in one run.

    python benchmarks/compare.py [--rounds 12] [--only dp2 ...]

Two ranks on gloo, one thread each; a Llama of 4 layers (hidden 256, 8 heads, intermediate 688, vocabulary 1024), a
batch of
8 x 128 tokens, AdamW. Contestants take turns step by step, so that a busy machine disturbs all alike; medians and
ratios are
shown. Before timing, all contestants' losses on the same batch have to agree to 1e-4.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from baselines import BASELINES
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from meshwright import Mesh, Plan, compile_parallel
from meshwright.runtime import Trainer

Step = Callable[[], float]

OURS: dict[str, tuple[Mesh, Plan]] = {
    "meshwright dp2": (Mesh(dp=2), Plan()),
    "meshwright zero3": (Mesh(dp=2), Plan(zero=3)),
    "meshwright tp2": (Mesh(tp=2), Plan()),
    "meshwright pp2": (Mesh(pp=2), Plan(microbatches=4)),
}

PAIRS = [
    ("meshwright dp2", "torch DDP", 1.0),
    ("meshwright zero3", "torch FSDP2", 0.8),
    ("meshwright tp2", "torch DTensor tp2", 0.6),
    ("meshwright pp2", "torch 1F1B", 1.0),
]
"""Ours, theirs, and the mark for the ratio."""


def model() -> LlamaForCausalLM:
    """The same model everywhere, with the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            use_cache=False,
        )
    )


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1024, (8, 128), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def ours(directory: str) -> Step:
    trainer = Trainer(directory, optimizer=lambda named: torch.optim.AdamW(named, lr=1e-4), device="cpu")
    part = trainer.shard(batch())
    return lambda: trainer.step(part).item()


def worker(rank: int, store: str, bundles: dict[str, str], names: list[str], rounds: int, answer: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    steps = {n: ours(bundles[n]) if n in bundles else BASELINES[n](model(), batch(), rank) for n in names}
    first = {name: step() for name, step in steps.items()}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    if rank == 0:
        answer.put((first, times))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    names = [n for n in [*OURS, *BASELINES] if not args.only or any(word in n for word in args.only)]
    with tempfile.TemporaryDirectory() as directory:
        bundles = {n: f"{directory}/{n.replace(' ', '_')}" for n in names if n in OURS}
        for name, path in bundles.items():
            mesh, plan = OURS[name]
            compile_parallel(model(), mesh, example_inputs=batch(), plan=plan).emit(path)
        context = mp.get_context("spawn")
        answer = context.Queue()
        arguments = (f"{directory}/store", bundles, names, args.rounds, answer)
        running = mp.start_processes(worker, arguments, nprocs=2, join=False, start_method="spawn")
        first, times = answer.get(timeout=600)
        running.join(timeout=30)
    console = Console(width=120)
    reference = first[names[0]]
    for name, loss in first.items():
        if abs(loss - reference) > 1e-4:
            raise SystemExit(f"{name} computes another loss: {loss} against {reference}")
    table = Table("contestant", "median ms", "fastest ms")
    for name in names:
        table.add_row(name, f"{1e3 * statistics.median(times[name]):.1f}", f"{1e3 * min(times[name]):.1f}")
    console.print(table)
    table = Table("ours", "theirs", "ratio of medians", "mark")
    for one, other, mark in PAIRS:
        if one in times and other in times:
            ratio = statistics.median(times[one]) / statistics.median(times[other])
            table.add_row(one, other, f"{ratio:.2f}", f"{mark:.2f} {'reached' if ratio <= mark else 'missed'}")
    console.print(table)


if __name__ == "__main__":
    main()
