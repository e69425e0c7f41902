"""Frames that hold chunks of other shards for ranks that are restoring: grants of ours, until the round is over.

Whoever fills them may be at it still when the round is over (a rank was killed, or too late): they are free only when
he has stopped, for what is granted next is another snapshot's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from snapd.core.ids import LaneKey, SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.runtime.rank_arena import RankArena

Round = tuple[int, int]  # generation, number


@dataclass(slots=True)
class Fetched:
    """Of one job. `records`: of shards that are not here, for as long as anybody restores."""

    records: dict[tuple[SnapshotId, int], ShardRecord] = field(default_factory=dict)
    _grants: dict[Round, list[tuple[int, LaneKey]]] = field(default_factory=dict)
    _filling: set[LaneKey] = field(default_factory=set)
    _late: set[LaneKey] = field(default_factory=set)  # of rounds that are over, still being filled

    def add(self, round_: Round, rank: int, owner: LaneKey) -> None:
        """Frames of that rank's arena were granted to `owner`, who fills them until `filled` is called."""
        self._grants.setdefault(round_, []).append((rank, owner))
        self._filling.add(owner)

    def filled(self, arenas: Mapping[int, RankArena], rank: int, owner: LaneKey) -> None:
        """Nobody writes into these frames any more."""
        self._filling.discard(owner)
        if owner in self._late:
            self._late.discard(owner)
            if rank in arenas:
                arenas[rank].pool.return_grant(owner)

    def release(self, arenas: Mapping[int, RankArena], round_: Round) -> None:
        """All ranks are done with the round. Idempotent."""
        for rank, owner in self._grants.pop(round_, ()):
            if owner in self._filling:
                self._late.add(owner)
            elif rank in arenas:
                arenas[rank].pool.return_grant(owner)
        if not self._grants:
            self.records.clear()

    def release_below(self, arenas: Mapping[int, RankArena], generation: int) -> None:
        """Older generations restore nothing more."""
        for round_ in [key for key in self._grants if key[0] < generation]:
            self.release(arenas, round_)
