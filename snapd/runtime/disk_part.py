"""What a job needs of the node's own disk."""

from __future__ import annotations

from typing import Protocol

from snapd.core.ids import SnapshotId
from snapd.core.reports import FlushNews
from snapd.core.restore import Decision


class DiskPart(Protocol):
    """A job's way to the node's own disk (runtime/disk_job.py)."""

    @property
    def durable(self) -> SnapshotId | None:
        """The newest snapshot that is on the disks of all nodes of its world."""

    @property
    def here(self) -> SnapshotId | None:
        """The newest one on this node's disk."""

    @property
    def reason(self) -> str:
        """What is being done, or what it waits for, in words."""

    def is_refused(self, snapshot: SnapshotId) -> bool:
        """It is complete, and waiting does not help: a person has to mend what `reason` says."""

    @property
    def is_hiding(self) -> bool:
        """What the disk has may not be in memory yet, and memory cannot answer without it."""

    def news(self) -> FlushNews:
        """What the job's collector is told."""

    def note_durable(self, snapshot: SnapshotId | None) -> None:
        """The collector says so."""

    def request(self, snapshot: SnapshotId) -> None:
        """Have it, or a newer one, get onto the disk now."""

    async def wait_newest_durable(self) -> None:
        """The job has ended: returns when its newest snapshot is on the disk, or never will be, or the job goes on."""

    @property
    def is_looked_at(self) -> bool:
        """It is known what the disk had when the daemon came to it."""

    def check_generation(self, generation: int) -> None:
        """Raise ConflictError (kind `tier_generation`): `generation` was given out before it was known that the disk
        has it, or newer ones, of another start.
        """

    @property
    def newest_stored(self) -> SnapshotId | None:
        """The newest that the disk has, good or bad, as far as it was looked at."""

    @property
    def chunk_bytes(self) -> int:
        """Of what the disk has; 0: nothing, or not known."""

    async def before_opening(self) -> None:
        """A generation is about to be given out: it must be above all that the disk has. Waits a little."""

    def may_have_newer(self, memory: Decision, *, step: int | None) -> bool:
        """Whether the disk may have something newer, or something that is wrong, that memory's decision lacks."""

    async def wait_filled(self) -> str:
        """Until what the disk has is in memory, as far as it can be. Returns why the disk cannot be asked, if that is
        so; else an empty text.

        Raises:
            UnavailableError: kind `settling`: it is still being brought; ask again.
        """

    def add_verdicts(self, memory: Decision) -> Decision:
        """Memory's decision, with what the disk has and cannot give."""

    def doubt(self, decision: Decision, away: str, *, step: int | None, accept_older: bool) -> Decision:
        """The decision of a restore while the disk is `away`: it stands where the disk can have nothing newer."""

    async def forget(self) -> None:
        """All of the job on the disk goes."""

    async def keep_ended(self) -> None:
        """The job was closed for good; what it ended with stays on the disk."""
