"""A third party that asks `status` over and over and remembers what it was told.

What `status` once reported as complete must be restorable for ever after, whatever is killed: the
observer's memory is the lower bound of every restore, and a report that goes back is an error by itself.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
from node import Asker

EVERY_S = 0.01


class Observer:
    """Polls the daemon of `runtime`; survives its absence. Newest reports are (generation, step)."""

    def __init__(self, runtime: Path) -> None:
        self._asker = Asker(runtime)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer")
        self.newest: dict[str, tuple[int, int]] = {}
        self.errors: list[str] = []
        self._removed: set[str] = set()
        self.report_count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._asker.forget()

    def forget(self, job: str) -> None:
        """The job is about to be removed: what is said of it from now on is not judged."""
        self._removed.add(job)

    def reported(self, job: str) -> tuple[int, int]:
        """The newest (generation, step) that was reported as complete; (0, 0) before any."""
        return self.newest.get(job, (0, 0))

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                reply = self._asker.status(timeout_s=2.0)
            except (OSError, grpc.RpcError, ValueError):
                continue
            self.report_count += 1
            for job in reply.jobs:
                if job.job not in self._removed:
                    self._note(job)

    def _note(self, job: object) -> None:
        name = job.job  # type: ignore[attr-defined]
        if job.has_complete:  # type: ignore[attr-defined]
            now = (job.complete_generation, job.complete_step)  # type: ignore[attr-defined]
            before = self.newest.get(name, (0, 0))
            if now < before:
                self.errors.append(f"job {name}: status reported {before} as complete, later {now}")
            self.newest[name] = max(before, now)
        elif name in self.newest:
            self.errors.append(f"job {name}: status reported {self.newest[name]} as complete, later nothing")
