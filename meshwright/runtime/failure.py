"""When one rank fails the others end within seconds: a flag in the store, and a thread on each rank that watches."""

import atexit
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

KEY = "meshwright/failed"
SECONDS = 0.5
"""Between two looks at the store."""
GRACE = 2.0
"""Seconds that the failed rank has to end first, so that a launcher calls it the cause."""


class StoreWatch:
    """Watches for the failure of another rank, and reports this one's.

    One rank reports, the first; the others end without a word, whether they wait for it in a collective, lose the
    connection to it, or fail in the same way at the same time.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.stopped = threading.Event()
        # A store of its own: the default one is locked while it waits for other ranks.
        self.store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.key = f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.thread = threading.Thread(target=self._run, daemon=True, name="meshwright-watch")
        self.thread.start()
        atexit.register(self.stop)

    def report(self, reason: str) -> None:
        """Tell the others that this rank fails; does not return where another rank did so before."""
        self.stopped.set()
        reason = f"rank {self.rank}: {reason}"
        try:
            first = self.store.compare_set(self.key, "", reason).decode()
        except Exception as error:  # the store is gone, and with it the rank that held it
            print(f"rank {self.rank} could not report its failure: {error}", file=sys.stderr)
            return
        if first != reason:
            self._end()

    def stop(self) -> None:
        """End the thread: it must not use the store while the process takes it down."""
        self.stopped.set()
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout=5)
        atexit.unregister(self.stop)

    def _run(self) -> None:
        while not self.stopped.wait(SECONDS):
            try:
                failed = self.store.check([self.key])
            except Exception:  # the store ended: so does the job
                return
            if failed and not self.stopped.is_set():
                self._end()

    def _end(self) -> None:
        """End this process whatever it waits for: no backend promises to give up a collective."""
        time.sleep(GRACE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
