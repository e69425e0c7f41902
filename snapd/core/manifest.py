"""What a captured shard consists of, as plain data: the core's view of format.proto's ShardRecord."""

from __future__ import annotations

from dataclasses import dataclass

from snapd.core.ids import Place, SnapshotId


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: its bytes' identity, and where they lie in the segments of its own (job, rank)."""

    nbytes: int
    digest: bytes  # XXH3-128, 16 bytes
    place: Place
    since: SnapshotId | None = (
        None  # first stored for that snapshot and shared ever since; None: for this one
    )


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One rank's part of a snapshot. It exists from the moment that its record is committed to the index."""

    job: str
    id: SnapshotId
    rank: int
    world_size: int
    chunk_bytes: int
    layout_nbytes: int
    early_values_offset: int
    early_values_nbytes: int
    chunks: tuple[Chunk, ...]
    parent: SnapshotId | None
    captured_wall_time_s: float
    digest: bytes  # XXH3-128 of the chunks' digests in order

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def places(self) -> list[Place]:
        return [chunk.place for chunk in self.chunks]

    @property
    def layout_chunk_count(self) -> int:
        return -(-self.layout_nbytes // self.chunk_bytes)
