"""What a node keeps beside its daemon: the arena and its index, the control pages, the highwater mark.

It outlives a killed daemon and dies with the machine. Bytes are symbolic: a chunk's content is its digest, unless
something damaged it; a parity fragment is its number and the contents that it was coded from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.membership import Highwater
from snapd.core.protection import PlacedRecord, RowMap
from snapd.core.reports import Told

JOB = "job"
CHUNK_BYTES = 64
NO_PLACE = Place(0, 0)
Content = bytes
Parity = tuple[int, tuple[Content, ...]]
ShardKey = tuple[SnapshotId, int]
FragmentKey = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class HandOver:
    """A lane that a trainer has completed."""

    id: SnapshotId
    sequence: int
    contents: tuple[Content, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class StoredShard:
    record: ShardRecord
    contents: tuple[Content, ...]
    sequence: int


@dataclass(slots=True)
class Session:
    """A trainer's session with its control page. `is_gone`: its process is dead. `lanes`: complete, not taken up."""

    rank: int
    generation: int
    incarnation: str
    world_size: int
    slots: int
    is_gone: bool = False
    is_fenced: bool = False
    is_capturing: bool = False
    step_seen: int = -1
    skipped: int = 0
    skipped_step: int = -1
    skipped_taken: int = 0
    interval_steps: int = 0
    interval_from: int = 0
    lanes: list[HandOver] = field(default_factory=list)

    @property
    def is_served(self) -> bool:
        return not self.is_gone and not self.is_fenced


@dataclass(slots=True)
class Disk:
    """`arena_id` is new whenever it began empty."""

    arena_id: str
    highwater: Highwater = field(default_factory=Highwater)
    shards: dict[ShardKey, StoredShard] = field(default_factory=dict)
    problems: dict[SnapshotId, str] = field(default_factory=dict)
    maps: dict[tuple[SnapshotId, int], tuple[RowMap, tuple[PlacedRecord, ...]]] = field(default_factory=dict)
    fragments: dict[FragmentKey, Parity] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    told: Told = field(default_factory=Told)


def content(*parts: object) -> Content:
    """What a trainer's chunk holds, as 12 bytes that nothing else holds."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).digest()


def make_record(
    snapshot: SnapshotId,
    rank: int,
    world_size: int,
    contents: Sequence[Content],
    base: ShardRecord | None,
    at_s: float,
) -> ShardRecord:
    """The record of a shard; chunks equal to those of `base` are shared with it."""
    chunks = []
    for index, body in enumerate(contents):
        since = None
        if base is not None and index < len(base.chunks) and base.chunks[index].digest == body:
            since = base.chunks[index].since or base.id
        chunks.append(Chunk(CHUNK_BYTES, body, NO_PLACE, since))
    return ShardRecord(
        job=JOB,
        id=snapshot,
        rank=rank,
        world_size=world_size,
        chunk_bytes=CHUNK_BYTES,
        layout_nbytes=0,
        early_values_offset=0,
        early_values_nbytes=0,
        chunks=tuple(chunks),
        parent=None,
        captured_wall_time_s=at_s,
        digest=content("shard", *contents),
    )


def encode(bodies: Sequence[Content], number: int) -> Parity:
    return (number, tuple(bodies))


def decode(
    code: Code, data: dict[int, Content], parity: Iterable[Parity], count: int, wanted: int
) -> Content | None:
    """Data fragment `wanted` of a row of `count` chunks from at least k fragments; None: too few. Fragments that do
    not belong together give bytes that nobody wrote.
    """
    fragments = list(parity)
    if len(data) + (code.k - count) + len(fragments) < code.k:
        return None
    bodies = fragments[0][1]
    fits = all(other[1] == bodies for other in fragments) and len(bodies) == count
    if fits and all(bodies[number] == body for number, body in data.items()):
        return bodies[wanted]
    return content("nonsense", *bodies, *sorted(data.items()))
