"""Restore, seen from one rank: ask, map read-only, verify and copy chunk by chunk, report, go on.

All ranks of a round get the same snapshot, and none goes on before all have it. A chunk that is not what its hash says
ends the round; the daemon then marks the snapshot unusable and the next round takes the next one.
"""

from __future__ import annotations

import concurrent.futures
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snapd_native import CopyPlan
from snapd_proto import trainer_pb2 as pb

from . import faults
from .elastic import SavedShards, chunks_read
from .errors import NotRestorable, SnapdError, UnavailableError
from .restore_device import ToDevices, split_ways
from .session import Session, ShardMemory
from .shard_source import BadChunks, ShardSource
from .state.apply import PendingRestore, is_cut_alike, names_of, prepare_restore
from .state.layouts import Layouts
from .state.names import Names
from .state.resharding import Elastic, Reshard
from .state.tree import StateTree
from .world import World

ROUNDS_MAX = 8
COPY_THREADS_MAX = 2
RESTORE_TIMEOUT_S = 600.0
# The daemon may bring the shard from a tier meanwhile; if it dies, the call ends at once.
PLAN_TIMEOUT_S = 4 * 3600.0
WHAT_MAX = 1024
NO_SOURCE = "shard_sources"  # the daemon's word for a shard that was chosen and cannot be brought
# What may go wrong for one rank alone after all have the same plan: the others must not wait for it.
BRINGING_FAILED = frozenset({NO_SOURCE, "chunk_bytes", "arena_full", "segments"})


@dataclass(frozen=True)
class Context:
    """What a restore needs of its Snapshotter."""

    tree: StateTree
    session: Session
    job: str
    world: World


@dataclass(frozen=True)
class Asked:
    """What the user asked for; see Snapshotter.restore."""

    step: int | None = None
    accept_older: bool = False
    allow_partial: Sequence[str] = ()
    reshard: Mapping[str, Reshard] = field(default_factory=dict)


def restore(context: Context, asked: Asked) -> int:
    """Rounds until all ranks have one snapshot. Returns its step, 0 if there is none.

    Raises:
        NotRestorable, RestoreMismatch, UnavailableError: see Snapshotter.restore.
    """
    for turn in range(ROUNDS_MAX):
        plan = None
        try:
            plan = _ask(context, turn, asked)
            if plan is None:
                return 0
            _fill(context, turn, plan, asked)
            answer = _report(context, turn)
        except BadChunks as error:
            answer = _report(context, turn, bad=error.chunks)
        except Exception as error:
            if not isinstance(error, NotRestorable) or error.kind != NO_SOURCE:
                if plan is not None or getattr(error, "kind", "") in BRINGING_FAILED:
                    _report_failure(context, turn, error)
                raise
            # a shard cannot be had from any source: all ranks take the next snapshot, or say why there is none
            # of this rank, or of another one, whose chunks an elastic restore needs
            owner = int(str(error.context.get("rank", context.world.rank)))
            answer = _report(context, turn, unavailable=(owner, str(error)))
        if plan is not None and answer.committed:
            return plan.step
        if not answer.try_again:
            raise UnavailableError("not all ranks could restore", reason=answer.reason, round=turn)
    raise NotRestorable("every round of the restore met bad chunks", rounds=ROUNDS_MAX, job=context.job)


def _ask(context: Context, turn: int, asked: Asked) -> pb.PlanRestoreReply | None:
    step = asked.step
    request = pb.PlanRestoreRequest(
        session_id=context.session.session_id,
        round=turn,
        has_step=step is not None,
        step=step or 0,
        accept_older=asked.accept_older,
        elastic=True,
    )
    plan: pb.PlanRestoreReply = context.session.call(
        lambda stub, **options: stub.PlanRestore(request, **options), timeout_s=PLAN_TIMEOUT_S
    )
    outcome = plan.outcome
    if outcome == pb.PlanRestoreReply.FOUND:
        return plan
    if outcome == pb.PlanRestoreReply.ABSENT and step is None:
        return None
    candidates = [
        f"generation {c.generation} step {c.step}: {c.verdict}: {c.reason}" for c in plan.candidates
    ]
    if outcome == pb.PlanRestoreReply.ABSENT:
        raise NotRestorable(
            "the job has no snapshot of that step", step=step, job=context.job, candidates=candidates
        )
    if outcome == pb.PlanRestoreReply.WORLD_SIZE_DIFFERS:
        raise NotRestorable(
            "the snapshot was taken by another number of ranks",
            hint="start with the same WORLD_SIZE",
            reason=plan.reason,
            job=context.job,
            candidates=candidates,
        )
    if outcome == pb.PlanRestoreReply.UNREACHABLE:
        raise UnavailableError(
            "a source that may hold a newer snapshot cannot be reached", reason=plan.reason
        )
    raise NotRestorable(
        "snapshots were found, none can be used", reason=plan.reason, job=context.job, candidates=candidates
    )


