"""The state machines of a shard, a session and the daemon's side of a lane. A transition exists only as a row
here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from snapd.errors import IllegalTransition


class ShardState(enum.Enum):
    """A shard on this node. Being protected or durable are facts beside it (ledger.py), since tiers fill in
    any order.
    """

    CAPTURING = "capturing"
    CAPTURED = "captured"
    DROPPED = "dropped"


class ShardEvent(enum.Enum):
    COMPLETED = "completed"
    DISCARDED = "discarded"


SHARD_TRANSITIONS: Mapping[tuple[ShardState, ShardEvent], ShardState] = {
    (ShardState.CAPTURING, ShardEvent.COMPLETED): ShardState.CAPTURED,
    (ShardState.CAPTURING, ShardEvent.DISCARDED): ShardState.DROPPED,
    (ShardState.CAPTURED, ShardEvent.DISCARDED): ShardState.DROPPED,
}


class SessionState(enum.Enum):
    """A trainer's session. DETACHED: its connection is gone, its process is not known to be."""

    ATTACHED = "attached"
    DETACHED = "detached"
    FENCED = "fenced"
    DEAD = "dead"
    CLOSED = "closed"


class SessionEvent(enum.Enum):
    CONNECTED = "connected"
    CONNECTION_LOST = "connection_lost"
    OVERTAKEN = "overtaken"
    DIED = "died"
    CLOSED = "closed"


_A, _D, _F = SessionState.ATTACHED, SessionState.DETACHED, SessionState.FENCED
SESSION_TRANSITIONS: Mapping[tuple[SessionState, SessionEvent], SessionState] = {
    (_A, SessionEvent.CONNECTED): _A,
    (_A, SessionEvent.CONNECTION_LOST): _D,
    (_A, SessionEvent.OVERTAKEN): _F,
    (_A, SessionEvent.DIED): SessionState.DEAD,
    (_A, SessionEvent.CLOSED): SessionState.CLOSED,
    (_D, SessionEvent.CONNECTED): _A,
    (_D, SessionEvent.CONNECTION_LOST): _D,
    (_D, SessionEvent.OVERTAKEN): _F,
    (_D, SessionEvent.DIED): SessionState.DEAD,
    (_D, SessionEvent.CLOSED): SessionState.CLOSED,
    (_F, SessionEvent.CONNECTED): _F,
    (_F, SessionEvent.CONNECTION_LOST): _F,
    (_F, SessionEvent.OVERTAKEN): _F,
    (_F, SessionEvent.DIED): SessionState.DEAD,
    (_F, SessionEvent.CLOSED): SessionState.CLOSED,
}


class LaneState(enum.IntEnum):
    """As in csrc/include/snapd/control_page.hpp."""

    FREE = 0
    GRANTED = 1
    OPEN = 2
    COMPLETE = 3
    DISCARDED = 4


class LaneStep(enum.Enum):
    """What the daemon may do to a lane; everything else is the trainer's."""

    GRANT = "grant"
    EXTEND = "extend"  # take a grant back to write a larger one that begins with the same frames
    FINISH = "finish"
    TAKE_BACK = "take_back"


LANE_TRANSITIONS: Mapping[tuple[LaneState, LaneStep], LaneState] = {
    (LaneState.FREE, LaneStep.GRANT): LaneState.GRANTED,
    (LaneState.GRANTED, LaneStep.EXTEND): LaneState.FREE,
    (LaneState.COMPLETE, LaneStep.FINISH): LaneState.FREE,
    (LaneState.DISCARDED, LaneStep.TAKE_BACK): LaneState.FREE,
}


def next_shard_state(state: ShardState, event: ShardEvent) -> ShardState:
    """Return the state after `event`.

    Raises:
        IllegalTransition: the pair is not in the table.
    """
    try:
        return SHARD_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition("transition refused", state=state.value, event=event.value) from None


def next_session_state(state: SessionState, event: SessionEvent) -> SessionState:
    """Return the state after `event`; DEAD and CLOSED are final.

    Raises:
        IllegalTransition: the pair is not in the table.
    """
    try:
        return SESSION_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition("transition refused", state=state.value, event=event.value) from None


def next_lane_state(state: LaneState, step: LaneStep) -> LaneState:
    """Return the state to set with a compare-and-set from `state`.

    Raises:
        IllegalTransition: the pair is not in the table.
    """
    try:
        return LANE_TRANSITIONS[state, step]
    except KeyError:
        raise IllegalTransition("transition refused", state=state.name, event=step.value) from None
