"""Choosing and agreeing on a snapshot to restore: the I/O around core/restore.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from snapd.core.ids import SnapshotId
from snapd.core.ledger import ShardFacts, SnapshotFacts
from snapd.core.manifest import ShardRecord
from snapd.core.restore import Decision, Outcome, RankReport, RestoreRound, Verdicts, choose
from snapd.errors import ConflictError, FencedError, NotFoundError, UnavailableError
from snapd.memory.hashing import bad_chunks
from snapd.runtime.digesting import read_layout
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.mending import mended
from snapd.runtime.session import Session
from snapd.runtime.tier_restoring import TierRestores, Wish

ROUNDS_MAX = 64
VERIFY_PIECE_CHUNKS = 32
REPAIR_PAUSE_S = 1.0
REPAIR_PAUSE_MAX_S = 60.0
Progress = Callable[[int], None]


async def plan_restore(
    job: Job,
    session: Session,
    number: int,
    step: int | None,
    *,
    is_elastic: bool = False,
    accept_older: bool = False,
    tier: TierRestores | None = None,
) -> Decision:
    """Return the decision of this generation's round `number`; the first rank to ask makes it, all get the
    same. `is_elastic`: a snapshot of another number of ranks will do. `accept_older`: than what a tier that does not
    answer may have.

    A snapshot that was found is held until the round is concluded or the generation is over.

    Raises:
        ConflictError: the ranks of a round ask for different steps, or rounds are left out.
        UnavailableError: kind `settling`: an older trainer's captures were not taken up in time; ask again.
    """
    if number >= ROUNDS_MAX:
        raise ConflictError("too many rounds of one restore", kind="restore_round", round=number)
    generation, key = session.generation, (session.generation, number)
    point("daemon.plan.before")
    async with job.planning:
        known = job.rounds.get(key)
        if known is not None:
            known.check_same(step)
            return known.decision
        if not await job.changes.wait_until(
            lambda: _is_settled(job, generation), job.context.settings.restore_settle_s
        ):
            raise UnavailableError(
                "captures of an older generation are still being taken up", kind="settling", hint="ask again"
            )
        decision, away = await _decide(job, session, step, is_elastic), ""
        if job.disk is not None and job.disk.may_have_newer(decision, step=step):
            away = await job.disk.wait_filled()
            decision = job.disk.add_verdicts(await _decide(job, session, step, is_elastic))
        if job.disk is not None:
            job.disk.check_generation(generation)
        if tier is not None:
            wish = Wish(
                world_size=session.row.world_size,
                generation=generation,
                step=step,
                accept_older=accept_older,
                is_elastic=is_elastic,
                problems=_problems_met(job, generation),
            )
            decision = await tier.decide(job, wish, decision)
        if job.disk is not None and away:
            decision = job.disk.doubt(decision, away, step=step, accept_older=accept_older)
        round_ = RestoreRound(generation, number, session.row.world_size, step, decision)
        _hold(job, round_)
        job.rounds[key] = round_
    job.context.log.info(
        "restore.planned",
        job=job.name,
        generation=generation,
        round=number,
        outcome=decision.outcome.value,
        chosen=str(decision.chosen) if decision.chosen else None,
        reason=decision.reason,
    )
    point("daemon.plan.after")
    return decision


def _problems_met(job: Job, generation: int) -> dict[SnapshotId, str]:
    """What earlier rounds found unusable; memory knows that of its own snapshots, but not of what stayed in a tier."""
    return {
        round_.decision.chosen: round_.answer.problem
        for (its_generation, _), round_ in job.rounds.items()
        if its_generation == generation and round_.answer and round_.answer.problem and round_.decision.chosen
    }


def _hold(job: Job, round_: RestoreRound) -> None:
    """What was chosen stays until `_let_go`, as far as it is here."""
    chosen = round_.decision.chosen
    if round_.decision.outcome is Outcome.FOUND and chosen is not None and chosen in job.ledger.snapshots:
        job.ledger.hold(chosen)
        round_.is_holding = True


def _let_go(job: Job, round_: RestoreRound) -> None:
    if round_.is_holding and round_.decision.chosen is not None:
        round_.is_holding = False
        job.ledger.unhold(round_.decision.chosen)


def _is_settled(job: Job, generation: int) -> bool:
    """Nothing of an older generation is still being taken up, and no rank of a rollback is still behind."""
    older = [s for s in job.sessions.values() if s.generation < generation]
    return all(s.is_drained and not s.is_served for s in older)


async def _decide(job: Job, session: Session, step: int | None, is_elastic: bool) -> Decision:
    world_size = session.row.world_size
    while True:
        snapshots = [
            facts for facts in job.ledger.newest_first() if facts.id.generation <= session.generation
        ]
        decision = choose(snapshots, world_size=world_size, step=step)
        if is_elastic and decision.outcome is Outcome.WORLD_SIZE_DIFFERS and decision.chosen is not None:
            world_size = job.ledger.snapshots[decision.chosen].world_size
            continue
        if decision.outcome is not Outcome.VERIFY or decision.chosen is None:
            return decision
        await verify(job, decision.chosen)


@dataclass(frozen=True, slots=True)
class Verified:
    """What hashing a snapshot again found: (rank, index, what). `repaired`: bad, and brought back from `source` (in
    words); `bad`: not. `is_waiting`: they may still be brought, so that the snapshot is not condemned; `why` they were
    not.
    """

    bad: tuple[tuple[int, int, str], ...] = ()
    repaired: tuple[tuple[int, int, str], ...] = ()
    is_waiting: bool = False
    why: str = ""
    source: str = ""


async def verify(job: Job, snapshot: SnapshotId, progress: Progress | None = None) -> Verified:
    """Hash every chunk of a snapshot again, and bring back what is bad, where others have it; mark it verified,
    or unusable if it is proved to be.
    """
    facts = job.ledger.snapshots.get(snapshot)
    if facts is None:
        raise NotFoundError(f"snapshot {snapshot} has been dropped meanwhile", kind="snapshot", job=job.name)
    job.ledger.hold(snapshot)
    bad: list[tuple[int, int, str]] = []
    try:
        pieces = [
            (shard, first)
            for _, shard in sorted(facts.shards.items())
            for first in range(0, len(shard.record.chunks), VERIFY_PIECE_CHUNKS)
        ]
        parallel = asyncio.Semaphore(job.context.settings.hash_threads)
        found = await asyncio.gather(
            *(_verify_piece(job, parallel, shard, first, progress) for shard, first in pieces)
        )
        bad = sorted(entry for part in found for entry in part)
        ranks = {rank for rank, _, _ in bad}
        for rank, shard in facts.shards.items():
            shard.is_verified = rank not in ranks
        if not bad:
            return Verified()
        job.context.metrics.chunks_bad.inc(len(bad))
        result = await _repaired(job, snapshot, bad)
    finally:
        job.ledger.unhold(snapshot)
    if result.bad and not result.is_waiting:
        listed = "; ".join(f"rank {rank} chunk {index}: {what}" for rank, index, what in result.bad[:4])
        more = f" and {len(result.bad) - 4} more" if len(result.bad) > 4 else ""
        condemn(job, snapshot, listed + more + (f"; {result.why}" if result.why else ""))
    return result


def verify_soon(job: Job, snapshot: SnapshotId) -> None:
    """Verify beside everything else; once at a time for each snapshot."""
    if snapshot not in job.verifying and not job.is_removed:
        job.verifying[snapshot] = job.context.spawn(_verify_alone(job, snapshot), f"verify {job.name}")


async def _verify_alone(job: Job, snapshot: SnapshotId) -> None:
    try:
        await verify(job, snapshot)
    except NotFoundError:
        return  # dropped meanwhile
    finally:
        del job.verifying[snapshot]
        job.settle()


async def _repaired(job: Job, snapshot: SnapshotId, found: Sequence[tuple[int, int, str]]) -> Verified:
    if job.repairs is None:
        return Verified(tuple(found))
    bad: list[tuple[int, int, str]] = []
    repaired: list[tuple[int, int, str]] = []
    reasons: list[str] = []
    sources: dict[str, None] = {}
    is_waiting = False
    for rank in sorted({rank for rank, _, _ in found}):
        mine = [entry for entry in found if entry[0] == rank]
        bad_here = [(index, what) for _, index, what in mine]
        result = await mended(job, job.repairs, snapshot, rank, bad_here)
        (repaired if result.is_whole else bad).extend(mine)
        if result.is_whole:
            sources[result.source] = None
        else:
            reasons.append(result.why)
            is_waiting = is_waiting or not result.is_proved
    return Verified(tuple(bad), tuple(repaired), is_waiting, "; ".join(reasons[:4]), " and ".join(sources))


async def _verify_piece(
    job: Job, parallel: asyncio.Semaphore, shard: ShardFacts, first: int, progress: Progress | None
) -> list[tuple[int, int, str]]:
    record = shard.record
    async with parallel:
        found = await asyncio.get_running_loop().run_in_executor(
            job.context.hashing, bad_chunks, job.arena(record.rank).memory, record, first, VERIFY_PIECE_CHUNKS
        )
    if progress is not None:
        progress(sum(chunk.nbytes for chunk in record.chunks[first : first + VERIFY_PIECE_CHUNKS]))
    return [(record.rank, index, what) for index, what in found]


def condemn(job: Job, snapshot: SnapshotId, problem: str) -> None:
    """A snapshot is proved bad: remember it, also across restarts, and say so once."""
    facts = job.ledger.snapshots.get(snapshot)
    if facts is None or facts.problem:
        return
    job.ledger.mark_unusable(snapshot, problem)
    job.index.set_problem(snapshot, problem)
    job.forget_announced()
    job.context.log.error(
        "snapshot.unusable", job=job.name, generation=snapshot.generation, step=snapshot.step, reason=problem
    )


def distrust(job: Job) -> None:
    """The writers of the job are gone: hash its newest complete snapshot again, beside everything else. Where worlds
    span nodes and it is not known yet which that is: the newest that is here.
    """
    if not job.has_new_writers or job.is_removed:
        return
    job.has_new_writers = False
    for facts in job.ledger.snapshots.values():
        for shard in facts.shards.values():
            shard.is_verified = False
    if _newest_to_verify(job) is not None:
        job.context.spawn(_verify_newest(job), f"verify {job.name}")


async def _verify_newest(job: Job) -> None:
    pause_s = REPAIR_PAUSE_S
    while not await _is_newest_verified(job):
        await asyncio.sleep(pause_s)  # bad chunks wait for a node that may have them
        pause_s = min(REPAIR_PAUSE_MAX_S, 2 * pause_s)
    job.settle()


async def _is_newest_verified(job: Job) -> bool:
    async with job.planning:  # so that a plan that comes meanwhile uses the result
        newest = _newest_to_verify(job)
        while newest is not None and not job.is_removed:
            if all(shard.is_verified for shard in newest.shards.values()):
                return True
            if (await verify(job, newest.id)).is_waiting:
                return False
            newest = _newest_to_verify(job)
    return True


def _newest_to_verify(job: Job) -> SnapshotFacts | None:
    newest = job.ledger.newest_complete()
    if newest is None and job.world is not None:
        newest = next((facts for facts in job.ledger.newest_first() if not facts.problem), None)
    return newest


def chosen_in(job: Job, session: Session, number: int) -> SnapshotId:
    """What this round of the session's generation restores.

    Raises:
        NotFoundError: kind `restore_round`: nothing was planned, or nothing found.
    """
    round_ = job.rounds.get((session.generation, number))
    if round_ is None or round_.decision.outcome is not Outcome.FOUND or round_.decision.chosen is None:
        raise NotFoundError(
            "no restore was planned in this round",
            kind="restore_round",
            hint="call PlanRestore",
            round=number,
        )
    return round_.decision.chosen


async def shards_for(job: Job, facts: SnapshotFacts, rank: int) -> list[ShardRecord]:
    """The records that a rank needs: its own first, then those of ranks that hold bytes for it."""
    own = facts.shards[rank].record
    holders = await holders_of(job, own)
    return [own, *(facts.shards[other].record for other in sorted(holders) if other in facts.shards)]


async def holders_of(job: Job, own: ShardRecord) -> set[int]:
    """The other ranks whose shards hold bytes for this one, as its layout says; none if that cannot be read: the
    trainer will say that its chunk is bad.
    """
    try:
        layout = await asyncio.get_running_loop().run_in_executor(
            job.context.hashing,
            read_layout,
            job.arena(own.rank).memory,
            own.chunks[: own.layout_chunk_count],
            own.layout_nbytes,
        )
    except DecodeError:
        return set()
    return {region.held_by_rank_plus_one - 1 for region in layout.regions} - {-1, own.rank}


async def finish_restore(job: Job, session: Session, number: int, report: RankReport) -> Verdicts:
    """Report one rank's restore; return when all ranks have reported, one is gone, or the time is over.

    Raises: NotFoundError: kind `restore_round`: nothing was planned for this round, or the daemon was
        restarted since.
    """
    generation = session.generation
    round_ = job.rounds.get((generation, number))
    if round_ is None:
        known = job.coordination.generation(generation)
        if known is not None and known.parent is not None:
            return Verdicts(True, False, "restored on all ranks")
        raise NotFoundError(
            "no restore was planned in this round",
            kind="restore_round",
            hint="call PlanRestore again",
            round=number,
        )
    round_.report(session.rank, report)
    job.changes.notify()

    def is_over() -> bool:
        is_answered = round_.settle(lost_ranks=_lost_ranks(job, generation)) is not None
        return is_answered or job.is_removed or not session.is_served

    await job.changes.wait_until(is_over, job.context.settings.restore_finish_s)
    if round_.answer is None and (job.is_removed or not session.is_served):
        raise FencedError("the restore was overtaken by a newer generation", kind="stale_generation")
    answer = round_.settle(is_late=True)
    assert answer is not None
    async with job.planning:
        await _conclude(job, round_, answer)
    point("daemon.finish.after")
    return answer


def _lost_ranks(job: Job, generation: int) -> set[int]:
    mine = [session for session in job.sessions.values() if session.generation == generation]
    return {session.rank for session in mine if not session.is_live}


async def _conclude(job: Job, round_: RestoreRound, answer: Verdicts) -> None:
    """Act upon the answer, once, before anyone is told."""
    if round_.is_concluded:
        return
    round_.is_concluded = True
    job.fetched.release(job.arenas, (round_.generation, round_.number))
    chosen = round_.decision.chosen
    if round_.decision.outcome is not Outcome.FOUND or chosen is None:
        return
    _let_go(job, round_)
    if answer.is_committed:
        point("daemon.parent.before")
        await job.coordination.commit_parent(round_.generation, chosen)
        point("daemon.parent.after")
    if answer.problem:
        condemn(job, chosen, answer.problem)
    job.context.log.info(
        "restore.finished",
        job=job.name,
        generation=round_.generation,
        round=round_.number,
        step=chosen.step,
        is_committed=answer.is_committed,
        reason=answer.reason,
    )
    job.settle()


def release_rounds(job: Job, *, below: int) -> None:
    """The restores of generations below this are over, finished or not."""
    job.fetched.release_below(job.arenas, below)
    for key, round_ in list(job.rounds.items()):
        if key[0] >= below:
            continue
        _let_go(job, round_)
        round_.is_concluded = True
        del job.rounds[key]