def _fill(context: Context, turn: int, plan: pb.PlanRestoreReply, asked: Asked) -> None:
    session, names = context.session, names_of(context.tree)
    with session.shard_memory(context.job, plan.generation, plan.step, plan.shards) as memory:
        if plan.shards:
            sources = {one.rank: ShardSource(one, memory, session.chunk_bytes) for one in plan.shards}
            own = sources[plan.shards[0].rank]
            layout = own.layout()
            if plan.saved_world_size == 0 or is_cut_alike(context.tree, layout, names):
                others = {rank: source.layout() for rank, source in sources.items() if source is not own}
                pending = prepare_restore(
                    context.tree,
                    layout,
                    own.early(),
                    allow_partial=asked.allow_partial,
                    others=others,
                    names=names,
                )
                faults.point("client.restore.prepared")
                _finish(context, pending, sources)
                return
        _fill_elastic(context, turn, plan, asked, memory, names)


def _fill_elastic(
    context: Context, turn: int, plan: pb.PlanRestoreReply, asked: Asked, memory: ShardMemory, names: Names
) -> None:
    """The shards were cut otherwise than the live state is: only the chunks that this rank needs are brought."""
    snapshot, world_size = (plan.generation, plan.step), plan.saved_world_size
    shards = SavedShards(context.session, context.job, turn, snapshot, memory)
    base = context.world.rank % world_size
    asks_others = any(callable(how) for how in asked.reshard.values())
    layouts = Layouts(world_size, shards.read_layouts)
    layout = layouts[base]
    early = shards.read_early(range(world_size) if asks_others else [base])
    pending = prepare_restore(
        context.tree,
        layout,
        early[base],
        allow_partial=asked.allow_partial,
        elastic=Elastic(layouts, early, asked.reshard),
        names=names,
    )
    faults.point("client.restore.prepared")
    shards.fetch(chunks_read(pending.sources, pending.pieces_of_chunk))
    _finish(context, pending, shards.sources)


def _finish(context: Context, pending: PendingRestore, sources: Mapping[int, ShardSource]) -> None:
    _copy_verified(pending, sources, _threads(context.world))
    faults.point("client.restore.copied")
    pending.finish()


def _threads(world: World) -> int:
    share = len(os.sched_getaffinity(0)) // world.local_world_size
    return max(1, min(COPY_THREADS_MAX, share))


def _copy_verified(pending: PendingRestore, sources: Mapping[int, ShardSource], threads: int) -> None:
    """Each chunk is hashed and, while it is in the cache, copied to where its bytes belong.

    `sources`: the shards by rank: this rank's own, and those of ranks that keep bytes for it.

    Raises:
        BadChunks: all that were found; the live state is then partly overwritten, and the next round or the error
            that follows says so.
    """
    bases = array("Q", [sources[rank].address(chunk) for rank, chunk in pending.sources])
    ways = split_ways(pending.plan, pending.pieces_of_chunk, pending.destinations, pending.device_of)
    plan = CopyPlan(*ways.plan)
    bad: list[tuple[int, int]] = []

    def take(number: int) -> None:
        first, pieces = ways.pieces_of_chunk[number]
        rows = ways.device_rows.get(number, ())
        if pieces == 0 and not rows:
            return
        rank, chunk = pending.sources[number]
        if not sources[rank].is_good(chunk):
            bad.append((rank, chunk))
        elif not bad:
            if pieces:
                plan.run(bases, pending.destinations, first, pieces)
            to_devices.copy(bases[number], rows)

    with (
        ToDevices(set(pending.device_of.values())) as to_devices,
        concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="snapd-restore") as pool,
    ):
        list(pool.map(take, range(len(pending.sources))))
    if bad:
        raise BadChunks(sorted(bad))


def _report(
    context: Context,
    turn: int,
    *,
    bad: list[tuple[int, int]] | None = None,
    unavailable: tuple[int, str] | None = None,
) -> pb.FinishRestoreReply:
    """How the round went. `unavailable`: whose shard cannot be had at all, and why."""
    chunks = [pb.BadChunk(rank=rank, chunk_index=chunk, what="hash differs") for rank, chunk in bad or []]
    if unavailable is not None:
        owner, why = unavailable
        chunks.append(pb.BadChunk(rank=owner, chunk_index=0, what=why[:WHAT_MAX]))
    request = pb.FinishRestoreRequest(
        session_id=context.session.session_id, round=turn, succeeded=not chunks, bad_chunks=chunks
    )
    reply: pb.FinishRestoreReply = context.session.call(
        lambda stub, **options: stub.FinishRestore(request, **options), timeout_s=RESTORE_TIMEOUT_S
    )
    return reply


def _report_failure(context: Context, turn: int, error: Exception) -> None:
    """Tell the other ranks, so that they do not wait for this one."""
    request = pb.FinishRestoreRequest(
        session_id=context.session.session_id,
        round=turn,
        succeeded=False,
        failure=f"{type(error).__name__}: {error}",
    )
    try:
        context.session.call(lambda stub, **options: stub.FinishRestore(request, **options))
    except SnapdError:
        return  # the error itself is raised right after this; the daemon notices that we are gone
