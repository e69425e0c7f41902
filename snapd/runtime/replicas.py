"""Replicas within a node: full captures of all its ranks are compared, and the trainers told whether they may share out
what they hold alike (docs/state.md). The decisions are in core/replicas.py; here are layouts, bytes and pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.message import DecodeError
from snapd_proto import format_pb2

from snapd.core.ids import SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.replicas import (
    REPLICAS_DIFFER,
    Difference,
    Member,
    Pair,
    Piece,
    Region,
    ShardReplicas,
    layout_identity,
    node_ranks,
    pairs,
    pieces,
    unlike,
    unresolved,
)
from snapd.errors import IntegrityError, RemoteProtocolError
from snapd.memory.comparing import differing_pieces
from snapd.runtime.digesting import read_layout
from snapd.runtime.job import Job
from snapd.runtime.session import Session
from snapd.units import MIB

WORD = "replicas_equal_step_plus_one"
LAYOUTS_KEPT_PER_RANK = 4
TURN_BYTES, TURN_PIECES = (
    64 * MIB,
    4096,
)  # compared by a thread of the hashing pool before others have their turn


# --- layouts ----------------------------------------------------------------------------------------------------
def replicas_of(layout: format_pb2.ShardLayout) -> ShardReplicas:
    """The regions that other ranks hold too.

    Raises:
        IntegrityError: kind `layout`: a tensor lies in a region that is not there.
    """
    inside: dict[int, list[format_pb2.Tensor]] = {}
    for tensor in layout.tensors:
        if tensor.HasField("subclass"):
            continue
        if tensor.nbytes and tensor.region >= len(layout.regions):
            raise IntegrityError(
                "a tensor lies in a region that is not there", kind="layout", tensor=tensor.name
            )
        inside.setdefault(tensor.region, []).append(tensor)
    regions: dict[str, Region] = {}
    for number, tensors in inside.items():
        sets = {tuple(tensor.replica_set.ranks) for tensor in tensors}
        ranks = sets.pop() if len(sets) == 1 else ()
        if len(ranks) > 1 and layout.regions[number].nbytes:
            found = _region(layout.regions[number], tensors, ranks)
            regions[found.name] = found
    return ShardReplicas.of(layout.rank, regions)


def _region(
    region: format_pb2.Region, tensors: Sequence[format_pb2.Tensor], ranks: tuple[int, ...]
) -> Region:
    main = next((tensor for tensor in tensors if tensor.is_parameter), tensors[0])
    held_by = region.held_by_rank_plus_one
    return Region(
        name=main.name,
        nbytes=region.nbytes,
        ranks=ranks,
        members=tuple(
            Member(t.name, t.region_offset, t.nbytes, t.dtype, tuple(t.shape), tuple(t.strides))
            for t in tensors
        ),
        shard_offset=region.shard_offset,
        holder=held_by - 1 if held_by else None,
    )


def _identity(rank: int, chunks: Sequence[Chunk], layout_nbytes: int) -> tuple[int, bytes]:
    return rank, layout_identity([chunk.digest for chunk in chunks], layout_nbytes)


def _key(record: ShardRecord) -> tuple[int, bytes]:
    return _identity(record.rank, record.chunks[: record.layout_chunk_count], record.layout_nbytes)


async def _learn(job: Job, rank: int, chunks: Sequence[Chunk], layout_nbytes: int) -> tuple[int, bytes]:
    """Parse a layout unless it is known; returns its key in `job.replicas.known`.

    Raises:
        IntegrityError: it contradicts itself.
    """
    known, key = job.replicas.known, _identity(rank, chunks, layout_nbytes)
    if key not in known:
        loop = asyncio.get_running_loop()
        memory = job.arena(rank).memory
        try:
            layout = await loop.run_in_executor(
                job.context.hashing, read_layout, memory, chunks, layout_nbytes
            )
        except DecodeError as error:
            raise IntegrityError("a layout does not parse", kind="layout", rank=rank) from error
        known[key] = await loop.run_in_executor(job.context.hashing, replicas_of, layout)
        mine = [other for other in known if other[0] == rank]
        for old in mine[:-LAYOUTS_KEPT_PER_RANK]:
            del known[old]
        job.replicas.resolved.clear()
    return key


# --- at each capture --------------------------------------------------------------------------------------------
def ranks_beside(session: Session) -> range:
    """The ranks of the session's node, itself included; empty if it is alone."""
    page, row = session.page, session.row
    if row.world_size == 1:
        return range(0)
    return node_ranks(
        page.load("node_first_rank"), page.load("node_rank_count"), rank=row.rank, world_size=row.world_size
    )


