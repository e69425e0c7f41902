"""Restoring from the shared tier: what a restore needs of it, and what a daemon without memory of the job must know.

One per daemon with a shared tier. The store is opened for reading alone: nothing is probed, credentials that may not
write will do. On the event loop; what blocks runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.core.manifest import ShardRecord
from snapd.core.restore import Decision, Outcome, Repair, Verdict
from snapd.core.tier_choice import (
    TRUST_S,
    Ask,
    TierFacts,
    chosen_from_tier,
    how_to_ask,
    merged,
    unreachable,
)
from snapd.errors import (
    CapacityError,
    ConflictError,
    NotRestorable,
    SnapdError,
    UnavailableError,
)
from snapd.runtime.job import Job
from snapd.runtime.tier_access import TierAccess, is_store_away
from snapd.runtime.tier_bringing import Lacking, Progress, bring_stored
from snapd.runtime.tier_chunks import TierChunks
from snapd.store.base import Store
from snapd.tier.reading import Candidate, Opened, TierReader

GENERATION_MAX = 1 << 62
BRIEF_S = 3.0  # for an answer that is not needed
QUIET_S = 10.0  # a start asks several times: a tier that did not answer is left alone for so long
NOTE_S = 10.0  # how often it is noted that a job's trainers are served
NOTED_MAX = 8  # generations


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a round of a restore asks for. `problems`: snapshots that earlier rounds found unusable."""

    world_size: int
    generation: int  # of the session that asks
    step: int | None
    accept_older: bool
    is_elastic: bool
    problems: Mapping[SnapshotId, str] = field(default_factory=dict)


class TierRestores(TierAccess):
    """`wait_s`: how long a restore waits for a tier that may have a newer snapshot."""

    def __init__(
        self, url: str, open_store: Callable[[], Store], *, wait_s: float, read_threads: int
    ) -> None:
        super().__init__(url, open_store, read_threads=read_threads)
        self.chunks = TierChunks(self)
        self._wait_s = wait_s
        self._quiet_until_s = 0.0
        self._served: dict[str, dict[int, float]] = {}  # job -> generation -> when a trainer was last served
        self._noted_s: dict[str, float] = {}

    # what is known

    def observe(self, jobs: Iterable[Job]) -> None:
        """Note whose trainers are served; every poll."""
        for job in jobs:
            now_s = job.context.environment.monotonic_s()
            served = {session.generation: now_s for session in job.served_sessions()}
            if not served or job.is_removed:
                continue
            known = self._served.setdefault(job.name, {})
            known |= served
            if now_s - self._noted_s.get(job.name, -math.inf) >= NOTE_S:
                self._noted_s[job.name] = now_s
                newest = dict(sorted((job.index.served() | known).items())[-NOTED_MAX:])
                with contextlib.suppress(CapacityError):  # without it the tier is waited for
                    job.index.set_served(newest)

    def note_filled(self, job: Job) -> None:
        """Memory has the newest of the tier, as of now: as if a trainer of that generation had been served here."""
        self._served.setdefault(job.name, {})[0] = job.context.environment.monotonic_s()

    def facts(self, job: Job, generation: int) -> TierFacts:
        """What is known without asking, when a world of `generation` restores."""
        return TierFacts(
            floor=job.index.tier_floors().get(self.url),
            newest=job.flusher.durable if job.flusher is not None else None,
            idle_s=_idle_s(job, self._served.get(job.name, {}), generation),
            noted_idle_s=_idle_s(job, job.index.served(), generation),
        )

    async def before_opening(self, job: Job) -> None:
        """A generation is about to be given out. If no trainer was served here lately the job may have been elsewhere:
        the number is to be above what it has left in the tier. Waits a little; see `check_generation`.
        """
        idle_s = self.facts(job, GENERATION_MAX).idle_s
        if idle_s is None or idle_s > TRUST_S:
            newest = await self.newest(job)
            if newest is not None:
                job.coordination.start_above(newest.generation)

    async def newest(self, job: Job) -> SnapshotId | None:
        """The newest snapshot that the tier has of the job, good or bad; None also when it does not answer at once."""
        found: list[Candidate] = []
        async with self._briefly():
            found = await self.candidates(job.name)
        return found[0].id if found else None

    async def chunk_bytes(self, job: Job) -> int:
        """The chunk size of the newest good snapshot there; 0: none, or no answer at once."""
        found = 0
        async with self._briefly():
            reader = await self.reader(job.name)
            for candidate in await self.candidates(job.name):
                opened = await self.ask(reader.open, candidate, [0])
                if isinstance(opened, Opened):
                    found = opened.shards[0].chunk_bytes
                    break
        return found

    @contextlib.asynccontextmanager
    async def _briefly(self) -> AsyncIterator[None]:
        """For questions of a start that need no answer: one that is not answered at once ends the context, and those
        that come soon after it are given up at their first wait.
        """
        clock = asyncio.get_running_loop()
        is_away = clock.time() < self._quiet_until_s
        with contextlib.suppress(SnapdError, TimeoutError):
            try:
                async with asyncio.timeout(0 if is_away else BRIEF_S):
                    yield
            except (SnapdError, TimeoutError):
                if not is_away:
                    self._quiet_until_s = clock.time() + QUIET_S
                raise

    async def repair(
        self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[tuple[int, str]]
    ) -> Repair:
        """On one machine: chunks that are bad in memory come anew from the tier, if it has the snapshot. Implements
        `job.Repairing`.
        """
        try:
            await bring_from_tier(self, job, snapshot, rank)
        except SnapdError as error:  # a restore asks the tier again, and waits for it
            return Repair(False, is_proved=True, why=error.message)
        job.ledger.unhold(snapshot)
        return Repair(True, source=self.url)

    # a round

    async def decide(self, job: Job, wish: Wish, memory: Decision) -> Decision:
        """The round's decision, when memory alone would give `memory`. A snapshot that is found is here when this
        returns, whole and verified, and the caller holds it at once; but for one of another number of ranks, which
        stays where it is (`left_in_tier`).

        Raises:
            ConflictError: kind `tier_generation`. CapacityError: it does not fit.
        """
        self.observe([job])
        ask, why = how_to_ask(memory, self.facts(job, wish.generation), step=wish.step)
        if ask is Ask.NOT:
            return memory
        job.context.log.info("restore.asks_tier", job=job.name, store=self.url, how=ask.value, reason=why)
        try:
            candidates = await self.listed(job.name, BRIEF_S if ask is Ask.BRIEFLY else self._wait_s)
        except SnapdError as error:
            is_enough = ask is Ask.BRIEFLY or (wish.accept_older and memory.outcome is Outcome.FOUND)
            job.context.log.warning("restore.tier_away", job=job.name, kind=error.kind, reason=error.message)
            return memory if is_enough else unreachable(memory, (), self.url, error.message)
        self.check_generation(job, candidates, wish.generation)
        return await _Choosing(self, job, wish, memory).run(candidates)

    def check_generation(self, job: Job, candidates: Sequence[Candidate], generation: int) -> None:
        """Raise ConflictError (kind `tier_generation`) if a generation was given out while the tier could not be asked,
        or the job was elsewhere meanwhile.
        """
        highest = max((candidate.id.generation for candidate in candidates), default=0)
        if highest < generation:
            return
        job.coordination.start_above(highest)
        raise ConflictError(
            f"{self.url} has snapshots of generation {highest}; this start was numbered {generation} before"
            " that was known",
            kind="tier_generation",
            hint="start the trainer again: it gets a number above them",
            job=job.name,
        )


