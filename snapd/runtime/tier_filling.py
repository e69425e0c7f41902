"""`snapd restore` before the trainer starts: a snapshot of the tier comes into the arena, to be restored from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.words import listed
from snapd.errors import ConflictError, NotFoundError, NotRestorable, SnapdError, UnavailableError
from snapd.runtime.job import Job
from snapd.runtime.tier_bringing import Lacking
from snapd.runtime.tier_restoring import TierRestores, bring_snapshot
from snapd.tier.reading import Candidate, Opened, TierReader


@dataclass(frozen=True, slots=True, kw_only=True)
class FillAsk:
    """Which snapshot (None: the newest that is good), of which ranks (empty: all)."""

    step: int | None = None
    generation: int | None = None
    ranks: Sequence[int] = ()

    @property
    def is_of_newest(self) -> bool:
        return self.step is None and self.generation is None

    def fits(self, snapshot: SnapshotId) -> bool:
        return self.step in (None, snapshot.step) and self.generation in (None, snapshot.generation)


@dataclass(slots=True)
class Filling:
    """How far it has come; read by whoever tells of it. `passed_over`: newer ones that cannot be used, and why."""

    nbytes_done: int = 0
    nbytes_total: int = 0
    snapshot: SnapshotId | None = None
    world_size: int = 0
    ranks_here: list[int] = field(default_factory=list)
    is_newer_here: bool = False
    passed_over: list[tuple[SnapshotId, str]] = field(default_factory=list)

    def add(self, nbytes: int) -> None:
        self.nbytes_done += nbytes  # threads add small numbers at once: a lost one is a pixel of a bar


async def fill_arena(tier: TierRestores, job: Job, ask: FillAsk, filling: Filling) -> None:
    """Have the snapshot here. Chunks that are here already are not read again, so it may be called off and begun anew;
    what of a shard was under way is then read again.

    Raises:
        NotFoundError: kind `snapshot`: there is none that fits. NotRestorable: all that fit are unusable, with reasons.
        ConflictError: kind `job_in_use`: a trainer is attached. UnavailableError and others: the store cannot be asked.
        CapacityError: it does not fit into the arena.
    """
    if any(True for _ in job.served_sessions()):
        raise ConflictError(
            f"a trainer of job {job.name!r} is attached: it restores by itself",
            kind="job_in_use",
            job=job.name,
        )
    async with job.planning:
        reader = await tier.reader(job.name)
        candidates = [c for c in await tier.ask(reader.candidates) if ask.fits(c.id)]
        newest = job.ledger.newest_complete()
        if newest is not None and ask.fits(newest.id) and all(newest.id > c.id for c in candidates):
            filling.snapshot, filling.is_newer_here = newest.id, True
            filling.world_size = newest.world_size
            return
        for candidate in candidates:
            if await _fill(tier, job, reader, candidate, ask, filling):
                if ask.is_of_newest:
                    tier.note_filled(job)
                return
    if not filling.passed_over:
        raise NotFoundError(f"no such snapshot of job {job.name!r} in {tier.url}", kind="snapshot")
    told = "; ".join(f"{snapshot}: {reason}" for snapshot, reason in filling.passed_over)
    raise NotRestorable(f"snapshots of job {job.name!r} were found, none can be used: {told}", job=job.name)


async def _fill(
    tier: TierRestores, job: Job, reader: TierReader, candidate: Candidate, ask: FillAsk, filling: Filling
) -> bool:
    opened = await tier.ask(reader.open, candidate, None)
    if not isinstance(opened, Opened):
        if not opened.is_void:
            filling.passed_over.append((candidate.id, opened.reason))
        return False
    missing = [rank for rank in ask.ranks if rank not in opened.shards]
    if missing:
        what = f"{opened.id} was captured by {opened.record.world_size} ranks: there is no {listed(missing)}"
        raise NotFoundError(what, kind="shard", job=job.name)
    ranks = list(ask.ranks) or sorted(opened.shards)
    filling.snapshot, filling.world_size = opened.id, opened.record.world_size
    filling.nbytes_done, filling.nbytes_total = 0, sum(opened.shards[rank].nbytes for rank in ranks)
    try:
        here, problem = await bring_snapshot(tier, job, reader, opened, ranks=ranks, progress=filling.add)
    except Lacking as lacking:
        raise _away(lacking, tier.url) from lacking
    if problem:
        filling.passed_over.append((candidate.id, problem))
        job.settle()
        return False
    filling.ranks_here = here
    return True


def _away(lacking: Lacking, url: str) -> SnapdError:
    error = next((miss.error for miss in lacking.misses if miss.error is not None), None)
    return error or UnavailableError(f"{url} does not answer: {lacking.reason}", kind="store_unreachable")
