"""A third party that asks every daemon's `status` over and over and remembers what it was told.

What `status` once called protected must be restorable after the loss of any m nodes: the observer's memory is the
lower bound of every restore. It is neither daemon nor trainer, and loses nothing when they die.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from snapd_proto import admin_pb2

from tests.cluster.harness.asking import Asker
from tests.cluster.harness.cluster import Cluster
from tests.support.fake_trainer import Refused

EVERY_S = 0.1
Snapshot = tuple[int, int]  # (generation, step)
NONE: Snapshot = (0, 0)


@dataclass(frozen=True)
class Seen:
    """A job's levels at a moment (monotonic seconds), as a node told them."""

    t: float
    node: str
    complete: Snapshot
    protected: Snapshot


class Observer:
    """Asks the daemons of `runtimes` (node -> runtime folder) in turn."""

    def __init__(self, runtimes: Callable[[], dict[str, Path]]) -> None:
        self._runtimes = runtimes
        self._askers: dict[Path, Asker] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer")
        self._lock = threading.Lock()
        self._protected: dict[str, Snapshot] = defaultdict(lambda: NONE)
        self._complete: dict[str, Snapshot] = defaultdict(lambda: NONE)
        self.history: dict[str, list[Seen]] = defaultdict(list)
        self.report_count = 0

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for asker in self._askers.values():
            asker.forget()

    def protected(self, job: str) -> Snapshot:
        """The newest (generation, step) that any daemon called protected; (0, 0): none."""
        with self._lock:
            return self._protected[job]

    def complete(self, job: str) -> Snapshot:
        with self._lock:
            return self._complete[job]

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            for node, runtime in self._runtimes().items():
                asker = self._askers.setdefault(runtime, Asker(runtime))
                try:
                    reply = asker.status(timeout_s=1.0)
                except (OSError, grpc.RpcError, Refused):
                    continue
                self._note(node, reply)

    def _note(self, node: str, reply: admin_pb2.StatusReply) -> None:
        with self._lock:
            self.report_count += 1
            for job in reply.jobs:
                complete = (job.complete_generation, job.complete_step) if job.has_complete else NONE
                protected = (job.protected_generation, job.protected_step) if job.has_protected else NONE
                seen = self.history[job.job]
                if not seen or (seen[-1].complete, seen[-1].protected) != (complete, protected):
                    seen.append(Seen(time.monotonic(), node, complete, protected))
                self._complete[job.job] = max(self._complete[job.job], complete)
                self._protected[job.job] = max(self._protected[job.job], protected)


def runtimes_of(cluster: Cluster) -> Callable[[], dict[str, Path]]:
    """For an Observer: the daemons that run at the moment."""
    return lambda: {daemon.node: daemon.runtime for daemon in list(cluster.daemons) if daemon.is_running}
