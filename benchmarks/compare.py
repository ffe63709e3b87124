"""Step times side by side with torch's own parallelisms, in one run.

    python benchmarks/compare.py [--rounds 12] [--only dp2 DDP ...]

Two ranks on gloo, one thread each; a Llama of 4 layers (hidden 256, 8 heads, intermediate 688, vocabulary 1024), a
batch of 8 x 128 tokens, AdamW. Contestants take turns step by step, so that a busy machine disturbs all alike; medians
and ratios are shown. Before timing, the losses of all contestants' first three steps have to agree to 1e-4: the third
loss has two updates behind it, so forward, gradients and optimizer are the same work.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from baselines import BASELINES, LEARNING_RATE, Step
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from meshwright import Mesh, Plan, compile_parallel
from meshwright.runtime import Trainer

WARM_UP = 3

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


def model(num_layers: int = 4) -> LlamaForCausalLM:
    """The same model everywhere, with the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=num_layers,
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
    trainer = Trainer(directory, optimizer=lambda named: torch.optim.AdamW(named, lr=LEARNING_RATE), device="cpu")
    part = trainer.shard(batch())
    return lambda: trainer.step(part).item()


def worker(rank: int, directory: str, bundles: dict[str, str], names: list[str], rounds: int) -> None:
    """One of the two ranks: all contestants in one process group, in turns. Rank 0 writes result.json."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    steps = {n: ours(bundles[n]) if n in bundles else BASELINES[n](model(), batch(), rank) for n in names}
    losses = {name: [step() for _ in range(WARM_UP)] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps({"losses": losses, "times": times}))
    dist.barrier()
    os._exit(0)  # the contestants' own threads and groups are not made to be taken down side by side


def measure(names: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The losses of the warm-up and the seconds of every timed step, by contestant."""
    with tempfile.TemporaryDirectory() as directory:
        bundles = {n: f"{directory}/{n.replace(' ', '_')}" for n in names if n in OURS}
        for name, path in bundles.items():
            mesh, plan = OURS[name]
            compile_parallel(model(), mesh, example_inputs=batch(), plan=plan).emit(path)
        mp.spawn(worker, (directory, bundles, names, rounds), nprocs=2)
        result = json.loads(Path(directory, "result.json").read_text())
    return result["losses"], result["times"]


def check_same_work(losses: dict[str, list[float]]) -> None:
    """Exit where a contestant's losses are not the first one's."""
    reference, *others = losses
    for name in others:
        for step, (loss, expected) in enumerate(zip(losses[name], losses[reference], strict=True)):
            if not abs(loss - expected) <= 1e-4:
                raise SystemExit(f"{name} computes another loss in step {step}: {loss}, {reference} has {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name has one of these words")
    args = parser.parse_args()
    known = [*OURS, *BASELINES]
    names = [name for name in known if not args.only or any(word in name for word in args.only)]
    if not names:
        parser.error(f"no contestant has {' or '.join(args.only)} in its name: there are {', '.join(known)}")
    losses, times = measure(names, args.rounds)
    check_same_work(losses)
    medians = {name: statistics.median(times[name]) for name in names}

    console = Console(width=120)
    table = Table("contestant", "median ms", "fastest ms")
    for name in names:
        table.add_row(name, f"{1e3 * medians[name]:.1f}", f"{1e3 * min(times[name]):.1f}")
    console.print(table)
    table = Table("ours", "theirs", "ratio of medians", "of fastest", "mark for medians")
    for one, other, mark in PAIRS:
        if one in medians and other in medians:
            ratio = medians[one] / medians[other]
            fastest = min(times[one]) / min(times[other])  # beside the medians: far apart means a busy machine
            verdict = f"{mark:.2f} {'reached' if ratio <= mark else 'missed'}"
            table.add_row(one, other, f"{ratio:.3f}", f"{fastest:.3f}", verdict)
    if table.row_count:
        console.print(table)


if __name__ == "__main__":
    main()
