"""The arena of one (job, rank): its frames as numbers, and its segments as memory. They grow together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from snapd.core.frames import FramePool
from snapd.core.geometry import missing_frames
from snapd.memory.folders import JobFolder
from snapd.memory.segments import Segment, SegmentSet

SEGMENTS_MAX = 128  # descriptors of one message: at most 253


@dataclass(slots=True, eq=False)
class RankArena:
    """`growing`: one growth at a time. `refusal`: why the last one failed, for status; else empty."""

    rank: int
    folder: JobFolder
    pool: FramePool
    memory: SegmentSet
    growing: asyncio.Lock = field(default_factory=asyncio.Lock)
    refusal: str = ""
    refused_at_s: float = 0.0

    @classmethod
    def empty(cls, folder: JobFolder, rank: int, chunk_bytes: int) -> RankArena:
        return cls(rank, folder, FramePool(), SegmentSet(rank, chunk_bytes))

    def add(self, segment: Segment) -> None:
        """A segment that is backed, recorded and mapped."""
        self.memory.add(segment)
        self.pool.add_segment(segment.number, segment.nbytes // self.memory.chunk_bytes)

    def frames_missing(self, *, wanted_per_slot: int, slots: int, session_id: int, kept_frames: int) -> int:
        """Frames to back so that the session's slots fit beside what is set aside or in other writers' hands.

        `kept_frames`: those that the next lane cannot have whatever happens: of the newest complete shard,
        and of other lanes. Growing by exactly this keeps two slots at twice the state.
        """
        pool = self.pool
        others = pool.granted_count - pool.granted_of(session_id)
        usable = pool.total_count - pool.set_aside_count - others
        beside_newest = wanted_per_slot + kept_frames - usable
        return max(
            missing_frames(wanted_per_slot=wanted_per_slot, slots=slots, usable=usable), beside_newest, 0
        )
