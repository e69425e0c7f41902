"""What every part of the node needs: settings, folders, threads, clock, identity. Built by daemon.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from snapd.errors import JobUnusable
from snapd.memory.folders import ArenaFolder
from snapd.obs.log import EventLog
from snapd.obs.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Bounds and choices; config.py documents each."""

    chunk_bytes: int
    slots: int
    arena_bytes: int
    headroom_bytes: int
    poll_interval_s: float
    interval_factor_max: int
    restore_settle_s: float
    restore_finish_s: float
    grow_retry_s: float
    hash_threads: int
    sessions_max: int
    wait_max_s: float


@dataclass(frozen=True, slots=True)
class Environment:
    """Time, randomness and identity, passed in so that nothing else reads them."""

    monotonic_s: Callable[[], float]
    monotonic_ns: Callable[[], int]
    wall_s: Callable[[], float]
    random_id: Callable[[], int]  # 1 .. 2^48 - 1
    random_secret: Callable[[], bytes]
    random_token: Callable[[], str]


@dataclass(slots=True, eq=False)
class Context:
    """`fatal`: an error that nobody handles, or a bug: the daemon stops and keeps the arena."""

    settings: NodeSettings
    arena: ArenaFolder
    log: EventLog
    metrics: Metrics
    environment: Environment
    hashing: ThreadPoolExecutor
    blocking: ThreadPoolExecutor
    fatal: Callable[[BaseException], None]
    held_by_job: Callable[[], dict[str, int]]
    quarantine: Callable[[JobUnusable], None]
    backing: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` beside everything else; an error that leaves it is fatal."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` to its end whoever waits for it; its error is the waiter's."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._kept)
        return task

    def _kept(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, also when its waiter was cancelled

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Nobody handled `error`: a job with broken files is refused from now on, everything else is fatal."""
        if isinstance(error, JobUnusable) and "job" in error.context:
            self.quarantine(error)
        else:
            self.fatal(error)
