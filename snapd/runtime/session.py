"""A trainer's session: its control page, its lanes as the daemon knows them, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from snapd_native import ControlPage

from snapd.core.ids import STEP_MAX, LaneKey
from snapd.core.states import (
    LaneState,
    LaneStep,
    SessionEvent,
    SessionState,
    next_lane_state,
    next_session_state,
)
from snapd.memory.index import SessionRow
from snapd.runtime.liveness import Peer, Process

_LANE_WORDS = frozenset(int(state) for state in LaneState)


def _step(step_plus_one: int) -> int:
    """What a word of the trainer's says; shared memory is not believed."""
    return step_plus_one - 1 if step_plus_one <= STEP_MAX else -1


@dataclass(slots=True)
class SessionCounts:
    skipped: int = 0
    discarded: int = 0
    refused: int = 0
    last_window_s: float = 0.0
    newest_captured_step: int | None = None


@dataclass(slots=True, eq=False)
class Session:
    """Lives from OpenSession (or a restart that adopts it) until its trainer is dead or has closed it."""

    row: SessionRow
    job_name: str
    page: ControlPage
    page_path: Path
    process: Process
    state: SessionState = SessionState.ATTACHED
    peer: Peer | None = None
    wake_fd: int = -1
    # COMPLETE lanes that were accepted and are not yet recorded, with their sequence
    pending: dict[int, int] = field(default_factory=dict)
    worker: asyncio.Task[None] | None = None
    segments_version: int = 0
    skipped_seen: int = 0
    is_page_closed: bool = False
    has_ended_cleanly: bool = False
    counts: SessionCounts = field(default_factory=SessionCounts)

    @property
    def id(self) -> int:
        return self.row.id

    @property
    def rank(self) -> int:
        return self.row.rank

    @property
    def generation(self) -> int:
        return self.row.generation

    @property
    def is_live(self) -> bool:
        """Its trainer may still write into what it was granted."""
        return self.state not in (SessionState.DEAD, SessionState.CLOSED)

    @property
    def is_served(self) -> bool:
        """New lanes are granted and taken."""
        return self.state in (SessionState.ATTACHED, SessionState.DETACHED)

    @property
    def is_drained(self) -> bool:
        return not self.pending and (self.worker is None or self.worker.done())

    def apply(self, event: SessionEvent) -> None:
        self.state = next_session_state(self.state, event)

    def key(self, lane: int) -> LaneKey:
        return LaneKey(self.id, lane)

    def lane_state(self, lane: int) -> LaneState | None:
        """None: the word in shared memory is none of the states; such a lane is left alone."""
        word = self.page.lane_state(lane)
        return LaneState(word) if word in _LANE_WORDS else None

    def move_lane(self, lane: int, state: LaneState, step: LaneStep) -> bool:
        """Make the daemon's step on a lane; False if the trainer was quicker."""
        return self.page.set_lane_state(lane, int(state), int(next_lane_state(state, step)))

    def update(self, *, generation: int | None = None, is_fenced: bool | None = None) -> SessionRow:
        """Change the row; the caller writes it to the index."""
        self.row = replace(
            self.row,
            generation=self.row.generation if generation is None else generation,
            is_fenced=self.row.is_fenced if is_fenced is None else is_fenced,
        )
        return self.row

    def newest_step_seen(self) -> int:
        """The newest step that the trainer passed to snap.step; -1 before the first, or if the word cannot be
        one.
        """
        return -1 if self.is_page_closed else _step(self.page.load("step_seen_plus_one"))

    def newest_step_skipped(self) -> int:
        """As above, for steps skipped for want of a lane."""
        return _step(self.page.load("skipped_step_plus_one"))

    def release(self, *, keep_page: bool) -> None:
        """Close what the daemon holds of it. With `keep_page` the file stays, for the next daemon."""
        if not self.is_page_closed:
            self.is_page_closed = True
            self.page.close()
        if self.wake_fd >= 0:
            asyncio.get_running_loop().remove_reader(self.wake_fd)
            with contextlib.suppress(OSError):
                os.close(self.wake_fd)
            self.wake_fd = -1
        if not keep_page:
            self.page_path.unlink(missing_ok=True)
