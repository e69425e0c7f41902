"""What a trainer handed over in a lane, checked before a byte of it is looked at.

The page is shared memory that the trainer writes, so nothing in it is believed: every place must be a frame
that the daemon granted to this very lane (its own notes say which, not the page's), or be marked as reused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from snapd.core.ids import STEP_MAX, Place
from snapd.core.manifest import ShardRecord
from snapd.errors import RemoteProtocolError

REUSED = 1
LAYOUT_BYTES_MAX = 256 << 20
DISCARD_REASONS = {1: "counter", 2: "sample", 3: "address", 4: "full audit", 5: "error", 6: "closed"}


@dataclass(frozen=True, slots=True)
class HandOver:
    """The fields of a COMPLETE lane as read from the page."""

    sequence: int
    generation: int
    step: int
    layout_nbytes: int
    early_values_offset: int
    early_values_nbytes: int
    handed_over_ns: int
    copied_ns: int
    segments: Sequence[int]
    frames: Sequence[int]
    nbytes: Sequence[int]
    flags: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChunkSource:
    """Where chunk number i of the shard lies. A reused one lies where the base shard has it."""

    place: Place
    nbytes: int
    is_reused: bool


def grantable_lanes(slots: int, *, taken: int, held: int, is_restoring: bool) -> int:
    """How many more lanes of a session may be granted.

    Room for one shard stays free until there is one, as in every moment after: what a restore brings from other nodes
    or from a tier lies there, so that the slots are all that a job ever needs. While it may still restore, one more
    stays free if there are three: an older snapshot may be here, which is kept until the newer one has come.

    Args:
        slots: shards that fit.
        taken: lanes that have frames.
        held: shards that are here, from the newest complete one on.
        is_restoring: no shard of this start of the world is here, nor is its restore over.
    """
    if slots - held - taken <= 0:
        return 0
    if slots == 1:
        return 1
    kept = max(held, 1) + (1 if is_restoring and slots > 2 else 0)
    return max(slots - kept - taken, 0 if taken else 1)


def check_hand_over(
    lane: HandOver,
    *,
    chunk_bytes: int,
    generation: int,
    granted: Collection[Place],
    base: ShardRecord | None,
    is_known: bool,
) -> list[ChunkSource]:
    """Return the shard's chunks in order, or refuse the lane.

    `granted`: what this lane was granted. `base`: the newest captured shard of the same session; reused
    entries refer to by their index. `is_known`: this generation, step and rank was captured before.

    Raises:
        RemoteProtocolError: kind `lane`; the message says what is wrong.
    """
    if lane.generation != generation:
        raise _refused(
            "the lane is of another generation", lane, lane_generation=lane.generation, generation=generation
        )
    if max(lane.step, lane.sequence) > STEP_MAX:
        raise _refused("the step or the sequence is out of range", lane)
    if is_known:
        raise _refused("this step was captured before", lane)
    count = len(lane.nbytes)
    if count == 0:
        raise _refused("the lane has no entries", lane)
    if not 0 < lane.layout_nbytes <= min(LAYOUT_BYTES_MAX, count * chunk_bytes):
        raise _refused("the layout's size is out of range", lane, layout_nbytes=lane.layout_nbytes)
    early_end = lane.early_values_offset + lane.early_values_nbytes
    layout_end = -(-lane.layout_nbytes // chunk_bytes) * chunk_bytes
    if not layout_end <= lane.early_values_offset or early_end > count * chunk_bytes:
        raise _refused(
            "the early values are out of range", lane, early_values_offset=lane.early_values_offset
        )
    allowed, used = set(granted), set[Place]()
    sources: list[ChunkSource] = []
    for index in range(count):
        source = _checked_entry(lane, index, chunk_bytes, base)
        if not source.is_reused:
            if source.place not in allowed:
                raise _refused("an entry names a frame that was not granted to the lane", lane, index=index)
            if source.place in used:
                raise _refused("two entries name one frame", lane, index=index)
            used.add(source.place)
        sources.append(source)
    return sources


def _checked_entry(lane: HandOver, index: int, chunk_bytes: int, base: ShardRecord | None) -> ChunkSource:
    nbytes, flags = lane.nbytes[index], lane.flags[index]
    if not 0 < nbytes <= chunk_bytes:
        raise _refused("an entry's size is out of range", lane, index=index, nbytes=nbytes)
    if flags & ~REUSED:
        raise _refused("an entry has unknown flags", lane, index=index, flags=flags)
    if not flags & REUSED:
        return ChunkSource(Place(lane.segments[index], lane.frames[index]), nbytes, is_reused=False)
    if base is None:
        raise _refused(
            "an entry is reused, but no shard of this session is there to reuse", lane, index=index
        )
    if (
        index >= len(base.chunks)
        or base.chunks[index].nbytes != nbytes
        or base.layout_nbytes != lane.layout_nbytes
    ):
        raise _refused("an entry is reused from a shard of another layout", lane, index=index)
    place = Place(lane.segments[index], lane.frames[index])
    if place != base.chunks[index].place:
        raise _refused("a reused chunk is not in the newest captured shard any more", lane, index=index)
    return ChunkSource(place, nbytes, is_reused=True)


def _refused(message: str, lane: HandOver, **context: int) -> RemoteProtocolError:
    error = RemoteProtocolError(message, kind="lane", step=lane.step, sequence=lane.sequence)
    error.context.update(context)
    return error
