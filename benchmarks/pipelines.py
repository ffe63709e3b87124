"""Pipeline schedules side by side with torch.distributed.pipelining, in one run.

    python benchmarks/pipelines.py [--rounds 12] [--ranks 2 4] [--only 1f1b zbv ...]

Ranks on gloo, one thread each; the Llama of compare.py with 8 layers, cut into the same stages on both sides (two on a
rank where a schedule runs several), a batch of 8 x 128 tokens in twice as many microbatches as ranks, AdamW.
Contestants take turns step by step in one process group. Before timing, all losses of the first three steps have to
agree to 1e-4. Shown for every schedule: the times of a step; the most that a forward and backward allocate at once, of
the rank that has most; the bubble of our steps beside the simulated one with the computations' own times.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from allocated import most_allocated
from baselines import LEARNING_RATE
from bubbles import Ran, bubble, ran, simulated
from compare import WARM_UP, batch, check_same_work, model
from rich.console import Console
from rich.table import Table
from torch_pipelines import SCHEDULES, Theirs, num_chunks, stages_of

from meshwright import Mesh, Plan, compile_parallel
from meshwright.passes.schedules import Compute, Pipeline, schedule
from meshwright.runtime import Trainer

NUM_LAYERS = 8
MARK = 0.95
"""For our time as a part of torch's."""
BUBBLE_MARK = 0.1
"""How far the measured bubble may be from the simulated one, as a part of it."""

console = Console(width=140)


def num_microbatches(num_ranks: int) -> int:
    return 2 * num_ranks


class Ours:
    """A rank of our program for a schedule."""

    def __init__(self, name: str, bundle: str):
        self.trainer = Trainer(bundle, optimizer=lambda named: torch.optim.AdamW(named, lr=LEARNING_RATE), device="cpu")
        self.part = self.trainer.shard(batch())
        self.stage = stages_of(name, dist.get_world_size(), dist.get_rank())[0]

    def forward_backward(self) -> torch.Tensor:
        return self.trainer.forward_backward(self.part)

    def step(self) -> float:
        return self.trainer.step(self.part).item()

    def ran(self) -> list[Ran]:
        """What the last step ran."""
        return ran(self.trainer.executor.timed, self.stage)


class Result(NamedTuple):
    """What one rank found, by contestant. peaks: in bytes. steps: what our timed steps ran, as plain data."""

    losses: dict[str, list[float]]
    times: dict[str, list[float]]
    peaks: dict[str, int]
    steps: dict[str, list[list[Any]]]


def contestants(names: Sequence[str]) -> list[tuple[str, str]]:
    """(name as shown, schedule)."""
    return [(f"{side} {name}", name) for name in names for side in ("meshwright", "torch")]


def bundle(directory: str, name: str) -> str:
    return f"{directory}/{name}"


def compiled(directory: str, name: str, num_ranks: int) -> None:
    """Our program for a schedule, cut where torch's stages are cut by hand."""
    length = NUM_LAYERS // (num_ranks * num_chunks(name))
    plan = {
        "microbatches": num_microbatches(num_ranks),
        "schedule": name,
        "stages_per_rank": num_chunks(name),
        "split": [f"model.layers.{first}" for first in range(length, NUM_LAYERS, length)],
    }
    made = compile_parallel(model(NUM_LAYERS), Mesh(pp=num_ranks), example_inputs=batch(), plan=Plan.from_dict(plan))
    made.emit(bundle(directory, name))


