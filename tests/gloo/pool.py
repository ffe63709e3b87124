"""Ranks to run tasks on: processes kept alive over a session, so that a case costs its own work, or threads."""

import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from meshwright.runtime import run_in_one_process

SECONDS = 120.0
GRACE = 6.0
"""Seconds that the other ranks have to end by themselves after the first failure."""
DIED, STUCK = "died", "did not end"


def _work(index: int, pipe: Connection) -> None:
    """Run tasks until the pipe closes; each in a process group of its own."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MESHWRIGHT_TIMEOUT": "110"}
    import torch
    import torch.distributed as dist

    import meshwright.runtime  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: collecting after a task looks at what the task left
    while True:
        try:
            store, size, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ["WORLD_SIZE"] = str(size)
        try:
            if size > 1:
                limit = timedelta(seconds=60)
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=index, world_size=size, timeout=limit
                )
            answer: tuple[str | None, Any] = (None, _function(name)(*args))
        except BaseException as error:
            answer = (f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None)
        pipe.send_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # groups that are left have threads that poll


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, index: int) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(index, there), daemon=True)
        process.start()
        there.close()
        return cls(process, here)

    def end(self) -> None:
        self.process.kill()
        self.process.join(timeout=5)
        self.pipe.close()


class Failed(RuntimeError):
    """A task failed. ``loud``: how many ranks raised or had to be killed; the others ended without a word."""

    def __init__(self, message: str, loud: int):
        super().__init__(message)
        self.loud = loud


class Ranks(Protocol):
    """``run("module:function", args, ranks=4)`` calls the function on ranks 0 to 3 and returns their results."""

    def run(self, name: str, args: Sequence[Any] = (), *, ranks: int) -> list[Any]:
        """Results by rank. Raises Failed with the first failure."""


class OneProcess:
    """``Ranks`` as threads of this process."""

    def run(self, name: str, args: Sequence[Any] = (), *, ranks: int) -> list[Any]:
        task = pickle.dumps(tuple(args))  # every rank has its own, as in a process
        try:
            return run_in_one_process(lambda rank: _function(name)(*pickle.loads(task)), ranks)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}", 1) from error


class Pool:
    """``Ranks`` as processes."""

    def __init__(self) -> None:
        self.workers: dict[int, _Worker] = {}

    def run(self, name: str, args: Sequence[Any] = (), *, ranks: int, seconds: float = SECONDS) -> list[Any]:
        """Results by rank.

        Raises Failed with the first failure, or when a worker died or time is up.
        """
        # A worker takes down its store after it has answered, and may leave something there meanwhile.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            task = pickle.dumps((str(Path(directory) / "store"), ranks, name, tuple(args)))
            for index in range(ranks):
                if index not in self.workers:
                    self.workers[index] = _Worker.start(index)
                self.workers[index].pipe.send_bytes(task)
            results: dict[int, Any] = {}
            failures: dict[int, str] = {}
            end = time.monotonic() + seconds
            while len(results) + len(failures) < ranks:
                busy = {self.workers[i].pipe: i for i in range(ranks) if i not in results and i not in failures}
                ready = wait(list(busy), timeout=max(0.0, end - time.monotonic()))
                if not ready:
                    for index in busy.values():
                        failures[index] = f"took over {seconds} s" if not failures else STUCK
                        self.workers.pop(index).end()
                for pipe in ready:
                    index = busy[pipe]  # type: ignore[index]
                    try:
                        error, results[index] = pickle.loads(self.workers[index].pipe.recv_bytes())
                    except (EOFError, OSError):
                        error = DIED
                        self.workers.pop(index).end()
                    if error is not None:
                        results.pop(index, None)
                        failures[index] = error
                        end = min(end, time.monotonic() + GRACE)
        if failures:
            told = [index for index, error in failures.items() if error not in (DIED, STUCK)]
            first = told[0] if told else next(iter(failures))
            loud = len(told) + list(failures.values()).count(STUCK)
            raise Failed(f"rank {first}: {failures[first]}", loud)
        return [results[index] for index in range(ranks)]

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()
