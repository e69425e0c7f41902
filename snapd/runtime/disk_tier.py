"""The node's own disk as a tier: its folder, taken and checked, its threads, and what they may take.

A disk that is away, full or read-only never reaches training: whatever waits for it waits in threads of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snapd.codec.compress import Mode
from snapd.core.flushing import FlushRules
from snapd.core.ids import JOB_NAME
from snapd.core.scrubbing import ScrubRules
from snapd.core.tier_keys import JOBS
from snapd.errors import SnapdError, UnavailableError
from snapd.obs.disk_metrics import DiskMetrics
from snapd.obs.log import EventLog
from snapd.peer.rate import Pacer
from snapd.runtime.context import Environment
from snapd.runtime.faultpoints import point
from snapd.runtime.tier_threads import TierThreads
from snapd.store.base import Store
from snapd.store.node_folder import NodeFolder
from snapd.tier.node_disk import DiskJob, JobOnDisk, jobs_on_disk
from snapd.tier.reading import TierReader
from snapd.tier.streaming import ReadPool
from snapd.tier.writing import Compressing, WriteMeans
from snapd.units import MIB

PACKERS = 2
BURST_BYTES = 16 * MIB
BEGIN_S = 5.0  # a start waits so long for the disk to say what it has; one that hangs is taken up later
RETRY_S = 5.0
_POINTS = {
    "daemon.flush.pack.before": "daemon.disk.pack.before",
    "daemon.flush.pack.after": "daemon.disk.pack.after",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """What the node needs of `[tier]`. `open`: makes the store, asks nothing of it. `rate`: bytes a second, 0: any.
    `keep`: whole snapshots that stay. `scrub`: how often they are read again. `is_alone`: worlds do not span nodes.
    `wait_s`: how long a restore waits for a disk that is away.
    """

    path: Path
    open: Callable[[], Store]
    rules: FlushRules
    rate: int
    keep: int
    scrub: ScrubRules
    is_alone: bool
    wait_s: float


class DiskTier(TierThreads):
    """One per daemon with a disk of its own. On the event loop; what blocks runs in its threads."""

    def __init__(
        self, settings: DiskSettings, environment: Environment, log: EventLog, metrics: DiskMetrics, node: str
    ) -> None:
        super().__init__("disk", "disk.failed", log, packers=PACKERS)
        self.settings, self.metrics = settings, metrics
        self.pool = ReadPool()
        self._environment = environment
        self._compressing = Compressing(Mode.OFF)
        self._pacer = (
            Pacer(environment.monotonic_s, float(settings.rate), BURST_BYTES) if settings.rate else None
        )
        self._folder = NodeFolder(
            settings.path, f"node {node}, pid {os.getpid()}", environment.random_token()
        )
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._jobs: dict[str, DiskJob] = {}
        self._is_closing = False

    @property
    def description(self) -> str:
        return str(self.settings.path)

    @property
    def store(self) -> Store | None:
        """None: it was not opened yet, or could not be."""
        return self._store

    @property
    def identity(self) -> str:
        """Of the folder, once it was opened: another disk in its place has another one."""
        return self._folder.identity

    # opening

    def opened(self) -> Store:
        """The folder is there, and ours. Blocking; from the tier's own threads.

        Raises: ConflictError: kind `disk_in_use`; ConfigError: kind `disk_shared`; what a store raises.
        """
        with self._opening:
            if self._is_closing:
                raise UnavailableError("the daemon is stopping", kind="stopping")
            warning = self._folder.take()
            if self._store is not None:
                return self._store
            store = self.settings.open()
            try:
                for key, token, _ in list(store.unfinished()):
                    store.abort_unfinished(key, token)  # nobody but us writes here
            except SnapdError:
                store.close()
                raise
            self._store = store
        self._log.info("disk.opened", folder=self.description)
        if warning:
            self._log.warning("disk.warning", reason=warning)
        return store

    def means(self) -> WriteMeans:
        """Blocking, as `opened`."""
        return WriteMeans(
            store=self.opened(),
            packers=self.packing,
            packers_max=PACKERS,
            compressing=self._compressing,
            pacer=self._pacer,
            monotonic_s=self._environment.monotonic_s,
            point=lambda name: point(_POINTS.get(name, name)),
        )

    async def begin(self) -> list[JobOnDisk] | None:
        """Which jobs the disk has, when the daemon starts; None: it does not say so soon, or is away.

        Raises:
            ConflictError, ConfigError: another daemon has it, or it is a shared tier.
        """
        try:
            async with asyncio.timeout(BEGIN_S):
                return await self.ask(self.jobs)
        except TimeoutError:
            self._log.warning("disk.slow", folder=self.description, seconds=BEGIN_S)
        except SnapdError as error:
            if error.kind in ("disk_in_use", "disk_shared"):
                raise
            self._log.warning("disk.away", folder=self.description, kind=error.kind, reason=error.message)
        return None

    def jobs(self) -> list[JobOnDisk]:
        """Which jobs the disk has. Blocking."""
        store = self.opened()
        try:
            names = os.listdir(self.settings.path / JOBS)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UnavailableError(
                f"cannot list the jobs in {self.description}: {error.strerror}", kind="store_failing"
            ) from error
        return jobs_on_disk(store, [name for name in names if JOB_NAME.fullmatch(name)])

    # jobs

    def job(self, name: str) -> DiskJob:
        """The job's part of the disk; there need be nothing yet."""
        if name not in self._jobs:
            self._jobs[name] = DiskJob(
                name,
                self.means,
                keep=self.settings.keep,
                is_alone=self.settings.is_alone,
                random_token=self._environment.random_token,
            )
        return self._jobs[name]

    def reader(self, job: str) -> TierReader:
        """Blocking, as `opened`."""
        return TierReader(self.opened(), job, self.pool)

    def close(self, wait_s: float) -> bool:
        """Let go of the folder and join the threads. Blocking, for at most `wait_s`; False: some hang in the disk."""
        self._is_closing = True
        is_done = super().close(wait_s)
        if is_done:
            self.pool.close()
            self._folder.close()
        return is_done
