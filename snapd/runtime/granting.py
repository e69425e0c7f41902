"""Frames for a session's lanes: which lanes get some, and the words on the page that say so.

A grant is written by the daemon ahead of time, so that a trainer asks for nothing when it hands a snapshot over.
"""

from __future__ import annotations

from snapd.core.frames import FramePool
from snapd.core.lanes import grantable_lanes
from snapd.core.ledger import Ledger
from snapd.core.states import LaneState, LaneStep
from snapd.runtime.faultpoints import point
from snapd.runtime.session import Session


def free_slots(session: Session, pool: FramePool, ledger: Ledger, *, is_restoring: bool) -> int:
    """How many lanes more may be granted, beside those that have frames and the shards from the newest complete on.

    Frames that are free beyond the slots (a trainer that was overtaken left some) are not hoarded in lanes.
    """
    newest = ledger.newest_complete()
    held = [
        facts
        for facts in ledger.snapshots.values()
        if session.rank in facts.shards and not facts.problem and (newest is None or facts.id >= newest.id)
    ]
    taken = len(pool.lanes_of(session.id))
    return grantable_lanes(session.row.slots, taken=taken, held=len(held), is_restoring=is_restoring)


def free_lanes(session: Session) -> list[tuple[int, bool]]:
    """(lane, False) of each that has nothing."""
    lanes = range(session.page.lane_count)
    return [(n, False) for n in lanes if n not in session.pending and session.lane_state(n) is LaneState.FREE]


def lane_grants(session: Session, pool: FramePool) -> dict[int, int]:
    """Lanes that are granted and not taken, with the frames that they hold."""
    lanes = range(session.page.lane_count)
    return {
        n: len(pool.grant_of(session.key(n))) for n in lanes if session.lane_state(n) is LaneState.GRANTED
    }


def small_grants(session: Session, pool: FramePool, wanted: int) -> list[tuple[int, bool]]:
    """(lane, True) of each that is granted less than `wanted`, the last first."""
    granted = lane_grants(session, pool)
    return sorted(((lane, True) for lane, have in granted.items() if have < wanted), reverse=True)


def grant_lane(session: Session, pool: FramePool, lane: int, wanted: int, *, is_extended: bool) -> bool:
    """Write a grant; False: too few frames are free. An extended one keeps its frames and order, so that a trainer
    that just took it is right too.
    """
    key = session.key(lane)
    if wanted - len(pool.grant_of(key)) > pool.free_count:
        return False
    if is_extended and not session.move_lane(lane, LaneState.GRANTED, LaneStep.EXTEND):
        return True
    places = pool.grant(key, wanted)
    assert places is not None
    point("daemon.grant.before")
    session.page.write_grant(lane, [place.segment for place in places], [place.frame for place in places])
    session.move_lane(lane, LaneState.FREE, LaneStep.GRANT)
    point("daemon.grant.after")
    return True
