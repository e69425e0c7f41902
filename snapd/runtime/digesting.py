"""From a lane's checked table to chunks with digests: hash what is new, find what the shard before has too.

Each thread that there is takes a chunk at a time, so that one which shares its core with training holds up the others
by no more than that: the window until `captured` is the copy plus this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError
from snapd_proto import format_pb2

from snapd.core.ids import Place
from snapd.core.lanes import ChunkSource
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import RemoteProtocolError
from snapd.memory.hashing import differing_pairs, hash_digests, hash_frame
from snapd.memory.segments import SegmentSet
from snapd.runtime.hash_threads import settle_down


@dataclass(frozen=True, slots=True)
class Digested:
    """Chunks with their final places: the lane's own frames, and those that an earlier shard has too."""

    chunks: tuple[Chunk, ...]
    own: list[Place]
    shared: list[Place]
    digest: bytes


@dataclass(frozen=True, slots=True)
class ExpectedLayout:
    """What the layout at the beginning of the shard must say of itself, and its size."""

    job: str
    rank: int
    world_size: int
    chunk_bytes: int
    nbytes: int

    @property
    def chunk_count(self) -> int:
        return -(-self.nbytes // self.chunk_bytes)


async def digest_shard(
    threads: Executor,
    memory: SegmentSet,
    sources: Sequence[ChunkSource],
    *,
    own: ShardRecord | None,
    base: ShardRecord | None,
    expected: ExpectedLayout,
    hash_workers: int,
    trainers: int,
) -> Digested:
    """Hash, on up to `hash_workers` of the threads, and share. `trainers`: how many of the job live on this node.

    `own`: what reused chunks refer to. `base`: the newest captured shard of the rank; a chunk that equals its chunk at
    the same index, by hash and then byte by byte, is shared with it.

    Raises:
        RemoteProtocolError: kind `layout`: the layout does not parse or is another shard's.
    """
    loop = asyncio.get_running_loop()
    fresh = [
        (index, source.place, source.nbytes) for index, source in enumerate(sources) if not source.is_reused
    ]
    left, digests = deque(fresh), dict[int, bytes]()
    workers = min(hash_workers, len(fresh))
    await asyncio.gather(
        *(loop.run_in_executor(threads, _hash_left, memory, left, digests, trainers) for _ in range(workers))
    )
    return await loop.run_in_executor(threads, _assemble, memory, sources, digests, own, base, expected)


def _hash_left(
    memory: SegmentSet, left: deque[tuple[int, Place, int]], digests: dict[int, bytes], trainers: int
) -> None:
    """In a hashing thread: one chunk after the other, as long as there are any that no other thread has taken."""
    settle_down(trainers)
    while True:
        try:
            index, place, nbytes = left.popleft()
        except IndexError:
            return
        digests[index] = hash_frame(memory, place, nbytes)


def _assemble(
    memory: SegmentSet,
    sources: Sequence[ChunkSource],
    digests: dict[int, bytes],
    own: ShardRecord | None,
    base: ShardRecord | None,
    expected: ExpectedLayout,
) -> Digested:
    equal = _equal_to(base, memory, sources, digests) if base is not None else set[int]()
    chunks: list[Chunk] = []
    own_places: list[Place] = []
    shared: list[Place] = []
    for index, source in enumerate(sources):
        earlier = own if source.is_reused else base if index in equal else None
        if earlier is not None:
            chunks.append(_shared_chunk(earlier, index))
            shared.append(chunks[-1].place)
        else:
            chunks.append(Chunk(source.nbytes, digests[index], source.place))
            own_places.append(source.place)
    is_known_layout = all(sources[index].is_reused or index in equal for index in range(expected.chunk_count))
    if not is_known_layout:
        _check_layout(memory, chunks[: expected.chunk_count], expected)
    return Digested(tuple(chunks), own_places, shared, hash_digests([chunk.digest for chunk in chunks]))


def _equal_to(
    base: ShardRecord, memory: SegmentSet, sources: Sequence[ChunkSource], digests: dict[int, bytes]
) -> set[int]:
    hits = [
        index
        for index, digest in digests.items()
        if index < len(base.chunks)
        and base.chunks[index].digest == digest
        and base.chunks[index].nbytes == sources[index].nbytes
    ]
    pairs = [(base.chunks[index].place, sources[index].place, sources[index].nbytes) for index in hits]
    unequal = differing_pairs(memory, pairs)
    return {index for number, index in enumerate(hits) if number not in unequal}


def _shared_chunk(record: ShardRecord, index: int) -> Chunk:
    """A chunk of an earlier shard, for a later one: it remembers since when its bytes are stored."""
    chunk = record.chunks[index]
    return chunk if chunk.since is not None else replace(chunk, since=record.id)


def read_layout(memory: SegmentSet, chunks: Sequence[Chunk], layout_nbytes: int) -> format_pb2.ShardLayout:
    """Parse the layout at the beginning of a shard; `layout_nbytes` was checked against its bound.

    Raises:
        DecodeError: it is not one.
    """
    data = b"".join(bytes(memory.view(chunk.place, chunk.nbytes)) for chunk in chunks)
    return format_pb2.ShardLayout.FromString(data[:layout_nbytes])


def _check_layout(memory: SegmentSet, chunks: Sequence[Chunk], expected: ExpectedLayout) -> None:
    try:
        layout = read_layout(memory, chunks, expected.nbytes)
    except DecodeError as error:
        raise RemoteProtocolError("the layout does not parse", kind="layout") from error
    for name in ("job", "rank", "world_size", "chunk_bytes"):
        if getattr(layout, name) != getattr(expected, name):
            raise RemoteProtocolError("the layout is of another shard", kind="layout", field=name)
