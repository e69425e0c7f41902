"""Frames and ledger against dict models: counts never negative, nothing granted twice, complete snapshots
never lost.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapd.core.frames import FramePool
from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.core.ledger import Ledger
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import InvariantViolated

SESSIONS = st.integers(1, 3)
LANES = st.integers(0, 1)


class FramesMachine(RuleBasedStateMachine):
    """The model: one dict place -> ("free",) | ("granted", key) | ("held", count) | ("aside", session)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = FramePool()
        self.model: dict[Place, tuple] = {}
        self.shards: list[list[Place]] = []

    def granted(self, key: LaneKey) -> list[Place]:
        return [place for place, state in self.model.items() if state == ("granted", key)]

    def free(self) -> list[Place]:
        return [place for place, state in self.model.items() if state == ("free",)]

    @precondition(lambda self: len(self.pool.segments) < 4)
    @rule(frames=st.integers(1, 6))
    def grow(self, frames: int) -> None:
        number = len(self.pool.segments)
        self.pool.add_segment(number, frames)
        self.model.update({Place(number, frame): ("free",) for frame in range(frames)})

    @rule(session=SESSIONS, lane=LANES, count=st.integers(1, 8))
    def grant(self, session: int, lane: int, count: int) -> None:
        key, before = LaneKey(session, lane), list(self.pool.grant_of(LaneKey(session, lane)))
        places = self.pool.grant(key, count)
        if max(0, count - len(before)) > len(self.free()):
            assert places is None
            assert list(self.pool.grant_of(key)) == before
            return
        assert places is not None and places[: len(before)] == before
        for place in places[len(before) :]:
            assert self.model[place] == ("free",)
            self.model[place] = ("granted", key)

    @rule(session=SESSIONS, lane=LANES, data=st.data())
    def capture(self, session: int, lane: int, data: st.DataObject) -> None:
        key = LaneKey(session, lane)
        granted = self.granted(key)
        if not granted:
            return
        kept = data.draw(st.lists(st.sampled_from(sorted(granted)), unique=True))
        base = self.shards[-1] if self.shards else []
        shared = data.draw(st.lists(st.sampled_from(base), unique=True)) if base else []
        self.pool.settle(key, kept)
        self.pool.hold(shared)
        for place in granted:
            self.model[place] = ("held", 1) if place in kept else ("free",)
        for place in shared:
            self.model[place] = ("held", self.model[place][1] + 1)
        if kept or shared:
            self.shards.append([*kept, *shared])

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        shard = self.shards.pop(data.draw(st.integers(0, len(self.shards) - 1)))
        self.pool.release(shard)
        for place in shard:
            count = self.model[place][1] - 1
            self.model[place] = ("held", count) if count else ("free",)

    @rule(session=SESSIONS, lane=LANES)
    def give_back(self, session: int, lane: int) -> None:
        key = LaneKey(session, lane)
        places = self.granted(key)
        assert self.pool.return_grant(key) == len(places)
        self.model.update(dict.fromkeys(places, ("free",)))

    @rule(session=SESSIONS, lane=LANES)
    def fence(self, session: int, lane: int) -> None:
        key = LaneKey(session, lane)
        places = self.granted(key)
        assert self.pool.set_aside(key) == len(places)
        self.model.update(dict.fromkeys(places, ("aside", session)))

    @rule(session=SESSIONS, keep=st.sets(LANES))
    def die(self, session: int, keep: set[int]) -> None:
        freed = [
            place
            for place, state in self.model.items()
            if state == ("aside", session)
            or (state[0] == "granted" and state[1].session_id == session and state[1].lane not in keep)
        ]
        assert self.pool.known_dead(session, keep_lanes=keep) == len(freed)
        self.model.update(dict.fromkeys(freed, ("free",)))

    @rule(session=SESSIONS)
    def never_released_too_often_nor_claimed_from_others(self, session: int) -> None:
        taken = next((place for place, state in self.model.items() if state != ("free",)), None)
        key = LaneKey(session + 10, 0)
        if taken is not None:
            with pytest.raises(InvariantViolated):
                self.pool.claim(key, [taken])
        unheld = next((place for place, state in self.model.items() if state[0] != "held"), None)
        if unheld is not None:
            with pytest.raises(InvariantViolated):
                self.pool.release([unheld])

    @invariant()
    def same_as_the_model(self) -> None:
        self.pool.check()
        states = list(self.model.values())
        assert self.pool.free_count == states.count(("free",))
        assert self.pool.granted_count == sum(state[0] == "granted" for state in states)
        assert self.pool.set_aside_count == sum(state[0] == "aside" for state in states)
        for place, state in self.model.items():
            assert self.pool.reference_count(place) == (state[1] if state[0] == "held" else 0)


class LedgerMachine(RuleBasedStateMachine):
    """Two ranks capture, skip, start anew and prove things bad, in any order; drops are made as they are
    named.
    """

    WORLD = 2

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.generation = 1
        self.next_step = [1, 1]
        self.newest: SnapshotId | None = None
        self.bad: set[SnapshotId] = set()

    @rule(rank=st.integers(0, 1))
    def capture(self, rank: int) -> None:
        step = self.next_step[rank]
        self.next_step[rank] += 1
        snapshot = SnapshotId(self.generation, step)
        record = ShardRecord(
            job="j",
            id=snapshot,
            rank=rank,
            world_size=self.WORLD,
            chunk_bytes=64,
            layout_nbytes=1,
            early_values_offset=64,
            early_values_nbytes=0,
            chunks=(Chunk(1, bytes(16), Place(0, 0)),),
            parent=None,
            captured_wall_time_s=0.0,
            digest=bytes(16),
        )
        if snapshot in self.ledger.dropped:
            return  # the daemon drops it again at once: the other rank has passed it
        facts = self.ledger.add(record, session_id=rank, sequence=step, is_verified=True)
        if facts.is_usable and (self.newest is None or snapshot > self.newest):
            self.newest = snapshot

    @rule(rank=st.integers(0, 1))
    def skip(self, rank: int) -> None:
        self.ledger.passed(self.generation, rank, self.next_step[rank])
        self.next_step[rank] += 1

    @rule()
    def start_anew(self) -> None:
        self.generation += 1
        self.next_step = [1, 1]

    @precondition(lambda self: self.newest is not None)
    @rule()
    def prove_newest_bad(self) -> None:
        assert self.newest is not None
        self.ledger.mark_unusable(self.newest, "bad")
        self.bad.add(self.newest)
        usable = [facts.id for facts in self.ledger.snapshots.values() if facts.is_usable]
        self.newest = max(usable, default=None)

    @rule(keep=st.integers(1, 3))
    def drop(self, keep: int) -> None:
        for snapshot, reason in self.ledger.to_drop(keep_complete=keep, closed_below=self.generation):
            facts = self.ledger.drop(snapshot, reason)
            assert facts.hold_count == 0
        left = [facts for facts in self.ledger.snapshots.values() if facts.is_usable]
        assert len(left) <= keep

    @invariant()
    def the_newest_complete_is_never_lost(self) -> None:
        newest = self.ledger.newest_complete()
        assert (newest.id if newest else None) == self.newest

    @invariant()
    def nothing_bad_is_newest(self) -> None:
        newest = self.ledger.newest_complete()
        assert newest is None or newest.id not in self.bad


TestFrames = FramesMachine.TestCase
TestLedger = LedgerMachine.TestCase
TestFrames.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
