"""One capture after the other: hand over, copy, check, commit.

The training thread hands over and goes on; copy threads or a side stream fill the chunks; `inflight` concludes.

Order that must hold: entries and counts are written before OPEN; OPEN before the first lazy byte is copied; the last
check before COMPLETE; the fence returns only when the bytes of its group are safe from what the training thread does
next, and their counters are compared.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence

import snapd_native as native
from snapd_native import ControlPage, CopyEngine

from . import faults
from .control import ControlThread
from .device import DeviceCapture, Sampling
from .errors import FencedError, UnavailableError
from .health import Health
from .inflight import Held, Inflight
from .lanes import LaneBook, Placement
from .plans import LayoutPlans
from .session import Session
from .sharing import FULL, Sharing
from .stage import DeviceStage
from .state.layout import Binding, build_layout
from .state.tree import StateTree, Walk
from .transfer import DoneTransfer, HostTransfer, JointTransfer, Transfer
from .world import World

_log = logging.getLogger(__name__)

STRIKES_MAX = 2
FINISH_BYTES = (
    4 << 20
)  # at a fence, what is left of other groups up to this is copied too: then all can be settled


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


class Capturer:
    """The capture pipeline of one session. Public methods are called on the training thread."""

    def __init__(
        self,
        tree: StateTree,
        session: Session,
        engine: CopyEngine,
        control: ControlThread,
        health: Health,
        audit: Audit,
        world: World,
    ) -> None:
        self._tree, self._session, self._engine = tree, session, engine
        self._control, self._health, self._audit = control, health, audit
        self._lanes = LaneBook(session, control.poke)
        self._plans: LayoutPlans | None = None  # of the full layout
        self._sharing = Sharing(world)
        self._signature: object = None
        self._inflight: Inflight | None = None
        self._stage: DeviceStage | None = None
        self._is_graph_known = False
        self._sequence = 0
        self._strikes: dict[str, int] = {}
        groups = {tree.fence_group(number) for number in range(len(tree.optimizers))}
        self._groups = frozenset(groups | {0})

    def warm_up(self) -> None:
        """Make a layout of what is there at start-up: if nothing joins it is kept, else the next one is made faster.

        Raises:
            CaptureError: the state holds something that cannot be captured; names it.
        """
        if self._session.page is not None and self._sharing.is_possible:
            self._sharing.announce(self._session.page)
        plans, _ = self._rebuild(self._tree.walk())
        plans.choose(None)
        if plans.device.regions:
            self._open_stage()

    # --- handing over -------------------------------------------------------------------------------------------
    def hand_over(self, step: int, wait_max_s: float, interval: int) -> Outcome:
        """Take the early part, start the lazy part, and return. `interval`: steps between captures, on all ranks.

        Raises:
            CaptureError: the state holds something that cannot be captured; names it.
        """
        page = self._session.page
        if page is None or page.load("fenced"):
            return Outcome.FENCED
        faults.point("client.handover.before")
        started_ns = time.monotonic_ns()
        self.finish()
        self._move_to_early()
        page.store("step_seen_plus_one", step + 1)
        walk = self._tree.walk()
        plans, binding = self._fit(walk, self._sharing.is_due(page, step, interval))
        early = walk.encode_early(self._session.generation, step)
        if len(early) > plans.layout.early_values_capacity:
            plans, binding = self._rebuild(walk)
        unchanging = plans.marks(binding)
        fresh, base = self._lanes.fresh_chunks(plans.layout, unchanging, frames_min=self._frames_min())
        lane = self._lanes.take(len(fresh), wait_max_s)
        if lane is None:
            self._skip(page, step)
            return Outcome.SKIPPED
        placement = self._lanes.places(plans.layout, lane, fresh, base)
        choice = plans.choose(None if base is None else fresh)
        held = Held(walk, binding)
        inflight = Inflight(
            step, lane, held, plans.layout, placement, choice,
            sample=None, is_full_audit=self._audit is Audit.FULL, groups=self._groups,
            chunk_bytes=self._session.chunk_bytes,
        )  # fmt: skip
        self._take_early(inflight, binding, early)
        self._open_lane(page, inflight, len(early), started_ns)
        self._inflight = inflight
        self._start_transfer(inflight, held, plans)
        self._lanes.note(plans.layout, unchanging, step, lane)
        self._sharing.note(step, is_full=plans is self._plans)
        faults.point("client.handover.after")
        return Outcome.HANDED_OVER

    def _fit(self, walk: Walk, is_shared_out: bool) -> tuple[LayoutPlans, Binding]:
        """Plans whose layout fits the walk: the known ones, unless structure or aliasing changed."""
        plans = self._plans
        if plans is not None and self._signature == walk.signature:
            if is_shared_out:
                plans = self._sharing.plans or self._share_out(walk)
            binding = plans.layout.bind(walk)
            if binding is not None:
                return plans, binding
        return self._rebuild(walk)

    def _rebuild(self, walk: Walk) -> tuple[LayoutPlans, Binding]:
        self._sharing.forget()
        plans = self._plans = self._make_plans(walk, range(0))
        self._signature = walk.signature
        binding = plans.layout.bind(walk)
        if binding is None:
            raise RuntimeError("a layout does not fit the walk that it was made from")
        return plans, binding

    def _share_out(self, walk: Walk) -> LayoutPlans:
        """The layout without what other ranks of this node keep; it stays beside the full one."""
        plans = self._sharing.plans = self._make_plans(walk, self._sharing.node_ranks)
        return plans

    def _make_plans(self, walk: Walk, node_ranks: Sequence[int]) -> LayoutPlans:
        self._health.layouts += 1
        chunk_bytes = self._session.chunk_bytes
        return LayoutPlans(
            build_layout(self._tree, walk, chunk_bytes=chunk_bytes, node_ranks=node_ranks), walk, chunk_bytes
        )

    def _frames_min(self) -> int:
        """While captures are shared out lanes stay large enough for a full one: it must not wait for a grant."""
        if self._sharing.plans is None or self._plans is None:
            return 0
        return len(self._plans.layout.chunk_nbytes)

    def replicas(self) -> str:
        """See Sharing.state."""
        page = self._session.page
        return FULL if page is None else self._sharing.state(page)

    def _skip(self, page: ControlPage, step: int) -> None:
        """The abort record: this step is taken on no rank."""
        page.store("skipped_step_plus_one", step + 1)
        page.add("skipped_count", 1)
        self._lanes.wake()

    def _take_early(self, inflight: Inflight, binding: Binding, early: bytes) -> None:
        """What may change as soon as `snap.step` returns, and the samples of what may not."""
        layout, placement, choice = inflight.layout, inflight.placement, inflight.choice
        if placement.flags[0] != native.ENTRY_REUSED:
            self._write(placement, 0, layout.serialized)
        self._write(placement, layout.early_values_offset, early.ljust(layout.early_values_capacity, b"\0"))
        bases, addresses = binding.bases, placement.addresses
        choice.early.run(bases, addresses)
        if self._audit is Audit.SAMPLED:
            inflight.sample = choice.lazy.sample(bases, self._sequence)
        elif self._audit is Audit.FULL:
            choice.lazy.run(bases, addresses)
        self._health.early_bytes = choice.early.nbytes + len(early)
        self._health.lazy_bytes = choice.lazy.nbytes

    def _open_lane(self, page: ControlPage, inflight: Inflight, early_nbytes: int, started_ns: int) -> None:
        self._sequence += 1
        lane, layout, placement = inflight.lane.index, inflight.layout, inflight.placement
        page.write_entries(lane, placement.segments, placement.frames, layout.chunk_nbytes, placement.flags)
        for name, value in (
            ("sequence", self._sequence),
            ("generation", self._session.generation),
            ("step", inflight.step),
            ("layout_nbytes", len(layout.serialized)),
            ("early_values_offset", layout.early_values_offset),
            ("early_values_nbytes", early_nbytes),
            ("handed_over_ns", started_ns),
            ("discard_reason", 0),
        ):
            page.lane_store(lane, name, value)
        faults.point("client.open.before")
        if not page.set_lane_state(lane, native.LANE_GRANTED, native.LANE_OPEN):
            raise FencedError("the lane was taken back", lane=lane)
        faults.point("client.open.after")

    def _start_transfer(self, inflight: Inflight, held: Held, plans: LayoutPlans) -> None:
        """Nothing is under way if this raises: the lane goes back, and its frames to somebody else."""
        device = self._start_device(inflight, held, plans) if plans.device.regions else None
        try:
            transfer = self._start_host(inflight, held)
        except Exception:
            if device is not None:
                device.transfer.wait()
            raise
        if device is not None:
            inflight.device = device
            transfer = JointTransfer(transfer, device.transfer, self._warn_of_graph)
        inflight.transfer = transfer
        for fileno in transfer.filenos():
            self._control.watch(fileno, lambda: self._settle_if_done(inflight))

    def _start_host(self, inflight: Inflight, held: Held) -> Transfer:
        if self._audit is Audit.FULL:
            return DoneTransfer(inflight.choice.lazy.nbytes)
        bases, addresses = held.binding.bases, inflight.placement.addresses
        return HostTransfer(self._engine.submit(inflight.choice.lazy, bases, addresses))

    def _start_device(self, inflight: Inflight, held: Held, plans: LayoutPlans) -> DeviceCapture:
        sampling = Sampling(
            self._audit is not Audit.COUNTERS, self._sequence, is_full=self._audit is Audit.FULL
        )
        capture = plans.device.start(
            self._open_stage(), held.walk, held.binding, inflight.placement,
            chunks=inflight.choice.chunks, sampling=sampling,
        )  # fmt: skip
        self._health.early_bytes += capture.early_nbytes
        self._health.lazy_bytes += capture.lazy_nbytes
        return capture

    def _open_stage(self) -> DeviceStage:
        """The stage, with all segments pinned: those that are mapped now, and each new one before it is used."""
        if self._stage is None:
            self._stage = DeviceStage()
            self._session.pin_with(self._stage.register)
        return self._stage

    def _warn_of_graph(self) -> None:
        if not self._is_graph_known:
            self._is_graph_known = True
            _log.warning(
                "snapd: an optimizer's update is being captured in a CUDA graph, whose replays call no hooks: "
                "call snap.fence() before each replay"
            )

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

    # --- the fence and the end of a capture ---------------------------------------------------------------------
    def fence(self, group: int | None) -> None:
        """Before the tensors of `group` (None: all) change: their bytes are safe and their counters compared."""
        inflight = self._inflight
        if inflight is None or inflight.is_settled:
            return
        faults.point("client.fence.before")
        transfer = inflight.transfer
        if transfer is None:
            raise UnavailableError("a capture failed while it was handed over", step=inflight.step)
        if not transfer.is_done():
            helped = transfer.helped_bytes
            transfer.fence(-1 if group is None else group)
            if transfer.left_bytes() <= FINISH_BYTES:
                transfer.help_rest()
            self._health.helped_bytes += transfer.helped_bytes - helped
        if transfer.is_done():
            self._settle(inflight)
        else:
            inflight.check_group(group)
        faults.point("client.fence.after")

    def finish(self) -> None:
        """Complete and settle what is under way, if anything."""
        inflight, transfer = self._inflight, self._inflight.transfer if self._inflight else None
        if inflight is None:
            return
        if transfer is None:
            self._drop(inflight)
            return
        if not inflight.is_settled:
            transfer.wait()
            self._settle(inflight)
        self._release()

    def _release(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None and inflight.transfer is not None:
            for fileno in inflight.transfer.filenos():
                self._control.unwatch(fileno)
            inflight.transfer.close()  # not when it is settled: that may be before all of them are watched

    def _drop(self, inflight: Inflight) -> None:
        """The hand-over failed after OPEN: give the lane back."""
        page = self._session.page
        if page is not None and page.set_lane_state(
            inflight.lane.index, native.LANE_OPEN, native.LANE_DISCARDED
        ):
            self._lanes.wake()
        self._inflight = None

    def _settle_if_done(self, inflight: Inflight) -> None:
        if inflight.transfer is not None and inflight.transfer.is_done():
            self._settle(inflight)

    def _settle(self, inflight: Inflight) -> None:
        """Any thread."""
        if not inflight.settle(self._session.page, self._session.wake_fd):
            return
        health = self._health
        if not inflight.reason:
            health.committed += 1
            health.last_committed_step = inflight.step
            health.note_window(inflight.window_ns)
            return
        self._lanes.wake()
        health.discarded += 1
        health.last_discard = sorted(inflight.changed)[:10]
        for name in inflight.changed:
            self._strikes[name] = self._strikes.get(name, 0) + 1

    def _move_to_early(self) -> None:
        """Tensors that failed their check twice are taken before `snap.step` returns from now on."""
        failed = [name for name, strikes in self._strikes.items() if strikes >= STRIKES_MAX]
        for name in failed:
            self._tree.force_early(name)
            self._strikes[name] = -(1 << 30)
            _log.warning(
                "snapd: %s changes outside the optimizer's update; it is captured before snap.step returns from now on",
                name,
            )
        if failed:
            self._signature, self._plans = None, None

    def forget_base(self) -> None:
        """Copy everything next time (after a rollback)."""
        self._lanes.forget_base()
        self._sharing.forget()

    def abandon(self) -> None:
        """Give up what is under way without waiting for its copy (the process is about to end)."""
        inflight = self._inflight
        if inflight is not None and inflight.transfer is not None:
            if not inflight.is_settled:
                inflight.transfer.cancel()
                self._settle(inflight)
            self._release()
        if self._stage is not None:
            self._session.pin_with(None)
            self._stage.close()
            self._stage = None
