"""A shard with bad chunks is brought anew by whoever can, and the log says what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from snapd.core.ids import SnapshotId
from snapd.core.restore import Repair
from snapd.core.words import listed
from snapd.runtime.job import Job, Repairing

CHUNKS_SHOWN = 4


async def mended(
    job: Job, repairs: Repairing, snapshot: SnapshotId, rank: int, bad: Sequence[tuple[int, str]]
) -> Repair:
    """Have the shard's bad chunks brought anew; `bad`: (chunk, what is wrong with it)."""
    log, generation, step = job.context.log, snapshot.generation, snapshot.step
    what = listed([f"chunk {index}: {each}" for index, each in bad], shown=CHUNKS_SHOWN, separator="; ")
    log.error(
        "shard.bad",
        job=job.name,
        generation=generation,
        step=step,
        rank=rank,
        chunks=len(bad),
        reason=what,
    )
    outcome = await repairs.repair(job, snapshot, rank, bad)
    if outcome.is_whole:
        log.warning(
            "shard.repaired",
            job=job.name,
            generation=generation,
            step=step,
            rank=rank,
            chunks=len(bad),
            source=outcome.source,
            reason=what,
        )
        job.settle()
        return outcome
    reason = f"{outcome.why}; {'it is given up' if outcome.is_proved else 'it is tried again'}"
    log.error("shard.not_repaired", job=job.name, generation=generation, step=step, rank=rank, reason=reason)
    return outcome
