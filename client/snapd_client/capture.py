"""One capture after the other: hand over, copy, check, commit.

The training thread hands over and goes on. Copy threads fill the chunks. Whoever comes first after the last byte, the
control thread or the fence, settles: version counters, addresses and the samples taken at the hand-over are
compared, then the lane is committed or discarded. A capture is committed exactly once, and never after a difference.

Order that must hold: entries and counts are written before OPEN; OPEN before the first lazy byte is copied; the last
check before COMPLETE; the fence returns only when every byte of its group is copied and its counters are compared.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import snapd_native as native
from snapd_native import CopyEngine, CopyPlan

from . import faults
from .control import ControlThread
from .errors import FencedError
from .health import Health
from .lanes import Base, Lane, LaneBook, Placement
from .session import Session
from .state.layout import Binding, Layout, PlanArrays, build_layout
from .state.tree import StateTree, Walk

_log = logging.getLogger(__name__)

STRIKES_MAX = 2
_REASON_COUNTER, _REASON_SAMPLE, _REASON_AUDIT, _REASON_CLOSED = 1, 2, 4, 6


class Audit(enum.Enum):
    """How lazily taken tensors are compared with what was handed over (docs/checks.md)."""

    SAMPLED = "sampled"
    FULL = "full"
    COUNTERS = "counters"


class Outcome(enum.Enum):
    """What became of one `snap.step`."""

    HANDED_OVER = "handed over"
    SKIPPED = "skipped"
    FENCED = "fenced"


@dataclass
class _Prepared:
    """What depends on the layout and on which chunks are fresh, but not on addresses."""

    fresh: list[int]
    lazy: CopyPlan
    early: CopyPlan


@dataclass
class Inflight:
    """A capture between hand-over and commit. Holds every tensor that is being copied."""

    step: int
    lane: Lane
    walk: Walk
    binding: Binding
    layout: Layout
    placement: Placement
    plan: CopyPlan
    ticket: native.Ticket | None
    sample: native.Sample | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    checked_groups: set[int] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    reason: int = 0
    is_settled: bool = False


class Capturer:
    """The capture pipeline of one session. Public methods are called on the training thread, except `settle`."""

    def __init__(
        self, tree: StateTree, session: Session, engine: CopyEngine, control: ControlThread, health: Health, audit: Audit
    ) -> None:
        self._tree, self._session, self._engine = tree, session, engine
        self._control, self._health, self._audit = control, health, audit
        self._lanes = LaneBook(session)
        self._layout: Layout | None = None
        self._signature: object = None
        self._prepared: dict[tuple[int, ...] | None, _Prepared] = {}
        self._inflight: Inflight | None = None
        self._sequence = 0
        self._strikes: dict[str, int] = {}
        self._early_wanted: set[str] = set()
        self._is_fenced = False

    # --- handing over -------------------------------------------------------------------------------------------
    def hand_over(self, step: int, wait_max_s: float) -> Outcome:
        """Take the early part, start the lazy part, and return.

        Raises:
            CaptureError: the state holds something that cannot be captured; names it.
        """
        page = self._session.page
        if page is None or page.load("fenced"):
            self._is_fenced = True
            return Outcome.FENCED
        faults.point("client.handover.before")
        started_ns = time.monotonic_ns()
        self.finish()
        self._move_to_early()
        page.store("step_seen_plus_one", step + 1)
        walk = self._tree.walk()
        layout, binding = self._fit(walk)
        early = self._encode(walk, layout, step)
        if len(early) > layout.early_values_capacity:
            layout, binding = self._rebuild(walk)
            early = self._encode(walk, layout, step)
        fresh, base = self._lanes.fresh_chunks(layout)
        lane = self._lanes.take(len(fresh), wait_max_s)
        if lane is None:
            page.store("skipped_step_plus_one", step + 1)
            page.add("skipped_count", 1)
            self._lanes.wake()
            return Outcome.SKIPPED
        self._start(step, walk, layout, binding, early, _Choice(lane, fresh, base), started_ns)
        return Outcome.HANDED_OVER

    def _fit(self, walk: Walk) -> tuple[Layout, Binding]:
        """The layout that fits the walk: the known one, unless structure or aliasing changed."""
        layout = self._layout
        if layout is not None and self._signature == walk.signature:
            binding = layout.bind(walk)
            if binding is not None:
                return layout, binding
        return self._rebuild(walk)

    def _rebuild(self, walk: Walk) -> tuple[Layout, Binding]:
        layout = build_layout(self._tree, walk, chunk_bytes=self._session.chunk_bytes)
        binding = layout.bind(walk)
        if binding is None:
            raise RuntimeError("a layout does not fit the walk that it was made from")
        self._layout, self._signature = layout, walk.signature
        self._prepared.clear()
        self._health.layouts += 1
        return layout, binding

    def _encode(self, walk: Walk, layout: Layout, step: int) -> bytes:
        return walk.encode_early(self._session.generation, step)

    def _prepare(self, layout: Layout, fresh: list[int], base: Base | None) -> _Prepared:
        """Plans for these chunks; few different choices exist (all chunks, or one per turn of the recheck)."""
        key = None if base is None else tuple(fresh)
        prepared = self._prepared.get(key)
        if prepared is None:
            chosen = None if base is None else set(fresh)
            prepared = _Prepared(fresh, _plan(layout.lazy, chosen), _plan(layout.early, chosen))
            self._prepared[key] = prepared
        return prepared

    def _start(
        self, step: int, walk: Walk, layout: Layout, binding: Binding, early: bytes, choice: _Choice, started_ns: int
    ) -> None:
        page = self._session.page
        assert page is not None
        lane = choice.lane
        placement = self._lanes.places(layout, lane, choice.fresh, choice.base)
        prepared = self._prepare(layout, choice.fresh, choice.base)
        is_new_layout = placement.flags[0] != native.ENTRY_REUSED
        if is_new_layout:
            self._write(placement, 0, layout.serialized)
        self._write(placement, layout.early_values_offset, early.ljust(layout.early_values_capacity, b"\0"))
        prepared.early.run(binding.bases, placement.addresses)
        sample = None
        if self._audit is Audit.SAMPLED:
            sample = prepared.lazy.sample(binding.bases, self._sequence)
        if self._audit is Audit.FULL:
            prepared.lazy.run(binding.bases, placement.addresses)
        self._sequence += 1
        nbytes = layout.chunk_nbytes
        page.write_entries(lane.index, placement.segments, placement.frames, nbytes, placement.flags)
        for name, value in (
            ("sequence", self._sequence),
            ("generation", self._session.generation),
            ("step", step),
            ("layout_nbytes", len(layout.serialized)),
            ("early_values_offset", layout.early_values_offset),
            ("early_values_nbytes", len(early)),
            ("handed_over_ns", started_ns),
            ("discard_reason", 0),
        ):
            page.lane_store(lane.index, name, value)
        faults.point("client.open.before")
        if not page.set_lane_state(lane.index, native.LANE_GRANTED, native.LANE_OPEN):
            raise FencedError("the lane was taken back", lane=lane.index)
        faults.point("client.open.after")
        ticket = None
        if self._audit is not Audit.FULL:
            ticket = self._engine.submit(prepared.lazy, binding.bases, placement.addresses)
        inflight = Inflight(
            step, lane, walk, binding, layout, placement, prepared.lazy, ticket=ticket, sample=sample
        )
        self._inflight = inflight
        self._lanes.note(layout, step, lane)
        self._health.early_bytes = prepared.early.nbytes + len(early)
        self._health.lazy_bytes = prepared.lazy.nbytes
        if ticket is not None:
            self._control.watch(ticket.fileno(), lambda: self.settle(inflight))
        faults.point("client.handover.after")

    def _write(self, placement: Placement, shard_offset: int, data: bytes) -> None:
        """Bytes to a place in the shard that may span chunks."""
        size = self._session.chunk_bytes
        while data:
            chunk, offset = divmod(shard_offset, size)
            part = data[: size - offset]
            mapping = self._session.segments[placement.segments[chunk]]
            with mapping.view(placement.frames[chunk] * size + offset, len(part)) as view:
                view[:] = part
            data, shard_offset = data[len(part) :], shard_offset + len(part)

    # --- the fence ----------------------------------------------------------------------------------------------
    def fence(self, group: int | None) -> None:
        """Before the tensors of `group` (None: all) change: their bytes are copied and their counters compared.

        The training thread copies what is left, this group's first.
        """
        inflight = self._inflight
        if inflight is None or inflight.is_settled:
            return
        faults.point("client.fence.before")
        ticket = inflight.ticket
        if ticket is None or ticket.is_done():
            self.settle(inflight)
        elif group is None:
            ticket.wait(-1, True)
            self.settle(inflight)
        else:
            ticket.wait(group, True)
            with inflight.lock:
                if not inflight.is_settled:
                    self._compare_counters(inflight, {group})
            if ticket.is_done():
                self.settle(inflight)
        if ticket is not None:
            self._health.helped_bytes += ticket.helped_bytes
        faults.point("client.fence.after")

    def finish(self) -> None:
        """Complete and settle what is under way, if anything."""
        if self._inflight is not None:
            self.fence(None)
            self._release()

    def _release(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None and inflight.ticket is not None:
            self._control.unwatch(inflight.ticket.fileno())

    # --- settling -----------------------------------------------------------------------------------------------
    def settle(self, inflight: Inflight) -> None:
        """All bytes are copied: check, then commit or discard, once. Any thread."""
        with inflight.lock:
            if inflight.is_settled:
                return
            if inflight.ticket is not None and inflight.ticket.is_cancelled:
                inflight.reason = _REASON_CLOSED
            self._compare_counters(inflight, set(range(len(self._tree.optimizers) + 1)))
            self._compare_bytes(inflight)
            faults.point("client.checked")
            self._conclude(inflight)
            inflight.is_settled = True

    def _compare_counters(self, inflight: Inflight, groups: set[int]) -> None:
        groups = groups - inflight.checked_groups
        if groups:
            changed = inflight.binding.changed_since(inflight.walk, groups)
            if changed:
                inflight.changed.update(changed)
                inflight.reason = inflight.reason or _REASON_COUNTER
            inflight.checked_groups |= groups

    def _compare_bytes(self, inflight: Inflight) -> None:
        regions: list[int] = []
        if inflight.sample is not None:
            regions = inflight.sample.differing(inflight.placement.addresses)
            reason = _REASON_SAMPLE
        elif self._audit is Audit.FULL:
            regions = inflight.plan.differing(inflight.binding.bases, inflight.placement.addresses)
            reason = _REASON_AUDIT
        if regions:
            inflight.changed.update(inflight.layout.region_names[region] for region in regions)
            inflight.reason = inflight.reason or reason

    def _conclude(self, inflight: Inflight) -> None:
        page, lane, ticket = self._session.page, inflight.lane.index, inflight.ticket
        if page is None:
            return
        if ticket is not None:
            page.lane_store(lane, "copied_ns", ticket.finished_ns)
            page.lane_store(lane, "copied_bytes", ticket.progress()[0])
        health = self._health
        if inflight.reason:
            page.lane_store(lane, "discard_reason", inflight.reason)
            page.set_lane_state(lane, native.LANE_OPEN, native.LANE_DISCARDED)
            self._lanes.wake()
            health.discarded += 1
            health.last_discard = sorted(inflight.changed)[:10]
            for name in inflight.changed:
                self._strikes[name] = self._strikes.get(name, 0) + 1
                if self._strikes[name] == STRIKES_MAX:
                    self._early_wanted.add(name)
            return
        faults.point("client.commit.before")
        page.commit(lane, self._session.wake_fd)
        faults.point("client.commit.after")
        health.committed += 1
        health.last_committed_step = inflight.step
        health.note_window(time.monotonic_ns() - page.lane_load(lane, "handed_over_ns"))

    def _move_to_early(self) -> None:
        """Tensors that failed their check twice are taken before `snap.step` returns from now on."""
        if not self._early_wanted:
            return
        names, self._early_wanted = self._early_wanted, set()
        for name in sorted(names):
            self._tree.force_early(name)
            _log.warning(
                "snapd: %s changes outside the optimizer's update; it is captured before snap.step returns from now on",
                name,
            )
        self._signature, self._layout = None, None

    # --- the rest -----------------------------------------------------------------------------------------------
    def forget_base(self) -> None:
        self._lanes.forget_base()

    def abandon(self) -> None:
        """Give up what is under way without waiting for its copy (the process is about to end)."""
        inflight = self._inflight
        if inflight is not None and inflight.ticket is not None:
            inflight.ticket.cancel()
            self.settle(inflight)
        self._release()


@dataclass(frozen=True)
class _Choice:
    """The lane of a capture, the chunks copied into it, and where the others come from."""

    lane: Lane
    fresh: list[int]
    base: Base | None


def _plan(arrays: PlanArrays, chunks: set[int] | None) -> CopyPlan:
    """The pieces that go to `chunks` (None: all)."""
    if chunks is None:
        return CopyPlan(*arrays)
    chosen = [i for i, chunk in enumerate(arrays.dst_index) if chunk in chunks]
    return CopyPlan(*(array(column.typecode, [column[i] for i in chosen]) for column in arrays))


SettleCallback = Callable[[Inflight], None]
