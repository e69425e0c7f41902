"""What a flush needs, without a daemon: shards in plain memory, a writer over any store."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import xxhash
from snapd_proto import format_pb2

from snapd.codec.compress import Mode
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.memory.hashing import hash_digests
from snapd.peer.rate import Pacer
from snapd.store.base import Store
from snapd.tier.flush import Flushed, FlushMeans, Stage, TierWriter
from snapd.tier.writing import Compressing, ShardBytes, WriteMeans

CHUNK = 64 << 10


@dataclass
class PlainMemory:
    """As memory.SegmentSet, for reading."""

    frames: list[bytearray] = field(default_factory=list)

    def view(self, place: Place, nbytes: int) -> memoryview:
        return memoryview(self.frames[place.frame])[:nbytes]


def shard(
    contents: Sequence[bytes], *, step: int = 1, rank: int = 0, world_size: int = 1, job: str = "a"
) -> ShardBytes:
    """A captured shard of these chunks, behind a layout."""
    layout = format_pb2.ShardLayout(
        format_version=1, job=job, rank=rank, world_size=world_size, chunk_bytes=CHUNK
    ).SerializeToString()
    memory = PlainMemory([bytearray(data) for data in (layout, *contents)])
    chunks = tuple(
        Chunk(len(frame), xxhash.xxh3_128_digest(frame), Place(0, index))
        for index, frame in enumerate(memory.frames)
    )
    record = ShardRecord(
        job=job,
        id=SnapshotId(1, step),
        rank=rank,
        world_size=world_size,
        chunk_bytes=CHUNK,
        layout_nbytes=len(layout),
        early_values_offset=CHUNK,
        early_values_nbytes=0,
        chunks=chunks,
        parent=None,
        captured_wall_time_s=1.0,
        digest=hash_digests([chunk.digest for chunk in chunks]),
    )
    return ShardBytes(record, memory)  # type: ignore[arg-type]


def contents_of(step: int, *, rank: int = 0, changed: int = 4, frozen: int = 2) -> list[bytes]:
    """Some chunks that every step has anew, and some that all steps and ranks share."""
    fresh = [random.Random(f"{step}/{rank}/{index}").randbytes(CHUNK) for index in range(changed)]
    return fresh + [random.Random(f"frozen/{index}").randbytes(CHUNK) for index in range(frozen)]


class Clock:
    """Real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Writers:
    """Makes writers over a store. Close it."""

    def __init__(self, *, mode: Mode = Mode.OFF, packers: int = 1, rate: float | None = None) -> None:
        self.clock = Clock()
        self.points: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}
        self._threads = ThreadPoolExecutor(packers)
        self._packers, self._mode, self._rate = packers, mode, rate

    def point(self, name: str) -> None:
        self.points.append(name)
        strike = self.at.pop(name, None)
        if strike is not None:
            strike()

    def make(
        self, store: Store, job: str = "a", *, node: str = "", ttl_s: float = 3600.0, round_s: float = 3600.0
    ) -> TierWriter:
        write = WriteMeans(
            store=store,
            packers=self._threads,
            packers_max=self._packers,
            compressing=Compressing(self._mode),
            pacer=Pacer(self.clock, self._rate, CHUNK) if self._rate else None,
            monotonic_s=self.clock,
            point=self.point,
        )
        means = FlushMeans(
            write=write,
            ttl_s=ttl_s,
            round_s=round_s,
            wall_s=time.time,
            random_token=lambda: secrets.token_hex(16),
        )
        return TierWriter(means, job, node or secrets.token_hex(8))

    def close(self) -> None:
        self._threads.shutdown()


def flush(
    writer: TierWriter,
    shards: Sequence[ShardBytes],
    *,
    world_size: int = 1,
    stop: threading.Event | None = None,
    stage: Stage | None = None,
) -> Flushed:
    """Flush these shards of one snapshot."""
    return writer.flush(
        shards[0].record.id, world_size, shards, stop=stop or threading.Event(), stage=stage or Stage()
    )
