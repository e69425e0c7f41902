"""The node's own disk and the jobs on it: taken up when the daemon starts, joined to each job, let go with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from snapd.core.ids import SnapshotId
from snapd.core.restore import Repair
from snapd.core.words import listed
from snapd.errors import SnapdError, UnavailableError
from snapd.runtime.context import Context
from snapd.runtime.disk_filling import note_rotten
from snapd.runtime.disk_job import JobDisk
from snapd.runtime.disk_scrub import DiskScrub
from snapd.runtime.disk_tier import DiskTier
from snapd.runtime.job import Job, Repairing
from snapd.runtime.tier_bringing import Lacking, bring_stored
from snapd.tier.node_disk import JobOnDisk

FIND_AGAIN_S = 5.0
FORGET_LOOK_S = 0.1


class NodeDisks:
    """One per daemon with a disk of its own. On the event loop.

    `make_job`: takes a job of the disk up. `saw_generation`: tells the cluster, if there is one, of a generation.
    """

    def __init__(
        self,
        tier: DiskTier,
        context: Context,
        make_job: Callable[[str], Job],
        saw_generation: Callable[[str, int], None],
    ) -> None:
        self.tier = tier
        self.jobs: dict[str, JobDisk] = {}
        self._context, self._make_job, self._saw_generation = context, make_job, saw_generation
        self._known: set[str] = set()  # jobs that the disk has, in memory or not
        self._found: Sequence[JobOnDisk] | None = None
        self._forgetting: dict[str, asyncio.Task[Any]] = {}
        self._not_forgotten: dict[str, str] = {}  # jobs that were removed and are on the disk still, and why
        self.trouble: SnapdError | None = None  # why it could not be looked at yet
        self.scrub = DiskScrub(tier, context, self._readable, self._found_rotten)

    # start

    async def begin(self) -> None:
        """Before anything is taken up: no generation of the disk's is given out again.

        Raises:
            ConflictError, ConfigError: another daemon has the disk, or it is a shared tier.
        """
        self._found = await self.tier.begin()
        self._see(self._found or ())

    def start(self) -> None:
        """The jobs of the arena were taken up: those come that only the disk has."""
        self._context.spawn(self.scrub.run(), "scrub the disk")
        if self._found is not None:
            self._take_up(self._found)
        else:
            self._context.spawn(self._find(), "disk")

    def _see(self, found: Sequence[JobOnDisk]) -> None:
        for one in found:
            self._known.add(one.job)
            try:
                self._saw_generation(one.job, one.generation)
            except UnavailableError as error:
                self._context.log.warning("disk.generation", job=one.job, reason=error.message)

    def _take_up(self, found: Sequence[JobOnDisk]) -> None:
        for one in found:
            if one.is_ended:
                continue
            try:
                self._make_job(one.job)
            except SnapdError as error:
                self._context.log.error(
                    "disk.job_refused", job=one.job, kind=error.kind, reason=error.message
                )

    async def _find(self) -> None:
        """A disk that was away when the daemon started: until it is there."""
        while True:
            try:
                found = await self.tier.ask(self.tier.jobs)
            except SnapdError as error:
                if error.kind == "stopping":
                    return
                self.trouble = error
                self._context.log.once(
                    f"disk {error.kind}", "disk.away", kind=error.kind, reason=error.message
                )
                await asyncio.sleep(FIND_AGAIN_S)
                continue
            self._found, self.trouble = found, None
            self._see(found)
            self._take_up(found)
            return

    # jobs

    def join(self, job: Job) -> None:
        """From now on the job is kept on the disk; what the disk has of it comes into memory."""
        disk = self.jobs[job.name] = JobDisk(job, self.tier)
        job.disk = disk
        job.repairs = DiskRepairs(self.tier, job.repairs)
        job.on_removed.append(lambda: self._leave(disk))
        self._known.add(job.name)
        for one in self._found or ():
            if one.job == job.name:
                job.coordination.start_above(one.generation)
        self._context.spawn(disk.run(), f"disk {job.name}")

    def _leave(self, disk: JobDisk) -> None:
        if self.jobs.get(disk.job.name) is disk:
            del self.jobs[disk.job.name]

    # what has gone bad

    def _readable(self) -> list[str]:
        """Jobs of which the disk may be read in the background: nobody waits for it."""
        return [name for name in self._known if name not in self.jobs or self.jobs[name].is_filled]

    def _found_rotten(self, name: str) -> None:
        if name in self.jobs:
            self.jobs[name].note_rotten()

    def damages(self) -> dict[str, list[str]]:
        """By job: what on the disk is known to be bad, in words."""
        found = {name: self.tier.job(name).damages for name in sorted(self._known)}
        return {name: damages for name, damages in found.items() if damages}

    def troubles(self) -> list[str]:
        """What of the disk is bad, for people; and why nothing gets there."""
        found = [f"cannot be asked: {self.trouble.message}"] if self.trouble is not None else []
        for name, why in sorted(self._not_forgotten.items()):
            found.append(f"job {name}: was removed and is there still: {why}")
        for name, damages in self.damages().items():
            found.append(f"job {name}: damaged: {listed(damages, shown=2, separator='; ')}")
        for name, disk in sorted(self.jobs.items()):
            if disk.trouble is not None:
                found.append(f"job {name}: paused: {disk.trouble.reason}")
        return [f"disk: {text}" for text in found]

    # its end

    def forget(self, name: str) -> None:
        """All of a job on the disk is to go."""
        self._known.discard(name)
        disk = self.tier.job(name)
        disk.doom()

        async def finish() -> None:
            while True:
                try:
                    await self.tier.flush(disk.finish)
                except SnapdError as error:
                    if error.kind == "stopping":
                        return
                    if name not in self._not_forgotten:
                        self._context.log.warning(
                            "disk.not_tidied", job=name, kind=error.kind, reason=error.message
                        )
                    self._not_forgotten[name] = error.message
                    await asyncio.sleep(FIND_AGAIN_S)
                    continue
                self._not_forgotten.pop(name, None)
                return

        self._forgetting[name] = self._context.keep(finish())

    async def forgotten(self, name: str, timeout_s: float) -> str:
        """Wait until it has gone, the disk refuses, or the time is over; why it has not gone, if so."""
        task = self._forgetting.pop(name, None)
        clock = asyncio.get_running_loop()
        deadline_s = clock.time() + timeout_s
        while task is not None and not task.done():
            if name in self._not_forgotten:
                return self._not_forgotten[name]
            if clock.time() >= deadline_s:
                return f"{self.tier.description} does not answer"
            await asyncio.wait([task], timeout=FORGET_LOOK_S)
        return ""

    def may_have(self, name: str) -> bool:
        """Whether the disk has something of a job that memory knows nothing of.

        Raises:
            UnavailableError: kind `disk_away`: it could not be looked at yet.
        """
        if self._found is None and name not in self._known:
            why = self.trouble.message if self.trouble is not None else "it does not answer"
            raise UnavailableError(
                f"the node's disk may have job {name!r}, and cannot be asked: {why}",
                kind="disk_away",
                hint="ask again when the disk is there; one that is gone for good has to be taken out of tier.node",
                job=name,
            )
        return name in self._known

    def check_brought(self, name: str) -> None:
        """Raise UnavailableError (kind `settling`): memory may still lack what the disk has of a job."""
        disk = self.jobs.get(name)
        if disk.is_hiding if disk is not None else self._found is None:
            why = f": {disk.trouble.reason}" if disk is not None and disk.trouble is not None else ""
            raise UnavailableError(
                f"what {self.tier.description} has of job {name!r} is not in memory yet{why}", kind="settling"
            )


class DiskRepairs:
    """Bad chunks of memory come anew from the node's own disk, if it has them; else from wherever else. Implements
    `job.Repairing`.
    """

    def __init__(self, tier: DiskTier, other: Repairing | None) -> None:
        self._tier = tier
        self.other = other

    async def repair(
        self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[tuple[int, str]]
    ) -> Repair:
        why = await self._from_disk(job, snapshot, rank)
        if not why:
            self._tier.metrics.repaired_shards.inc()
            return Repair(True, source=self._tier.description)
        if self.other is not None:
            return await self.other.repair(job, snapshot, rank, bad)
        return Repair(False, is_proved=True, why=why)

    async def _from_disk(self, job: Job, snapshot: SnapshotId, rank: int) -> str:
        """Why it cannot come from there; empty: it is here."""
        tier = self._tier
        try:
            shard = await tier.ask(tier.job(job.name).find, snapshot, rank)
            facts = job.ledger.snapshots.get(snapshot)
            if shard is None or facts is None or rank not in facts.shards:
                return "the node's disk does not have it"
            if shard.digest != facts.shards[rank].record.digest:
                return "the node's disk has another shard of that name"
            reader = await tier.ask(tier.reader, job.name)
            await bring_stored(job, reader, shard, tier.asking)
        except SnapdError as error:
            return error.message
        except Lacking as lacking:
            note_rotten(tier, job.name, lacking)
            return lacking.reason
        finally:
            tier.pool.trim()
        job.ledger.unhold(snapshot)
        return ""
