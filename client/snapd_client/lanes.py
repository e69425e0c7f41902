"""Taking a lane, and which chunks of the previous shard stand for this one's.

A lane is the daemon's promise of frames (csrc/include/snapd/control_page.hpp). The book remembers what was handed
over in which lane, so that chunks which cannot have changed are named instead of copied.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import snapd_native as native
from snapd_native import ControlPage

from .errors import UnavailableError
from .session import Session
from .state.layout import Layout

POLL_S = 0.0005
RECHECK_TURNS = (
    32  # each unchanging chunk is copied again, and so compared by the daemon, every so many snapshots
)


Marks = list[tuple[int, int | None]]  # of each tensor that should not change: address, version counter


@dataclass
class Lane:
    """A granted lane: chunk number -> place."""

    index: int
    segments: list[int]
    frames: list[int]


@dataclass
class HandedOver:
    """What was written to a lane, until it is known to be captured."""

    layout: Layout
    unchanging: Marks
    generation: int
    step: int
    lane: int


@dataclass
class Base:
    """The newest captured shard: where its chunks lie, and what its unchanging tensors were like."""

    layout: Layout
    unchanging: Marks
    segments: list[int]
    frames: list[int]


class LaneBook:
    """Lanes of one session, seen from the trainer. Used by the training thread only."""

    def __init__(self, session: Session, ask_for_segments: Callable[[], None]) -> None:
        self._session = session
        self._ask_for_segments = ask_for_segments
        self._is_starved = False
        self._handed_over: list[HandedOver] = []
        self._base: Base | None = None
        self._turn = 0

    @property
    def _page(self) -> ControlPage:
        page = self._session.page
        if page is None:
            raise UnavailableError("the session is closed")
        return page

    def forget_base(self) -> None:
        """Copy everything next time (after a rollback, or when the daemon refused a lane)."""
        self._base = None
        self._handed_over.clear()

    def fresh_chunks(
        self, layout: Layout, unchanging: Marks, *, frames_min: int = 0
    ) -> tuple[list[int], Base | None]:
        """The chunks to copy now, ascending, and the base that the others are taken from.

        A tensor that should not change and was written or moved since the base makes the whole shard be copied.
        `frames_min`: what grants must hold although this capture needs less, because a later one will not.
        """
        count = len(layout.chunk_nbytes)
        if not layout.unchanging_chunks:
            self.want(max(count, frames_min))
            return list(range(count)), None
        self._learn_base()
        base = self._base
        self._turn += 1
        if base is None or base.layout is not layout or base.unchanging != unchanging:
            return list(range(count)), None
        rechecked = len(layout.unchanging_chunks) // RECHECK_TURNS + 1
        self.want(max(count - len(layout.unchanging_chunks) + rechecked, frames_min))
        turn = self._turn % RECHECK_TURNS
        kept = {chunk for chunk in layout.unchanging_chunks if chunk % RECHECK_TURNS != turn}
        return [chunk for chunk in range(count) if chunk not in kept], base

    def _learn_base(self) -> None:
        """Advance the base to the newest captured shard. The daemon has put its final places into the lane's table."""
        page = self._page
        captured = page.load("captured_step_plus_one") - 1
        generation = page.load("generation")
        for known in reversed(self._handed_over):
            if known.step == captured and known.generation == generation:
                segments, frames, _, _ = page.read_entries(known.lane)
                self._base = Base(known.layout, known.unchanging, segments, frames)
                self._handed_over = [h for h in self._handed_over if h.step > captured]
                return

    def take(self, needed: int, wait_max_s: float) -> Lane | None:
        """A lane with at least `needed` frames; None if none came in time or the daemon is away.

        Whoever waited in vain once does not wait again until a lane came: a daemon that hangs costs one `wait_max_s`.
        Nor does anybody wait while every slot holds a snapshot that has to stay until another is protected.
        """
        deadline = time.monotonic() + (0.0 if self._is_starved else wait_max_s)
        if self._page.load("wanted_frames") < needed:
            self.want(needed)
        while True:
            lane = self._try_take(needed)
            if lane is not None:
                self._is_starved = False
                return lane
            is_hopeless = not self._session.is_connected or bool(self._page.load("slots_held"))
            if is_hopeless or time.monotonic() >= deadline:
                self._is_starved = True
                return None
            time.sleep(POLL_S)

    def _try_take(self, needed: int) -> Lane | None:
        page = self._page
        for index in range(page.lane_count):
            if page.lane_state(index) != native.LANE_GRANTED:
                continue
            segments, frames = page.read_grant(index)
            if len(frames) >= needed and self._knows(segments):
                return Lane(index, segments, frames)
        return None

    def want(self, frames: int) -> None:
        """What the next grants must hold; the daemon extends those that hold less."""
        page = self._page
        if page.load("wanted_frames") != frames:
            page.store("wanted_frames", frames)
            self.wake()

    def _knows(self, segments: list[int]) -> bool:
        """Whether all are mapped; if not, the control thread is asked to: no socket is read on the training thread."""
        known = self._session.segments
        if all(segment in known for segment in set(segments)):
            return True
        self._ask_for_segments()
        return False

    def wake(self) -> None:
        if self._session.wake_fd >= 0:
            os.eventfd_write(self._session.wake_fd, 1)

    def places(self, layout: Layout, lane: Lane, fresh: list[int], base: Base | None) -> Placement:
        """Where every chunk lies: granted frames for the fresh ones, the base's for the others."""
        count = len(layout.chunk_nbytes)
        if base is None:
            segments, frames, flags = lane.segments[:count], lane.frames[:count], [0] * count
        else:
            segments, frames, flags = list(base.segments), list(base.frames), [native.ENTRY_REUSED] * count
            for position, chunk in enumerate(fresh):
                segments[chunk], frames[chunk], flags[chunk] = (
                    lane.segments[position],
                    lane.frames[position],
                    0,
                )
        mapped = self._session.segments
        origin = {segment: mapped[segment].address for segment in set(segments)}
        size = self._session.chunk_bytes
        addresses = array("Q", [origin[s] + f * size for s, f in zip(segments, frames, strict=True)])
        return Placement(segments, frames, flags, addresses)

    def note(self, layout: Layout, unchanging: Marks, step: int, lane: Lane) -> None:
        """Remember what was handed over; what an earlier use of the lane held is gone."""
        generation = self._page.load("generation")
        self._handed_over = [h for h in self._handed_over if h.lane != lane.index]
        self._handed_over.append(HandedOver(layout, unchanging, generation, step, lane.index))


@dataclass(frozen=True)
class Placement:
    """Per chunk of the shard: segment, frame, flags, address in this process."""

    segments: list[int]
    frames: list[int]
    flags: list[int]
    addresses: array[int]