@dataclass(slots=True)
class _Choosing:
    """One round: the tier's snapshots from the newest on, until one is whole here."""

    tier: TierRestores
    job: Job
    wish: Wish
    memory: Decision

    async def run(self, candidates: Sequence[Candidate]) -> Decision:
        found: list[Verdict] = []
        is_in_memory = self.memory.outcome in (Outcome.FOUND, Outcome.WORLD_SIZE_DIFFERS)
        for candidate in candidates:
            if is_in_memory and self.memory.chosen is not None and candidate.id <= self.memory.chosen:
                break
            if self.wish.step is not None and candidate.id.step != self.wish.step:
                reason = f"step {self.wish.step} was asked for"
                found.append(Verdict(candidate.id, "other step", reason))
                continue
            if candidate.id in self.wish.problems:
                found.append(Verdict(candidate.id, "unusable", self.wish.problems[candidate.id]))
                continue
            try:
                decision = await self._try(candidate, found)
            except (SnapdError, Lacking) as error:
                why = self._why_away(error)
                if self.wish.accept_older and is_in_memory:
                    return merged(self.memory, found)
                return unreachable(self.memory, found, self.tier.url, why)
            if decision is not None:
                return decision
        return merged(self.memory, found)

    def _why_away(self, error: SnapdError | Lacking) -> str:
        """Raises what is not the store's fault."""
        if isinstance(error, Lacking):
            return error.reason
        if not is_store_away(error):
            raise error
        return error.message

    async def _try(self, candidate: Candidate, found: list[Verdict]) -> Decision | None:
        """The decision, if this is the snapshot; else a verdict on it is added."""
        reader = await self.tier.reader(self.job.name)
        opened = await self.tier.ask(reader.open, candidate)
        if isinstance(opened, Opened) and opened.record.world_size != self.wish.world_size:
            return self._of_another_world(opened, found, reader.store.description)
        opened = await self.tier.ask(reader.open, candidate, None)
        if not isinstance(opened, Opened):
            if not opened.is_void:
                found.append(Verdict(candidate.id, "unusable", opened.reason))
            return None
        from_memory, problem = await bring_snapshot(self.tier, self.job, reader, opened)
        if problem:
            found.append(Verdict(candidate.id, "unusable", problem))
            self.job.settle()  # what came of it gives its place to the next
            return None
        where = reader.store.description
        return chosen_from_tier(opened.id, where, self.memory, found, from_memory=from_memory)

    def _of_another_world(self, opened: Opened, found: list[Verdict], where: str) -> Decision:
        """Ranks that cut it anew say themselves what they need of it: nothing is brought before."""
        world_size = opened.record.world_size
        if not self.wish.is_elastic:
            reason = f"{opened.id} was captured by {world_size} ranks, this world has {self.wish.world_size}"
            return Decision(Outcome.WORLD_SIZE_DIFFERS, opened.id, tuple(found), reason)
        self.tier.chunks.note(opened.record)
        return chosen_from_tier(opened.id, where, self.memory, found, left_in_tier=world_size)


