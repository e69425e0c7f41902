"""The end of a Snapshotter: waiting for what is under way, the end of the process, forked children."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from typing import Protocol

import snapd_native as native
from snapd_native import ControlPage
from snapd_proto import trainer_pb2 as pb

from .errors import SnapdError
from .session import Session

_log = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 30.0
_POLL_S = 0.001


class Ending(Protocol):
    """What has to be told when the process ends or forks."""

    def at_exit(self) -> None: ...
    def abandon_in_child(self) -> None: ...


_live: weakref.WeakSet[Ending] = weakref.WeakSet()
watch = _live.add
unwatch = _live.discard


def wait_settled(session: Session, step: int | None) -> None:
    """Until the daemon has taken what was committed, `step` being the newest of it, or is away."""
    page = session.page
    deadline = time.monotonic() + CLOSE_TIMEOUT_S
    while page is not None and step is not None and session.is_connected and time.monotonic() < deadline:
        if page.load("captured_step_plus_one") > step or not _has_complete_lane(page):
            return
        time.sleep(_POLL_S)


def close_session(session: Session, *, final: bool) -> None:
    """Tell the daemon; what it says against it is logged."""
    request = pb.CloseSessionRequest(session_id=session.session_id, final=final)
    try:
        session.call(lambda stub, **options: stub.CloseSession(request, **options), timeout_s=CLOSE_TIMEOUT_S)
    except SnapdError as error:
        _log.warning("snapd: closing: %s", error)


def _has_complete_lane(page: ControlPage) -> bool:
    return any(page.lane_state(lane) == native.LANE_COMPLETE for lane in range(page.lane_count))


def _close_at_exit() -> None:
    for one in list(_live):
        one.at_exit()


def _abandon_in_child() -> None:
    for one in list(_live):
        one.abandon_in_child()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_abandon_in_child)