def worker(rank: int, directory: str, num_ranks: int, names: Sequence[str], rounds: int) -> None:
    """One rank: all contestants in one process group, in turns. Writes its Result."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", WORLD_SIZE=str(num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks)
    sides: dict[str, Ours | Theirs] = {}
    for shown, name in contestants(names):
        if shown.startswith("torch"):
            sides[shown] = Theirs(name, model(NUM_LAYERS), batch(), num_microbatches(num_ranks))
        else:
            sides[shown] = Ours(name, bundle(directory, name))
    losses = {shown: [side.step() for _ in range(WARM_UP)] for shown, side in sides.items()}
    peaks = {shown: most_allocated(side.forward_backward) for shown, side in sides.items()}
    times: dict[str, list[float]] = {shown: [] for shown in sides}
    steps: dict[str, list[list[Any]]] = {shown: [] for shown in sides}
    for turn in range(rounds):
        first = turn % len(sides)
        for shown, side in [*sides.items()][first:] + [*sides.items()][:first]:
            dist.barrier()
            start = time.perf_counter()
            side.step()
            dist.barrier()
            times[shown].append(time.perf_counter() - start)
            if isinstance(side, Ours):
                steps[shown].append(side.ran())
    result = Result(losses, times, peaks, steps)
    Path(directory, f"result_{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # the contestants' own threads and groups are not made to be taken down side by side


def measure(num_ranks: int, names: Sequence[str], rounds: int) -> list[Result]:
    """What every rank found."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            compiled(directory, name, num_ranks)
        mp.spawn(worker, (directory, num_ranks, names, rounds), nprocs=num_ranks)
        return [Result(*json.loads(Path(directory, f"result_{r}.json").read_text())) for r in range(num_ranks)]


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def show_times(result: Result, names: Sequence[str]) -> None:
    table = Table("schedule", "ours ms", "torch's ms", "ratio of medians", "of fastest", f"mark {MARK}")
    for name in names:
        ours, theirs = result.times[f"meshwright {name}"], result.times[f"torch {name}"]
        medians = statistics.median(ours), statistics.median(theirs)
        ratio, fastest = medians[0] / medians[1], min(ours) / min(theirs)
        shown = [f"{1e3 * medians[0]:.1f}", f"{1e3 * medians[1]:.1f}", f"{ratio:.3f}", f"{fastest:.3f}"]
        table.add_row(name, *shown, verdict(ratio <= MARK))
    console.print(table)


def show_peaks(results: Sequence[Result], names: Sequence[str]) -> None:
    """Of the rank that has most. Beside it the simulated peak, in the activations of a microbatch on a whole rank."""
    table = Table("schedule", "ours MB", "torch's MB", "ratio of peaks", "simulated")
    num_ranks = len(results)
    for name in names:
        ours, theirs = (max(r.peaks[f"{side} {name}"] for r in results) for side in ("meshwright", "torch"))
        made = schedule(name, Pipeline.of(num_ranks, num_microbatches(num_ranks), num_chunks(name)))
        alive = f"{max(made.simulation().peaks):g} microbatches"
        table.add_row(name, f"{ours / 1e6:.1f}", f"{theirs / 1e6:.1f}", f"{ours / theirs:.3f}", alive)
    console.print(table)


def show_bubbles(results: Sequence[Result], names: Sequence[str], rounds: int) -> None:
    """Judged where every rank has a core; else ranks wait for cores, which the simulator knows nothing of."""
    num_ranks, judged = len(results), (os.cpu_count() or 1) >= len(results)
    heading = f"mark +-{BUBBLE_MARK:.0%}" if judged else "not judged"
    table = Table("schedule", "bubble measured", "simulated", "measured/simulated", heading)
    for name in names:
        every = [[[Ran(Compute(*c), *t) for c, *t in step] for step in r.steps[f"meshwright {name}"]] for r in results]
        steps = [[rank[turn] for rank in every] for turn in range(rounds)]
        pipeline = Pipeline.of(num_ranks, num_microbatches(num_ranks), num_chunks(name))
        found, expected = statistics.median(map(bubble, steps)), simulated(name, pipeline, steps).bubble_share
        reached = verdict(abs(found - expected) <= BUBBLE_MARK * expected) if judged else "-"
        table.add_row(name, f"{found:.1%}", f"{expected:.1%}", f"{found / expected:.3f}", reached)
    console.print(table)
    if not judged:
        console.print(f"{os.cpu_count()} cores for {num_ranks} ranks: bubbles are shown, not judged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--only", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES), metavar="SCHEDULE")
    args = parser.parse_args()
    for num_ranks in args.ranks:
        console.rule(f"{num_ranks} ranks, {num_microbatches(num_ranks)} microbatches")
        results = measure(num_ranks, args.only, args.rounds)
        losses: dict[str, list[float]] = results[0].losses
        check_same_work(losses)
        show_times(results[0], args.only)
        show_peaks(results, args.only)
        show_bubbles(results, args.only, args.rounds)


if __name__ == "__main__":
    main()
