"""Frames that hold chunks of other shards for ranks that are restoring: grants of ours, until the round is over.

A chunk that several ranks of the node need is brought once: it lies in the arena of the rank that asked first, and the
others map it there. Whoever fills frames may be at it still when the round is over (a rank was killed, or too late):
they are free only when he has stopped, for what is granted next is another snapshot's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.runtime.kept import Kept
from snapd.runtime.rank_arena import RankArena

Round = tuple[int, int]  # generation, number
RECORD_CHUNKS_KEPT = 1 << 17  # of all records together; some 30 MB


class Found(NamedTuple):
    """Where a chunk lies: in which rank's arena, and there."""

    segment_rank: int
    place: Place


class Coming(NamedTuple):
    """A chunk, and the work that brings it."""

    found: Found
    work: asyncio.Task[None]


def _records() -> Kept[tuple[SnapshotId, int], ShardRecord]:
    return Kept(RECORD_CHUNKS_KEPT)


@dataclass(slots=True)
class Fetched:
    """Of one job. `records`: of shards that are not here, while anybody restores."""

    records: Kept[tuple[SnapshotId, int], ShardRecord] = field(default_factory=_records)
    _chunks: dict[Round, dict[tuple[int, int], Coming]] = field(default_factory=dict)
    _grants: dict[Round, list[tuple[int, LaneKey]]] = field(default_factory=dict)
    _filling: set[LaneKey] = field(default_factory=set)
    _late: set[LaneKey] = field(default_factory=set)  # of rounds that are over, still being filled
    _over: set[Round] = field(default_factory=set)
    _first: int = 0  # generations below it are over

    def chunks(self, round_: Round) -> dict[tuple[int, int], Coming]:
        """(rank, chunk of its shard) -> where it lies, or will; for the one who brings them to add to."""
        return self._chunks.setdefault(round_, {})

    def is_over(self, round_: Round) -> bool:
        """Nobody would release what is granted for it now."""
        return round_[0] < self._first or round_ in self._over

    def segments(self, generation: int, rank: int) -> set[int]:
        """Those of that rank's arena that chunks for restores of `generation` were brought into."""
        return {
            coming.found.place.segment
            for round_, chunks in self._chunks.items()
            if round_[0] == generation
            for coming in chunks.values()
            if coming.found.segment_rank == rank
        }

    def add(self, round_: Round, rank: int, owner: LaneKey) -> None:
        """Frames of that rank's arena were granted to `owner`, who fills them until `filled` is called."""
        self._grants.setdefault(round_, []).append((rank, owner))
        self._filling.add(owner)

    def failed(self, arenas: Mapping[int, RankArena], round_: Round, rank: int, owner: LaneKey) -> None:
        """Nobody writes into these frames any more, and nobody was told of them: they are free at once."""
        grants = self._grants.get(round_, [])
        if (rank, owner) in grants:
            grants.remove((rank, owner))
            self._late.add(owner)
        self.filled(arenas, rank, owner)

    def filled(self, arenas: Mapping[int, RankArena], rank: int, owner: LaneKey) -> None:
        """Nobody writes into these frames any more."""
        self._filling.discard(owner)
        if owner in self._late:
            self._late.discard(owner)
            if rank in arenas:
                arenas[rank].pool.return_grant(owner)

    def release(self, arenas: Mapping[int, RankArena], round_: Round) -> None:
        """All ranks are done with the round. Idempotent."""
        self._over.add(round_)
        self._chunks.pop(round_, None)
        for rank, owner in self._grants.pop(round_, ()):
            if owner in self._filling:
                self._late.add(owner)
            elif rank in arenas:
                arenas[rank].pool.return_grant(owner)
        if not self._grants:
            self.records.clear()

    def release_below(self, arenas: Mapping[int, RankArena], generation: int) -> None:
        """Older generations restore nothing more."""
        for round_ in [key for key in {*self._grants, *self._chunks} if key[0] < generation]:
            self.release(arenas, round_)
        self._first = max(self._first, generation)
        self._over = {key for key in self._over if key[0] >= self._first}
