"""Eight worker processes kept alive over a session: a case costs its own work, not the start of Python and torch."""

import importlib
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 120.0


def _worker(index: int, tasks: Any, answers: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        number, store, size, name, args = task
        try:
            module, _, function = name.partition(":")
            if size > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=index, world_size=size, timeout=timedelta(seconds=60)
                )
            os.environ["WORLD_SIZE"] = str(size)
            try:
                answers.put((number, index, None, getattr(importlib.import_module(module), function)(*args)))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException as error:
            answers.put((number, index, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))


class Pool:
    """``run("module:function", args, ranks=4)`` calls the function on ranks 0 to 3 and returns their results."""

    def __init__(self, size: int = 8):
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.answers = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        self.workers = [
            context.Process(target=_worker, args=(i, self.tasks[i], self.answers), daemon=True) for i in range(size)
        ]
        for worker in self.workers:
            worker.start()
        self.number = 0

    def run(self, name: str, args: Sequence[Any] = (), *, ranks: int, seconds: float = SECONDS) -> list[Any]:
        """Results by rank. Raises RuntimeError with the first failure, or when a worker died or time is up."""
        self.number += 1
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            for index in range(ranks):
                self.tasks[index].put((self.number, str(store), ranks, name, tuple(args)))
            results: dict[int, Any] = {}
            end = time.monotonic() + seconds
            while len(results) < ranks:
                try:
                    number, index, error, result = self.answers.get(timeout=1)
                except queue.Empty:
                    dead = [i for i, worker in enumerate(self.workers) if not worker.is_alive()]
                    if dead or time.monotonic() > end:
                        self.close()
                        raise RuntimeError(
                            f"workers {dead} died" if dead else f"{name} took over {seconds} s"
                        ) from None
                    continue
                if number != self.number:
                    continue
                if error is not None:
                    self.close()
                    raise RuntimeError(f"rank {index}: {error}")
                results[index] = result
        return [results[i] for i in range(ranks)]

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join(timeout=5)

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)
