"""When one rank fails the others end within seconds: a flag in the store, and a thread on every rank that
watches it.
"""

import atexit
import os
import sys
import threading
from typing import Any

import torch.distributed as dist

KEY = "meshwright/failed"
SECONDS = 0.5


class Watch:
    """Watches for the failure of another rank, and announces this one's."""

    def __init__(self, rank: int):
        self.rank = rank
        self.stopped = threading.Event()
        store = dist.distributed_c10d._get_default_store()
        self.store: Any = store.clone() if hasattr(store, "clone") else store
        self.key = f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.thread = threading.Thread(target=self._run, daemon=True, name="meshwright-watch")
        self.thread.start()
        atexit.register(self.stop)

    def announce(self, reason: str) -> None:
        """Tell the others that this rank fails; where another failed first, and said why, end without a word."""
        self.stopped.set()
        try:
            if self.store.check([self.key]):
                os._exit(1)
            self.store.set(self.key, reason)
        except Exception as error:  # the store is gone, and with it the others
            print(f"rank {self.rank} could not announce its failure: {error}", file=sys.stderr)

    def stop(self) -> None:
        """End the thread: it must not use the store while the process takes it down."""
        self.stopped.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        while not self.stopped.wait(SECONDS):
            try:
                failed = self.store.check([self.key])
            except Exception:  # the store ended: so does the job
                return
            if failed and not self.stopped.is_set():
                os._exit(1)