async def bring_snapshot(
    tier: TierRestores,
    job: Job,
    reader: TierReader,
    opened: Opened,
    *,
    ranks: Sequence[int] = (),
    progress: Progress = lambda nbytes: None,
) -> tuple[list[int], str]:
    """Have the shards of `ranks` (empty: of all) here. Returns the ranks whose shards were here already, and why the
    snapshot cannot be used (empty: it can). Nothing is held when this returns, and nothing awaited since it was.

    Raises:
        Lacking: the store does not answer. CapacityError, ConflictError.
    """
    held, here = 0, []
    try:
        for rank in ranks or sorted(opened.shards):
            shard = opened.shards[rank]
            facts = job.ledger.snapshots.get(opened.id)
            if facts is not None and _is_good_here(facts, rank, shard.digest):
                job.ledger.hold(opened.id)
                here.append(rank)
                progress(shard.nbytes)
            else:
                await bring_stored(job, reader, shard, tier.threads, progress=progress)
            held += 1
    except Lacking as lacking:
        if lacking.is_away:
            raise
        return here, f"rank {rank}: {lacking.reason}"
    finally:
        for _ in range(held):
            job.ledger.unhold(opened.id)
        tier.pool.trim()
    forgive(job, opened.id)
    return here, ""


async def bring_from_tier(tier: TierRestores, job: Job, snapshot: SnapshotId, rank: int) -> ShardRecord:
    """One rank's shard of a snapshot that the tier has; the snapshot is then held once more.

    Raises:
        NotRestorable, UnavailableError: kind `shard_sources`: it is not there, or not good; the tier does not answer.
        CapacityError, ConflictError: as `bring_stored`.
    """
    try:
        reader = await tier.reader(job.name)
        opened = await tier.ask(reader.find, snapshot, [rank])
    except SnapdError as error:
        if not is_store_away(error):
            raise
        what = f"{tier.url} cannot be asked: {error.message}"
        raise UnavailableError(what, kind="shard_sources", job=job.name, rank=rank) from error
    if not isinstance(opened, Opened) or rank not in opened.shards:
        why = f"it has no rank {rank}" if isinstance(opened, Opened) else opened.reason
        raise NotRestorable(f"{tier.url}: {why}", kind="shard_sources", job=job.name, rank=rank)
    try:
        return await bring_stored(job, reader, opened.shards[rank], tier.threads)
    except Lacking as lacking:
        cls = UnavailableError if lacking.is_away else NotRestorable
        raise cls(f"{tier.url}: {lacking.reason}", kind="shard_sources", job=job.name, rank=rank) from lacking
    finally:
        tier.pool.trim()


def _idle_s(job: Job, served: Mapping[int, float], generation: int) -> float | None:
    """Since a trainer of a generation below `generation` was served. None: never, or by another boot's clock."""
    now_s = job.context.environment.monotonic_s()
    older = [at_s for number, at_s in served.items() if number < generation and at_s <= now_s]
    return now_s - max(older) if older else None


def _is_good_here(facts: SnapshotFacts, rank: int, digest: bytes) -> bool:
    """A snapshot that was proved bad may have good shards, too: `bring_stored` hashes them."""
    shard = facts.shards.get(rank)
    is_trusted = shard is not None and shard.is_verified and not facts.problem
    return is_trusted and shard is not None and shard.record.digest == digest


def forgive(job: Job, snapshot: SnapshotId) -> None:
    """It was proved bad in memory, perhaps, and has been brought anew."""
    facts = job.ledger.snapshots.get(snapshot)
    if facts is not None and facts.problem and facts.is_verified:
        facts.problem = ""
        job.index.set_problem(snapshot, "")
        job.forget_announced()
