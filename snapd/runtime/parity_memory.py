"""Backing memory for parity: as much as a plan needs, checked like a rank's segments, never under a copy."""

from __future__ import annotations

import asyncio

from snapd.core.capacity import check_fits
from snapd.core.protection import RowPlan
from snapd.errors import CapacityError, JobUnusable
from snapd.memory.index import KEEP_FILES_HINT
from snapd.memory.parity import PARITY_SEGMENTS_MAX
from snapd.memory.segments import back_segment
from snapd.memory.shortage import shortage
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job

NO_RANK = -1


async def grow_for(job: Job, plan: RowPlan, node: str, metrics: ProtectionMetrics) -> None:
    """Back the frames that the plan gives to `node` and that are not there.

    Raises:
        CapacityError: it does not fit; nothing has changed. JobUnusable.
    """
    # a caller that is cancelled must not leave a thread behind that backs a file which nobody expects
    await asyncio.shield(job.context.keep(_grow(job, plan, node, metrics)))


async def _grow(job: Job, plan: RowPlan, node: str, metrics: ProtectionMetrics) -> None:
    async with job.context.backing:
        missing = job.parity.frames_missing(plan, node)
        if missing == 0:
            return
        nbytes, number = missing * plan.frame_bytes, job.parity.next_segment
        if number >= PARITY_SEGMENTS_MAX:
            raise CapacityError("the job has too many parity segments", kind="segments", job=job.name)
        check_fits(nbytes, job.limits(), job.context.held_by_job(), job=job.name, rank=NO_RANK)
        path = job.folder.parity_segment(number)
        point("daemon.protect.segment.before")
        try:
            path.unlink(missing_ok=True)  # of a daemon that was killed before it was recorded
            segment = await asyncio.get_running_loop().run_in_executor(
                job.context.blocking, lambda: back_segment(path, number, nbytes, is_writable=True)
            )
        except OSError as error:
            what = f"job {job.name!r}: {path.name}"
            unusable = JobUnusable(f"{what}: {error.strerror}", hint=KEEP_FILES_HINT, job=job.name)
            raise shortage(error, what, job=job.name) or unusable from error
        if job.is_removed:
            path.unlink(missing_ok=True)
            return
        job.parity.add_segment(segment, plan.frame_bytes)
        point("daemon.protect.segment.after")
        job.context.metrics.arena_bytes.inc(nbytes)
        metrics.parity_bytes.inc(nbytes)
        job.context.log.info("parity.backed", job=job.name, segment=number, nbytes=nbytes)
