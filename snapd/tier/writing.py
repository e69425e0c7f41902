"""Chunks of captured shards into packs of a tier: what is not there yet, in a fixed order, a few packs at a time.

A pack is cut by raw size, before anything is encoded: which chunk goes to which pack follows from the shards and from
what is known alone. Each pack is one thread's work from its first byte to its last: it looks at a chunk in the arena,
checks its digest, encodes it, and hands it to the store's upload; raw chunks are handed over as they lie in the arena.
So no more is held than one encoded batch for each thread, whatever the size of the state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field

import xxhash
from google.protobuf.message import DecodeError
from snapd_proto import format_pb2

from snapd.codec.compress import ChunkEncoder, EncodedChunk, Mode
from snapd.codec.paying import Paying
from snapd.core.manifest import ShardRecord
from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.errors import IntegrityError
from snapd.memory.segments import SegmentSet
from snapd.peer.deadline import Deadline
from snapd.peer.rate import Pacer
from snapd.store.base import Buffer, Store, Upload
from snapd.tier.known_chunks import ChunkName, KnownChunks
from snapd.tier.packs import PACK_BYTES_AIM, PackBuilder
from snapd.tier.widths import MIXED, element_widths
from snapd.units import MIB

BATCH_BYTES = 8 * MIB  # handed to the store at once, and charged to the rate at once
_PACE_S = 0.5


class Stopped(Exception):
    """The work was called off. Never leaves the runtime."""


@dataclass(frozen=True, slots=True)
class ShardBytes:
    """A captured shard: its record, and its rank's memory, which must not go while this is used."""

    record: ShardRecord
    memory: SegmentSet

    def layout(self) -> bytes:
        """The serialized layout at the shard's beginning; a copy."""
        chunks = self.record.chunks[: self.record.layout_chunk_count]
        pieces = [bytes(self.memory.view(chunk.place, chunk.nbytes)) for chunk in chunks]
        return b"".join(pieces)[: self.record.layout_nbytes]

    def widths(self) -> Sequence[int]:
        """Bytes of an element, for each chunk. Of a layout that does not parse nothing is known."""
        try:
            layout = format_pb2.ShardLayout.FromString(self.layout())
        except DecodeError:
            return [MIXED] * len(self.record.chunks)
        return element_widths(layout, len(self.record.chunks))


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """Chunk `index` of shard number `shard` of those that are written."""

    shard: int
    index: int


@dataclass(slots=True)
class PackPlan:
    """What a pack will hold. `raw_nbytes`: before encoding."""

    number: int
    chunks: list[PlannedChunk] = field(default_factory=list)
    raw_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class WritePlan:
    """`last_pack`: for each shard the place in `packs` of the last pack that it needs; -1: none."""

    packs: tuple[PackPlan, ...]
    last_pack: tuple[int, ...]
    reused_nbytes: int


def plan_packs(
    records: Sequence[ShardRecord],
    known: KnownChunks,
    *,
    first_number: int,
    pack_nbytes: int = PACK_BYTES_AIM,
) -> WritePlan:
    """Cut what is not known into packs, each chunk once. The same shards and the same knowledge give the same plan."""
    packs: list[PackPlan] = []
    planned: dict[ChunkName, int] = {}
    last_pack: list[int] = []
    reused_nbytes = 0
    for shard, record in enumerate(records):
        needed = -1
        for index, chunk in enumerate(record.chunks):
            name = (chunk.digest, chunk.nbytes)
            if known.find(*name) is not None or name in planned:
                reused_nbytes += chunk.nbytes
                needed = max(needed, planned.get(name, -1))
                continue
            if not packs or packs[-1].raw_nbytes + chunk.nbytes > pack_nbytes:
                packs.append(PackPlan(first_number + len(packs)))
            packs[-1].chunks.append(PlannedChunk(shard, index))
            packs[-1].raw_nbytes += chunk.nbytes
            needed = planned[name] = len(packs) - 1
        last_pack.append(needed)
    return WritePlan(tuple(packs), tuple(last_pack), reused_nbytes)


@dataclass(slots=True)
class WriteCounts:
    """What was done, for metrics and for people. Written under the writer's lock."""

    raw_nbytes: int = 0
    stored_nbytes: int = 0
    packs: int = 0
    chunks: int = 0


