"""Frames that chunks were being brought into when the work ended early: what had arrived is not brought again.

They are free frames like any others: nothing is kept for them. Whoever is granted one that should hold a chunk hashes
it, and brings the chunk only if it is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapd.core.ids import LaneKey, Place
from snapd.core.manifest import Chunk
from snapd.memory.arriving_rows import ArrivingChunk, ArrivingRows
from snapd.runtime.rank_arena import RankArena

ChunkKey = tuple[bytes, int]  # digest, nbytes


class Arriving:
    """Of one job."""

    def __init__(self, rows: ArrivingRows) -> None:
        self._rows = rows
        self._places: dict[int, dict[ChunkKey, Place]] = {}
        for rank, chunks in rows.all():
            self._note(rank, chunks)

    def _note(self, rank: int, chunks: Sequence[ArrivingChunk]) -> None:
        known = self._places.setdefault(rank, {})
        known.update({(chunk.digest, chunk.nbytes): chunk.place for chunk in chunks})

    def grant(
        self, arena: RankArena, owner: LaneKey, chunks: Sequence[Chunk], wanted: Sequence[int]
    ) -> dict[int, Place]:
        """Grant `owner` the free frames of that arena where chunks of a shard may lie already; the caller hashes them.
        Returns which chunk may lie where.
        """
        known = self._places.get(arena.rank)
        if not known:
            return {}
        hints: dict[Place, int] = {}
        for index in wanted:
            place = known.get((chunks[index].digest, chunks[index].nbytes))
            if place is not None:
                hints.setdefault(place, index)  # chunks that are equal get frames of their own
        found = arena.pool.grant_free(owner, hints)
        return {hints[place]: place for place in found}

    def begin(self, rank: int, chunks: Sequence[Chunk], places: Mapping[int, Place]) -> None:
        """These chunks are about to arrive in frames of that rank's arena."""
        arriving = [
            ArrivingChunk(chunks[index].digest, chunks[index].nbytes, place)
            for index, place in places.items()
        ]
        if arriving:
            self._rows.add(rank, arriving)
            self._note(rank, arriving)

    def forget(self, rank: int) -> None:
        """What was to be brought for that rank is here, or of no use any more."""
        if self._places.pop(rank, None) is not None:
            self._rows.remove(rank)
