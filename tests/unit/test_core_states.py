"""Every state x event pair of every table: what is not a row raises, and changes nothing."""

from __future__ import annotations

import itertools

import pytest

from snapd.core import states
from snapd.core.states import LaneState, LaneStep, SessionEvent, SessionState, ShardEvent, ShardState
from snapd.errors import IllegalTransition

TABLES = [
    (states.SHARD_TRANSITIONS, ShardState, ShardEvent, states.next_shard_state),
    (states.SESSION_TRANSITIONS, SessionState, SessionEvent, states.next_session_state),
    (states.LANE_TRANSITIONS, LaneState, LaneStep, states.next_lane_state),
]


@pytest.mark.parametrize(("table", "all_states", "all_events", "step"), TABLES)
def test_only_rows_are_transitions(table, all_states, all_events, step):
    refused = 0
    for state, event in itertools.product(all_states, all_events):
        if (state, event) in table:
            assert step(state, event) is table[state, event]
        else:
            refused += 1
            with pytest.raises(IllegalTransition):
                step(state, event)
    assert refused > 0


def test_the_end_is_the_end():
    for state in (SessionState.DEAD, SessionState.CLOSED):
        assert not [row for row in states.SESSION_TRANSITIONS if row[0] is state]
    assert not [row for row in states.SHARD_TRANSITIONS if row[0] is ShardState.DROPPED]


def test_a_fenced_session_never_comes_back():
    after = {new for (state, _), new in states.SESSION_TRANSITIONS.items() if state is SessionState.FENCED}
    assert after == {SessionState.FENCED, SessionState.DEAD, SessionState.CLOSED}


def test_the_daemon_never_touches_an_open_lane():
    assert not [row for row in states.LANE_TRANSITIONS if row[0] is LaneState.OPEN]