class Compressing:
    """The encoder of a store, and whether `auto` compresses now: only while that does not slow this store's flush
    down, by what was measured of both. Thread-safe; shared by all jobs that write there.
    """

    def __init__(self, mode: Mode) -> None:
        self._encoder = ChunkEncoder(mode)
        self._paying = Paying()
        self._lock = threading.Lock()

    @property
    def mode(self) -> Mode:
        return self._encoder.mode

    def decide(self) -> tuple[bool, str]:
        """(compress the next pack?, why)."""
        if self.mode is not Mode.AUTO:
            return self.mode is Mode.ALWAYS, f"tier.compression = {self.mode.value}"
        with self._lock:
            return self._paying.decide()

    def encode(self, view: memoryview, width: int, *, is_allowed: bool) -> EncodedChunk:
        return self._encoder.encode(view, width, is_allowed=is_allowed)

    def note_pack(self, raw_nbytes: int, seconds: float, *, is_compressed: bool) -> None:
        """One of the packers had a pack in the store after so long; the others worked beside it."""
        with self._lock:
            self._paying.note(raw_nbytes, seconds, is_compressed=is_compressed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteMeans:
    """`packers`: threads of low priority; `packers_max`: how many packs at once. `point`: named moments, for tests.
    `pacer`: raw bytes a second; None: as fast as it goes.
    """

    store: Store
    packers: Executor
    packers_max: int
    compressing: Compressing
    pacer: Pacer | None
    monotonic_s: Callable[[], float]
    point: Callable[[str], None]


class PackWriter:
    """Writes the packs of one attempt. `stop` ends it between two batches. `beat` is called every `beat_s` by the
    thread that waits for the packs, however long one takes: what it raises ends the attempt.
    """

    def __init__(
        self,
        means: WriteMeans,
        keys: TierKeys,
        write_id: str,
        shards: Sequence[ShardBytes],
        stop: threading.Event,
        *,
        beat: Callable[[], None],
        beat_s: float,
    ) -> None:
        self.counts = WriteCounts()
        self._means, self._keys, self._write_id, self._shards = means, keys, write_id, shards
        self._stop, self._beat, self._beat_s = stop, beat, beat_s
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._widths: dict[int, Sequence[int]] = {}

    def write(self, packs: Sequence[PackPlan]) -> Generator[tuple[StoredChunk, ...], None, None]:
        """Write the packs, a few at once; gives the chunks of each, in the order of the packs, once it is durable.

        Raises:
            IntegrityError: kind `chunk_digest`: memory does not have the bytes that were recorded. Stopped.
            What a store raises. Whatever leaves here, no upload is under way any more.
        """
        under_way: list[Future[tuple[StoredChunk, ...]]] = []
        left = iter(packs)
        try:
            while True:
                while len(under_way) < self._means.packers_max and (pack := next(left, None)) is not None:
                    under_way.append(self._means.packers.submit(self._write_pack, pack))
                if not under_way:
                    return
                while under_way[0] not in wait(under_way[:1], self._beat_s).done:
                    self._beat()
                done = under_way.pop(0).result()
                yield done
        finally:
            self._failed.set()
            for future in under_way:
                if not future.cancel():
                    future.exception()  # it ends at its next batch; its error is not the first

    def _check_stop(self) -> None:
        if self._stop.is_set() or self._failed.is_set():
            raise Stopped

    def _write_pack(self, plan: PackPlan) -> tuple[StoredChunk, ...]:
        self._check_stop()
        means, builder = self._means, PackBuilder(pack_name(self._write_id, plan.number))
        is_compressed, _ = means.compressing.decide()
        means.point("daemon.flush.pack.before")
        began_s = means.monotonic_s()
        upload = means.store.upload(self._keys.pack(builder.name))
        try:
            upload.write([builder.header()])
            stored: list[StoredChunk] = []
            for batch in self._batches(plan):
                stored.extend(self._write_batch(builder, upload, batch, is_compressed))
            upload.write([builder.footer()])
            self._check_stop()
            upload.commit()
        except BaseException:
            upload.abort()
            raise
        seconds = means.monotonic_s() - began_s
        means.compressing.note_pack(plan.raw_nbytes, seconds, is_compressed=is_compressed)
        with self._lock:
            self.counts.packs += 1
            self.counts.chunks += len(stored)
            self.counts.raw_nbytes += plan.raw_nbytes
            self.counts.stored_nbytes += sum(chunk.stored_nbytes for chunk in stored)
        means.point("daemon.flush.pack.after")
        return tuple(stored)

    def _batches(self, plan: PackPlan) -> Iterator[list[PlannedChunk]]:
        batch: list[PlannedChunk] = []
        nbytes = 0
        for planned in plan.chunks:
            chunk = self._shards[planned.shard].record.chunks[planned.index]
            if batch and nbytes + chunk.nbytes > BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append(planned)
            nbytes += chunk.nbytes
        if batch:
            yield batch

    def _write_batch(
        self, builder: PackBuilder, upload: Upload, batch: Sequence[PlannedChunk], is_compressed: bool
    ) -> list[StoredChunk]:
        self._check_stop()
        self._wait_for_rate(sum(self._shards[p.shard].record.chunks[p.index].nbytes for p in batch))
        buffers: list[Buffer] = []
        stored: list[StoredChunk] = []
        with contextlib.ExitStack() as views:
            for planned in batch:
                shard = self._shards[planned.shard]
                chunk = shard.record.chunks[planned.index]
                view = views.enter_context(shard.memory.view(chunk.place, chunk.nbytes))
                if xxhash.xxh3_128_digest(view) != chunk.digest:
                    raise _bad_chunk(shard.record, planned.index)
                width = self._width(planned) if is_compressed else MIXED
                encoded = self._means.compressing.encode(view, width, is_allowed=is_compressed)
                buffers.append(encoded.buffer)
                stored.append(
                    builder.add(
                        nbytes=chunk.nbytes,
                        digest=chunk.digest,
                        stored_nbytes=memoryview(encoded.buffer).nbytes,
                        encoding=encoded.encoding,
                        element_nbytes=encoded.element_nbytes,
                    )
                )
                del encoded
            upload.write(buffers)
            buffers.clear()
        return stored

    def _width(self, planned: PlannedChunk) -> int:
        with self._lock:
            if planned.shard not in self._widths:
                self._widths[planned.shard] = self._shards[planned.shard].widths()
            return self._widths[planned.shard][planned.index]

    def _wait_for_rate(self, nbytes: int) -> None:
        pacer = self._means.pacer
        while pacer is not None:
            with contextlib.suppress(TimeoutError):
                pacer.wait_take(nbytes, Deadline(self._means.monotonic_s, _PACE_S))
                return
            self._check_stop()


def _bad_chunk(record: ShardRecord, index: int) -> IntegrityError:
    return IntegrityError(
        f"rank {record.rank} chunk {index} of {record.id}: memory does not have the bytes that were recorded",
        kind="chunk_digest",
        job=record.job,
        rank=record.rank,
        chunk=index,
    )