async def check_references(
    job: Job, session: Session, snapshot: SnapshotId, chunks: Sequence[Chunk], layout_nbytes: int
) -> None:
    """Before a shard is recorded: what it leaves to others, and they to it, must be there.

    Raises:
        RemoteProtocolError: kind `replicas`: one leaves a tensor to another that does not keep it (their structures
            have come to differ); sharing is over.
    """
    ranks = ranks_beside(session)
    if not ranks:
        return
    known, layout_chunks = job.replicas.known, chunks[: -(-layout_nbytes // job.chunk_bytes)]
    try:
        mine = await _learn(job, session.rank, layout_chunks, layout_nbytes)
        while new := [record for record in _others(job, snapshot, ranks) if _key(record) not in known]:
            await _learn(job, new[0].rank, new[0].chunks[: new[0].layout_chunk_count], new[0].layout_nbytes)
    except IntegrityError as error:
        raise RemoteProtocolError(error.message, kind="layout") from error
    together = frozenset((mine, *(_key(record) for record in _others(job, snapshot, ranks))))
    if together in job.replicas.resolved:
        return
    difference = unresolved({key[0]: known[key] for key in together})
    if difference is not None:
        _refuse(job, snapshot, difference)
        raise RemoteProtocolError(f"tensor {difference.tensor}: {difference.what}", kind="replicas")
    job.replicas.resolved.add(together)


def _others(job: Job, snapshot: SnapshotId, ranks: range) -> list[ShardRecord]:
    """The shards of these ranks that are recorded already."""
    facts = job.ledger.snapshots.get(snapshot)
    return [shard.record for rank, shard in facts.shards.items() if rank in ranks] if facts else []


def compare_if_due(job: Job, session: Session, snapshot: SnapshotId) -> None:
    """After a shard was recorded: if it was the last full one of its node, compare them, beside everything else."""
    facts, state = job.ledger.snapshots.get(snapshot), job.replicas
    ranks = ranks_beside(session)
    if not ranks or facts is None or facts.problem or state.is_comparing:
        return
    if any(rank not in facts.shards for rank in ranks) or session.page.load(WORD) == REPLICAS_DIFFER:
        return
    records = {rank: facts.shards[rank].record for rank in ranks}
    keys = {rank: _key(record) for rank, record in records.items()}
    if any(key not in state.known for key in keys.values()):
        return
    shards = {rank: state.known[key] for rank, key in keys.items()}
    if not all(shard.is_full for shard in shards.values()) or not any(
        shard.peers.intersection(ranks) for shard in shards.values()
    ):
        return
    state.is_comparing = True
    job.ledger.hold(snapshot)
    job.context.spawn(_compare(job, snapshot, records, shards), f"compare {job.name}")


# --- the comparison ---------------------------------------------------------------------------------------------
async def _compare(
    job: Job, snapshot: SnapshotId, records: Mapping[int, ShardRecord], shards: Mapping[int, ShardReplicas]
) -> None:
    started_s = job.context.environment.monotonic_s()
    try:
        difference = await _find_difference(job, records, shards)
    finally:
        job.replicas.is_comparing = False
        job.ledger.unhold(snapshot)
    if job.is_removed:
        return
    if difference is not None:
        _refuse(job, snapshot, difference)
    else:
        _allow(job, snapshot)
        job.context.log.debug(
            "replicas.equal",
            job=job.name,
            generation=snapshot.generation,
            step=snapshot.step,
            ranks=list(records),
            took_s=round(job.context.environment.monotonic_s() - started_s, 4),
        )
    job.settle()


async def _find_difference(
    job: Job, records: Mapping[int, ShardRecord], shards: Mapping[int, ShardReplicas]
) -> Difference | None:
    loop, threads = asyncio.get_running_loop(), job.context.hashing
    difference = await loop.run_in_executor(threads, unlike, shards)
    if difference is not None:
        return difference
    work = _work(records, shards)
    while True:
        try:
            turn = await loop.run_in_executor(threads, _take_turn, work)
        except IntegrityError as error:
            first, second = sorted(records)[:2]
            return Difference(str(error.context.get("tensor", "")), (first, second), error.message)
        if not turn or job.is_removed:
            return None
        for (one, other), found in turn.items():
            memories = job.arena(one).memory, job.arena(other).memory
            compared = [piece for _, piece in found]
            differing = await loop.run_in_executor(threads, differing_pieces, *memories, compared)
            if differing:
                return Difference(found[differing[0]][0].name, (one, other), "other bytes")


def _work(
    records: Mapping[int, ShardRecord], shards: Mapping[int, ShardReplicas]
) -> Iterator[tuple[Pair, Piece]]:
    for pair in pairs(shards):
        for piece in pieces(pair, records[pair.ranks[0]], records[pair.ranks[1]]):
            yield pair, piece


def _take_turn(work: Iterator[tuple[Pair, Piece]]) -> dict[tuple[int, int], list[tuple[Pair, Piece]]]:
    """The next pieces, by the ranks that they belong to; none at the end."""
    turn: dict[tuple[int, int], list[tuple[Pair, Piece]]] = {}
    nbytes = count = 0
    while nbytes < TURN_BYTES and count < TURN_PIECES:
        found = next(work, None)
        if found is None:
            break
        turn.setdefault(found[0].ranks, []).append(found)
        nbytes, count = nbytes + found[1].nbytes, count + 1
    return turn


# --- what the trainers are told ---------------------------------------------------------------------------------
def _allow(job: Job, snapshot: SnapshotId) -> None:
    for session in job.served_sessions():
        if session.generation == snapshot.generation:
            word = session.page.load(WORD)
            if word <= snapshot.step:
                session.page.store(WORD, snapshot.step + 1)


def _refuse(job: Job, snapshot: SnapshotId, difference: Difference) -> None:
    """Every rank captures all that it has from now on, for as long as this start of the world lives."""
    for session in job.served_sessions():
        if session.generation == snapshot.generation:
            session.page.store(WORD, REPLICAS_DIFFER)
    job.replicas.difference = str(difference)
    job.context.metrics.replica_differences.inc()
    job.context.log.warning(
        "replicas.differ",
        job=job.name,
        generation=snapshot.generation,
        step=snapshot.step,
        tensor=difference.tensor,
        ranks=list(difference.ranks),
        reason=difference.what,
    )


def begin_anew(session: Session) -> None:
    """Another generation, or another daemon: nothing has been compared. That replicas differ is not forgotten."""
    if session.page.load(WORD) != REPLICAS_DIFFER:
        session.page.store(WORD, 0)
