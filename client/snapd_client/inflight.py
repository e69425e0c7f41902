"""A capture between its hand-over and its commit: what it holds, what is checked, who concludes.

Settling happens once, on whichever thread comes first after the last byte: the control thread, or the training thread
at the fence. It ends in COMPLETE or DISCARDED, never in neither.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import snapd_native as native
from snapd_native import ControlPage

from . import faults
from .device import DeviceCapture
from .lanes import Lane, Placement
from .plans import Choice
from .state.layout import Binding, Layout
from .state.tree import Walk
from .transfer import Transfer

REASON_COUNTER, REASON_SAMPLE, REASON_AUDIT, REASON_ERROR, REASON_CLOSED = 1, 2, 4, 5, 6


@dataclass(frozen=True)
class Held:
    """What must not be freed while it is copied, and what it was like at the hand-over."""

    walk: Walk
    binding: Binding


@dataclass
class Inflight:
    """One capture. `held` keeps every tensor and storage that is being copied, until it is settled."""

    step: int
    lane: Lane
    held: Held | None
    layout: Layout
    placement: Placement
    choice: Choice
    sample: native.Sample | None
    is_full_audit: bool
    groups: frozenset[int]
    chunk_bytes: int
    transfer: Transfer | None = None
    device: DeviceCapture | None = None
    changed: set[str] = field(default_factory=set)
    reason: int = 0
    is_settled: bool = False
    window_ns: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checked: set[int] = field(default_factory=set)

    def check_group(self, group: int | None) -> None:
        """At the fence of a group whose copy is not settled yet: its counters must not be compared any later."""
        with self._lock:
            if not self.is_settled:
                self._compare_counters(self.groups if group is None else frozenset((group,)))

    def settle(self, page: ControlPage | None, wake_fd: int) -> bool:
        """Everything is copied: check, then commit or discard. False if that was done before. Any thread."""
        with self._lock:
            if self.is_settled or self.transfer is None or page is None:
                return False
            if self.transfer.is_cancelled:
                self.reason = REASON_CLOSED
            try:
                self._compare_counters(self.groups)
                self._compare_bytes()
            except Exception:
                self.reason = REASON_ERROR  # a capture that cannot be checked is not committed
                raise
            finally:
                faults.point("client.checked")
                self._conclude(page, wake_fd)
                self.is_settled = True
                self.held = self.sample = None  # freed here, seldom on the training thread
            return True

    def _compare_counters(self, groups: frozenset[int]) -> None:
        unchecked = groups - self._checked
        if not unchecked or self.held is None:
            return
        changed = self.held.binding.changed_since(self.held.walk, set(unchecked))
        self._checked |= unchecked
        if changed:
            self.changed.update(changed)
            self.reason = self.reason or REASON_COUNTER

    def _compare_bytes(self) -> None:
        regions: list[int] = []
        if self.sample is not None:
            regions = self.sample.differing(self.placement.addresses)
        elif self.is_full_audit and self.held is not None:
            regions = self.choice.lazy.differing(self.held.binding.bases, self.placement.addresses)
        if self.device is not None:
            regions = [*regions, *self.device.differing(self.placement, self.chunk_bytes)]
        if regions:
            self.changed.update(self.layout.region_names[region] for region in regions)
            self.reason = self.reason or (REASON_AUDIT if self.is_full_audit else REASON_SAMPLE)

    def _conclude(self, page: ControlPage, wake_fd: int) -> None:
        lane, transfer = self.lane.index, self.transfer
        assert transfer is not None
        page.lane_store(lane, "copied_ns", transfer.finished_ns)
        page.lane_store(lane, "copied_bytes", transfer.copied_bytes())
        if self.reason:
            page.lane_store(lane, "discard_reason", self.reason)
            page.set_lane_state(lane, native.LANE_OPEN, native.LANE_DISCARDED)
            return
        faults.point("client.commit.before")
        page.commit(lane, wake_fd)
        self.window_ns = time.monotonic_ns() - page.lane_load(lane, "handed_over_ns")
        faults.point("client.commit.after")
