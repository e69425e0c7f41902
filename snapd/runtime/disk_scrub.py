"""Reads all that is kept on the node's own disk again, in the background, and verifies it.

A few MiB at a time, in one thread that stands back, at a rate that is through in time (core/scrubbing.py). What is bad
is told, is never used again by later snapshots, and is written again from memory where that has it (disk_job.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.scrubbing import batches, choose_scrub, scrub_rate
from snapd.core.stored import Spot, StoredChunk, StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.core.words import listed
from snapd.errors import SnapdError
from snapd.peer.rate import TokenBucket
from snapd.runtime.context import Context
from snapd.runtime.disk_tier import DiskTier
from snapd.tier.node_disk import DiskJob
from snapd.tier.node_scrub import GONE, ScrubReader

LOOK_S = 10.0  # how soon what was written anew is seen, to know its age
AGAIN_S = 60.0  # a disk that does not answer, or a job that is being written
MANIFEST_NBYTES = 4096  # about; it only counts for the rate


@dataclass(slots=True)
class _Kept:
    """What a job has on the disk: its manifests, and the chunks of each pack, by key."""

    manifests: Mapping[str, StoredShard] = field(default_factory=dict)
    packs: dict[str, list[StoredChunk]] = field(default_factory=dict)
    pack_nbytes: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class ScrubFacts:
    """`nbytes`: kept; `fresh_nbytes`: of them read or written in this life of the daemon; `oldest_s`: how long ago that
    was of what was not read for the longest time; None: some was not yet.
    """

    nbytes: int
    fresh_nbytes: int
    oldest_s: float | None


class DiskScrub:
    """One per daemon with a disk of its own. `jobs`: names that the disk may have and that may be read now; `found`:
    hears of a job of which something is bad.
    """

    def __init__(
        self,
        tier: DiskTier,
        context: Context,
        jobs: Callable[[], Collection[str]],
        found: Callable[[str], None],
    ) -> None:
        self._tier, self._context, self._jobs, self._found = tier, context, jobs, found
        self._rules = tier.settings.scrub
        self._reader = ScrubReader(tier.settings.path)
        self._salt = context.environment.random_token()
        self._kept: dict[str, _Kept] = {}
        self._read_s: dict[str, float | None] = {}
        self._told_s = self._now_s()
        self._nbytes_read = self._turn = 0
        rate = self._rules.rate_max
        self._bucket = TokenBucket(rate, max(1, int(rate)), self._now_s())

    def _now_s(self) -> float:
        return self._context.environment.monotonic_s()

    @property
    def facts(self) -> ScrubFacts:
        stale = {key for key, at_s in self._read_s.items() if at_s is None}
        nbytes = sum(kept.nbytes for kept in self._kept.values())
        left = sum(kept.pack_nbytes.get(key, 0) for kept in self._kept.values() for key in stale)
        known = [at_s for at_s in self._read_s.values() if at_s is not None]
        oldest_s = self._now_s() - min(known) if known and not stale else None
        return ScrubFacts(nbytes, nbytes - left, oldest_s)

    async def run(self) -> None:
        """Until the daemon ends."""
        while self._rules.period_s:
            try:
                wait_s = await self._step()
            except SnapdError as error:
                if error.kind == "stopping":
                    return
                self._context.log.once(
                    f"scrub {error.kind}", "disk.scrub_waits", kind=error.kind, reason=error.message
                )
                wait_s = AGAIN_S
            await asyncio.sleep(wait_s)

    async def _step(self) -> float:
        """Read one object, if it is time; the seconds to wait before the next."""
        await self._look()
        nbytes = sum(kept.nbytes for kept in self._kept.values())
        self._tell_end(nbytes)
        choice = choose_scrub(self._read_s, self._now_s(), self._rules, self._salt)
        if choice.key is None:
            return min(choice.wait_s, LOOK_S)
        rate = scrub_rate(nbytes, self._rules)
        self._bucket.set_rate(rate, max(1, int(rate)), self._now_s())
        for name, kept in self._kept.items():
            disk = self._tier.job(name)
            if choice.key in kept.manifests:
                return await self._read_manifest(disk, choice.key, kept.manifests[choice.key])
            if choice.key in kept.packs:
                return await self._read_pack(disk, choice.key, kept)
        return 0.0

    async def _look(self) -> None:
        """What there is now. What was not there before was written meanwhile, and was good then."""
        names = set(self._jobs())
        for name in self._kept.keys() - names:
            del self._kept[name]
        for name in sorted(names):
            manifests = await self._tier.ask(self._tier.job(name).manifests)
            before = self._kept.get(name)
            if before is None or before.manifests is not manifests:
                kept = self._kept[name] = await self._tier.ask(_kept_of, name, manifests)
                at_s = None if before is None else self._now_s()
                for key in (*kept.manifests, *kept.packs):
                    self._read_s.setdefault(key, at_s)
        there = {key for kept in self._kept.values() for key in (*kept.manifests, *kept.packs)}
        for key in self._read_s.keys() - there:
            del self._read_s[key]

    def _tell_end(self, nbytes: int) -> None:
        """All that is kept was read, or written, since this was told last."""
        if not self._nbytes_read or any(
            at_s is None or at_s <= self._told_s for at_s in self._read_s.values()
        ):
            return
        self._context.log.info(
            "disk.scrubbed",
            nbytes=nbytes,
            read_nbytes=self._nbytes_read,
            seconds=round(self._now_s() - self._told_s, 1),
            rotten=sum(len(self._tier.job(name).rotten) for name in self._kept),
        )
        self._told_s, self._nbytes_read = self._now_s(), 0

    async def _pace(self, nbytes: int) -> None:
        while (wait_s := self._bucket.take(nbytes, self._now_s())) > 0:
            await asyncio.sleep(min(wait_s, LOOK_S))
        self._nbytes_read += nbytes
        self._tier.metrics.scrubbed_bytes.inc(nbytes)

    # manifests

    async def _read_manifest(self, disk: DiskJob, key: str, shard: StoredShard) -> float:
        await self._pace(MANIFEST_NBYTES)
        store = await self._tier.ask(self._tier.opened)
        why = await self._tier.ask(self._reader.check_manifest, store, key, disk.keys.job, shard)
        self._read_s[key] = self._now_s()
        now = await self._tier.ask(disk.manifests)
        if not why or now.get(key) is not shard:
            return 0.0
        is_there = await self._tier.flush(disk.write_manifest_again, key)
        if is_there:
            self._tier.metrics.rotten_chunks.inc()
            self._tier.metrics.mended_chunks.inc()
            self._context.log.warning("disk.manifest_mended", job=disk.keys.job, reason=f"{key}: {why}")
        return 0.0

    # packs

    async def _read_pack(self, disk: DiskJob, key: str, kept: _Kept) -> float:
        store = await self._tier.ask(self._tier.opened)
        self._turn += 1  # another one each time: this one may be unreadable, too
        witness = list(kept.manifests)[self._turn % len(kept.manifests)]
        known, found = disk.rotten, dict[Spot, str]()
        for batch in batches([chunk for chunk in kept.packs[key] if chunk.spot not in known]):
            await self._pace(sum(chunk.stored_nbytes for chunk in batch))
            found |= await self._tier.ask(self._reader.check_chunks, store, disk.keys, batch, witness)
            if GONE in found.values():
                break
        if GONE in found.values():
            is_gone = await self._tier.ask(disk.confirm_gone, kept.packs[key][0].pack)
            if is_gone is None:
                return LOOK_S
            found = {chunk.spot: f"{key} {GONE}" for chunk in kept.packs[key]} if is_gone else {}
        self._read_s[key] = self._now_s()
        if found:  # what nothing names any more was deleted meanwhile
            named = {chunk.spot for shard in disk.known.values() for chunk in shard.chunks}
            self._tell(disk, key, {spot: why for spot, why in found.items() if spot in named}, kept)
        return 0.0

    def _tell(self, disk: DiskJob, key: str, found: Mapping[Spot, str], kept: _Kept) -> None:
        if not found or not disk.note_rotten(found):
            return
        self._tier.metrics.rotten_chunks.inc(len(found))
        self._context.log.error(
            "disk.rotten",
            job=disk.keys.job,
            object=key,
            chunks=len(found),
            snapshots=[str(snapshot) for snapshot in _spoilt(kept.manifests.values(), found)],
            reason=listed(sorted(found.values()), shown=4, separator="; "),
        )
        self._found(disk.keys.job)


def _kept_of(job: str, manifests: Mapping[str, StoredShard]) -> _Kept:
    keys, packs = TierKeys(job), dict[str, dict[int, StoredChunk]]()
    for shard in manifests.values():
        for chunk in shard.chunks:
            packs.setdefault(keys.pack(chunk.pack), {})[chunk.offset] = chunk
    chunks = {key: list(by_offset.values()) for key, by_offset in packs.items()}
    nbytes = {key: sum(chunk.stored_nbytes for chunk in each) for key, each in chunks.items()}
    return _Kept(manifests, chunks, nbytes, sum(nbytes.values()))


def _spoilt(shards: Collection[StoredShard], found: Mapping[Spot, str]) -> list[SnapshotId]:
    return sorted({shard.id for shard in shards if any(chunk.spot in found for chunk in shard.chunks)})
