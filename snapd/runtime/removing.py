"""Removing a job in the whole cluster: `snapd rm`, and the end of a job that all its ranks have closed for good.

A removal is written to the coordinator once; every daemon follows it, those that are away when they come back. So it
needs nobody's answer but the coordinator's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from snapd.coordination.jobs import ClusterCoordination
from snapd.core.ending import is_gone
from snapd.core.recovery import Inventory
from snapd.errors import ConflictError, FencedError, NotFoundError, SnapdError, UnavailableError
from snapd.obs.log import EventLog
from snapd.runtime.inventories import gather_inventories
from snapd.runtime.job import Job
from snapd.runtime.world import World

WAIT_S = 10.0
ASK_AGAIN_S = 0.1
RETRY_S = 1.0


class Surroundings(Protocol):
    """The cluster, as far as removals need it."""

    @property
    def name(self) -> str: ...
    @property
    def worlds(self) -> Mapping[str, World]: ...
    @property
    def living(self) -> Iterable[str]: ...
    @property
    def doubtful(self) -> Iterable[str]: ...
    @property
    def absent(self) -> Iterable[str]:
        """All that are known and are not here, also those given up."""

    def coordination(self, name: str) -> ClusterCoordination: ...
    async def is_recorded(self, name: str) -> bool:
        """Whether the coordinator knows of the job."""

    def stop_collecting(self, name: str) -> None: ...
    async def inventory(self, node: str, job: str) -> Inventory: ...


class Ending(Protocol):
    """The node's jobs."""

    @property
    def jobs(self) -> Mapping[str, Job]: ...
    def end_job(self, job: Job, through: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What `snapd rm` did. `nodes`: those that had something of the job; `late`: of these, not done yet; `absent`:
    nodes that could not be asked: they drop what they have when they come back; `reasons`: why not, of those that live.
    """

    snapshots: int
    nbytes: int
    nodes: tuple[str, ...]
    late: tuple[str, ...]
    absent: tuple[str, ...]
    reasons: Mapping[str, str]


class Removals:
    """One per daemon of a cluster. On the event loop."""

    def __init__(
        self, cluster: Surroundings, jobs: Ending, log: EventLog, monotonic_s: Callable[[], float]
    ) -> None:
        self._cluster = cluster
        self._jobs = jobs
        self._log = log
        self._monotonic_s = monotonic_s
        self._followed: dict[str, int] = {}

    # following

    def follow(self, name: str, coordination: ClusterCoordination) -> None:
        """Act upon what the coordinator says was removed. Idempotent."""
        through = coordination.removed_through
        job = self._jobs.jobs.get(name)
        is_left = job is not None and any(is_gone(snapshot, through) for snapshot in job.ledger.snapshots)
        if through <= self._followed.get(name, 0) and not is_left:
            return
        if job is not None and job.opening.locked():
            return  # a newer generation may be about to begin in it; looked at again once it has
        if job is not None and job.disk is not None and not (job.disk.is_looked_at or job.ledger.snapshots):
            return  # after the loss of memory only the disk knows what is newer than what was removed
        self._followed[name] = through
        self._log.info("job.ended", job=name, generation=through)
        self._cluster.stop_collecting(name)
        self._cluster.worlds[name].forget_through(through)
        if job is not None:
            self._jobs.end_job(job, through)

    # ending

    async def end(self, name: str, generation: int) -> None:
        """All ranks have closed the job for good: written once the coordinator answers."""
        coordination = self._cluster.coordination(name)
        job = self._jobs.jobs.get(name)
        if job is not None and job.flusher is not None:
            await job.flusher.wait_newest_durable()
        while coordination.is_collector and coordination.removed_through < generation:
            try:
                await coordination.remove_through(generation)
            except (UnavailableError, FencedError) as error:
                self._log.once(f"end {name}", "job.end_waits", job=name, reason=str(error))
                await asyncio.sleep(RETRY_S)
        self.follow(name, coordination)

    async def remove(self, name: str, *, is_forced: bool) -> Removed:
        """Remove a job on all nodes; returns when those that live are done, at most after ten seconds.

        Raises:
            NotFoundError: kind `job`. ConflictError: kind `job_in_use`: trainers are attached somewhere (not forced).
            UnavailableError: kind `absent_nodes`: a node that may have trainers of the job does not answer (not
            forced); or the coordinator is away.
        """
        inventories, silent = await self._ask(name)
        has_any = [each for each in inventories if each.is_here]
        if name not in self._jobs.jobs and not has_any and not await self._cluster.is_recorded(name):
            raise NotFoundError(f"no job {name[:64]!r} in the cluster", kind="job")
        if not is_forced:
            self._check(
                name, has_any, silent | {node: silent.get(node, "") for node in self._cluster.doubtful}
            )
        coordination = self._cluster.coordination(name)
        await coordination.refresh()
        held = {each.id for inventory in has_any for each in inventory.held}
        through = max([coordination.current(), *(snapshot.generation for snapshot in held)])
        await coordination.remove_through(through)
        self.follow(name, coordination)
        late = await self._wait_gone(name, through, [each.node for each in has_any])
        return Removed(
            snapshots=len(held),
            nbytes=sum(each.arena_bytes for each in has_any),
            nodes=tuple(each.node for each in has_any),
            late=tuple(late),
            absent=tuple(sorted({*silent, *self._cluster.absent})),
            reasons=silent,
        )

    def _check(self, name: str, inventories: Iterable[Inventory], unknown: Mapping[str, str]) -> None:
        served = {each.node: each.live_ranks for each in inventories if each.live_ranks}
        if served:
            told = "; ".join(
                f"{node}: rank {', '.join(map(str, ranks[:8]))}" for node, ranks in sorted(served.items())[:8]
            )
            raise ConflictError(
                f"trainers of job {name!r} are attached: {told}",
                kind="job_in_use",
                hint="stop the job first, or use --force",
                job=name,
            )
        if unknown:
            named = [f"{node} ({why})" if why else node for node, why in sorted(unknown.items())]
            raise UnavailableError(
                f"{', '.join(named[:8])} cannot be asked, and may have trainers or snapshots of job {name!r}",
                kind="absent_nodes",
                hint="--force removes it on the others now, and there when they, or their disks, come back",
                job=name,
            )

    async def _ask(self, name: str) -> tuple[list[Inventory], dict[str, str]]:
        """What the living nodes have; and why some could not say it."""
        reasons: dict[str, str] = {}

        async def ask(node: str) -> Inventory:
            try:
                return await self._cluster.inventory(node, name)
            except SnapdError as error:
                reasons[node] = error.message
                raise

        inventories, _ = await gather_inventories(self._cluster.living, ask)
        return inventories, reasons

    async def _wait_gone(self, name: str, through: int, nodes: list[str]) -> list[str]:
        """The nodes that still have something of the job, when all are done or ten seconds have passed."""
        deadline = self._monotonic_s() + WAIT_S
        while nodes:
            inventories, _ = await self._ask(name)
            gone = {each.node for each in inventories if not each.is_here or each.generation > through}
            nodes = [node for node in nodes if node not in gone]
            if self._monotonic_s() > deadline:
                break
            if nodes:
                await asyncio.sleep(ASK_AGAIN_S)
        return nodes
