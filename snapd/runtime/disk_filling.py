"""What the node's own disk has of a job comes back into memory: after the node lost it, before anybody restores.

From there on everything is as if memory had never been lost: it is captured, verified, and found by every plan, on this
node and on others. Each chunk is verified on its way; what is damaged is told, and the next older snapshot is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.node_disk import parts_to_bring
from snapd.core.stored import StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.errors import CapacityError, ConflictError, SnapdError, UnavailableError
from snapd.runtime.disk_tier import DiskTier
from snapd.runtime.job import Job
from snapd.runtime.tier_bringing import Lacking, bring_stored
from snapd.runtime.tier_restoring import forgive
from snapd.tier.node_disk import DiskLook
from snapd.tier.node_scrub import ScrubReader
from snapd.tier.reading import TierReader
from snapd.tier.streaming import Fault

CLUSTER_COUNT = 2  # the disks of a world's nodes may differ by one snapshot


@dataclass(slots=True)
class DiskFill:
    """How far it has come. `problems`: snapshots on the disk that cannot be used, and why. `held`: what was brought and
    stays in memory until something newer is complete. `has_no_room`: it may be tried again.
    """

    nbytes_done: int = 0
    nbytes_total: int = 0
    problems: dict[SnapshotId, str] = field(default_factory=dict)
    held: list[SnapshotId] = field(default_factory=list)
    has_no_room: bool = False

    def add(self, nbytes: int) -> None:
        self.nbytes_done += nbytes  # threads add small numbers at once: a lost one is a pixel of a bar


async def fill_from_disk(tier: DiskTier, job: Job, look: DiskLook, fill: DiskFill) -> None:
    """Bring what memory lacks.

    Raises:
        UnavailableError and others: the disk does not answer.
    """
    fill.problems.update(look.problems)
    fill.has_no_room = False
    is_alone = tier.settings.is_alone
    wanted = parts_to_bring(look.parts, newest_here=_newest_here(job, look), is_alone=is_alone)
    count = 0
    for snapshot in wanted:
        if job.is_removed or count == (1 if is_alone else CLUSTER_COUNT):
            break
        shards = [look.shards[snapshot][rank] for rank in sorted(look.shards[snapshot])]
        fill.nbytes_done, fill.nbytes_total = 0, sum(shard.nbytes for shard in shards)
        problem = await _bring(tier, job, shards, fill)
        if problem:
            fill.problems[snapshot] = problem
            tier.metrics.damaged.inc()
            job.context.log.error(
                "disk.unusable",
                job=job.name,
                generation=snapshot.generation,
                step=snapshot.step,
                reason=problem,
            )
            if fill.has_no_room:
                break  # nor is there any for an older one
            continue
        count += 1
        fill.problems.pop(snapshot, None)
        fill.held.append(snapshot)
        tier.metrics.brought.inc()
    for snapshot, problem in look.problems.items():
        job.context.log.once(
            f"disk {job.name} {snapshot} {problem}",
            "disk.damaged",
            job=job.name,
            snapshot=str(snapshot),
            reason=problem,
        )
    job.settle()


def _newest_here(job: Job, look: DiskLook) -> SnapshotId | None:
    """Of which memory has all that the disk has, and something: an attempt before this one may have been cut off."""
    return next(
        (
            facts.id
            for facts in job.ledger.newest_first()
            if not facts.problem
            and facts.shards
            and not look.shards.get(facts.id, {}).keys() - facts.shards.keys()
        ),
        None,
    )


async def _bring(tier: DiskTier, job: Job, shards: Sequence[StoredShard], fill: DiskFill) -> str:
    """The shards that the disk has of a snapshot. They are all here, and it is held once more, if this returns an empty
    text; else it says why not. Alone nothing stays of a snapshot that is not whole; in a cluster what is good
    stays: others may have the rest.
    """
    snapshot, reader = shards[0].id, await tier.ask(tier.reader, job.name)
    held, problem = 0, ""
    try:
        for shard in shards:
            problem = problem or await _bring_one(tier, job, reader, shard, fill)
            held += not problem
    finally:
        tier.pool.trim()
        is_kept = held == len(shards)
        for _ in range(held - is_kept):
            job.ledger.unhold(snapshot)
    if is_kept:
        forgive(job, snapshot)
    elif tier.settings.is_alone:
        _give_up(job, snapshot)
    return problem


async def _bring_one(tier: DiskTier, job: Job, reader: TierReader, shard: StoredShard, fill: DiskFill) -> str:
    """Why a shard cannot be used; empty: it is here."""
    try:
        await bring_stored(job, reader, shard, tier.asking, progress=fill.add)
    except Lacking as lacking:
        if lacking.is_away and not await _is_unreadable(tier, job.name, lacking):
            raise _away(lacking, tier) from lacking
        note_rotten(tier, job.name, lacking)
        return f"rank {shard.rank}: {lacking.reason}"
    except CapacityError as error:
        fill.has_no_room = True
        return f"there is no room for it in memory: {error.message}"
    except ConflictError as error:
        return error.message
    return ""


async def _is_unreadable(tier: DiskTier, job: str, lacking: Lacking) -> bool:
    """The disk says that it fails: has it bad sectors, or does it not answer at all? A restore waits for the second
    only.
    """
    failing = [
        miss.chunk for miss in lacking.misses if miss.error is not None and miss.error.kind == "store_failing"
    ]
    witness = next(iter(tier.job(job).known), "")
    if not failing or not witness:
        return False
    reader = ScrubReader(tier.settings.path)
    try:
        store = await tier.ask(tier.opened)
        found = await tier.flush(reader.find_unreadable, store, TierKeys(job), failing, witness)
    except SnapdError:
        return False  # what the fill says of the disk stands
    if found and tier.job(job).note_rotten(found):
        tier.metrics.rotten_chunks.inc(len(found))
    return bool(found)


def note_rotten(tier: DiskTier, job: str, lacking: Lacking) -> None:
    """What was read and is bad, or missing, is not used again."""
    bad = [miss for miss in lacking.misses if miss.fault in (Fault.BAD, Fault.GONE)]
    found = {miss.chunk.spot: miss.what for miss in bad}
    if found and tier.job(job).note_rotten(found):
        tier.metrics.rotten_chunks.inc(len(found))


def _give_up(job: Job, snapshot: SnapshotId) -> None:
    """What was brought of a snapshot that is not whole makes room."""
    facts = job.ledger.snapshots.get(snapshot)
    if facts is None or facts.hold_count:
        return
    job.index.remove_snapshots([snapshot])
    job.ledger.drop(snapshot, "the node's disk does not have all of it")
    for rank, shard in facts.shards.items():
        job.arenas[rank].pool.release(shard.record.places)


def _away(lacking: Lacking, tier: DiskTier) -> SnapdError:
    error = next((miss.error for miss in lacking.misses if miss.error is not None), None)
    return error or UnavailableError(
        f"{tier.description} does not answer: {lacking.reason}", kind="store_unreachable"
    )
