"""Bringing a shard from a tier into this node's arena: as `recovering.py` does from other nodes.

Chunks that captured shards here hold already are used again, by their hashes; the others are read, decompressed and
verified straight into frames that nobody else has. A kill before the record is written leaves free frames, and a hint
where in them chunks may lie that had arrived (`arriving.py`): those are not read again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

from snapd.core.ids import Place
from snapd.core.manifest import ShardRecord
from snapd.core.stored import StoredShard
from snapd.core.words import listed
from snapd.runtime.arena_writing import ArenaWriter, bad_reused
from snapd.runtime.job import Job
from snapd.tier.manifests import record_from_shard
from snapd.tier.reading import TierReader
from snapd.tier.streaming import Fault, Miss

_NOWHERE = Place(0, 0)
Progress = Callable[[int], None]  # bytes that are at their place; from any thread


class Lacking(Exception):
    """Some chunks did not come. Never leaves the runtime."""

    def __init__(self, misses: Sequence[Miss]) -> None:
        super().__init__()
        self.misses = misses

    @property
    def is_away(self) -> bool:
        """The store was not to be asked, or the work was called off: nothing is proved."""
        return any(miss.fault in (Fault.AWAY, Fault.STOPPED) for miss in self.misses)

    @property
    def reason(self) -> str:
        return listed([f"chunk {miss.index}: {miss.what}" for miss in self.misses], shown=4, separator="; ")


def record_to_bring(shard: StoredShard) -> ShardRecord:
    """The record of a stored shard before its chunks have places."""
    return record_from_shard(shard, [_NOWHERE] * len(shard.chunks))


async def bring_stored(
    job: Job,
    reader: TierReader,
    shard: StoredShard,
    threads: Executor,
    *,
    refused: Sequence[Place] = (),
    progress: Progress = lambda nbytes: None,
) -> ShardRecord:
    """The shard, in the index and the ledger, verified; its snapshot is held once more: the caller calls
    `job.ledger.unhold`. One that is here is replaced. `threads`: for one blocking call. `refused`: frames that are
    known to be bad.

    Raises:
        Lacking: chunks did not come. CapacityError: it does not fit. ConflictError: kind `chunk_bytes`.
    """
    loop, started_s = asyncio.get_running_loop(), job.context.environment.monotonic_s()
    writer = await _open_writer(job, record_to_bring(shard), threads, refused)
    stop = threading.Event()
    try:
        wanted = writer.missing
        progress(sum(shard.chunks[index].nbytes for index in {*writer.reused, *writer.arrived}))
        read = partial(
            reader.read, shard, wanted, writer.view, done=lambda _, view: progress(view.nbytes), stop=stop
        )
        misses = await _to_its_end(loop.run_in_executor(threads, read), stop)
        if misses:
            raise Lacking(misses)
        reused_count, arrived_count = len(writer.reused), len(writer.arrived)
        record = writer.commit()
        job.ledger.hold(shard.id)
    finally:
        writer.close()
    job.context.log.info(
        "shard.brought",
        job=job.name,
        generation=shard.id.generation,
        step=shard.id.step,
        rank=shard.rank,
        nbytes=record.nbytes,
        reused_chunks=reused_count,
        arrived_chunks=arrived_count,
        fetched_bytes=sum(shard.chunks[index].stored_nbytes for index in wanted),
        origins=reader.store.description,
        seconds=round(job.context.environment.monotonic_s() - started_s, 3),
    )
    job.changes.notify()
    return record


async def _to_its_end(work: asyncio.Future[list[Miss]], stop: threading.Event) -> list[Miss]:
    """Its threads write into frames of ours: it ends before we do, also when we are cancelled."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        raise


async def _open_writer(
    job: Job, record: ShardRecord, threads: Executor, refused: Sequence[Place]
) -> ArenaWriter:
    """Frames for all chunks; what captured shards here hold already was hashed."""
    loop, bad = asyncio.get_running_loop(), set(refused)
    while True:
        writer = await ArenaWriter.open(job, record, refused=bad)
        try:
            found = await loop.run_in_executor(
                threads, bad_reused, writer.arena.memory, record, writer.reused
            )
            if not found:
                await loop.run_in_executor(threads, writer.check_arrived)
        except BaseException:
            writer.close()
            raise
        if not found:
            return writer
        writer.close()
        bad |= found
