"""`Snapshotter`: what a training loop uses.

Start-up and restore may raise. In the loop nothing does unless `strict`: a failure is logged once, counted in
`health()`, and training goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snapd_native import CopyEngine
from snapd_proto import trainer_pb2 as pb

from . import estimate, faults, locate
from .agree import agree_incarnation, default_store
from .arguments import (
    COPY_THREADS_MAX,
    SLOTS_MAX,
    STEP_MAX,
    checked_step,
    one_of,
    seconds,
    texts,
    whole_number,
)
from .capture import Audit, Capturer, Outcome
from .collection import without_collection
from .control import ControlThread
from .ending import CLOSE_TIMEOUT_S, close_session, unwatch, wait_settled, watch
from .errors import ConfigError, SnapdError, UnavailableError
from .health import Health
from .levels import ask_last, check_level, durable_step, wait_level
from .restore import Asked
from .restore import Context as RestoreContext
from .restore import restore as restore_state
from .session import Session
from .sharing import DIFFER
from .state.loaders import rng_neutral
from .state.resharding import Reshard, check_reshard
from .state.tree import StateTree
from .trouble import Trouble
from .version import VERSION
from .world import World, job_name

_turns: dict[str, int] = {}


@dataclass(frozen=True)
class Handle:
    """One snapshot that was handed over, or not."""

    generation: int
    step: int
    is_handed_over: bool
    reason: str = ""


class Snapshotter:
    """Keeps the state of a training job safe, one snapshot per `interval` steps.

    Args:
        state: name -> module, optimizer (or a dict or list of them), scheduler, loader, scaler, anything with
            `state_dict()`/`load_state_dict()`, tensors, or plain values.
        job: the run's name; default `SNAPD_JOB`.
        interval: take a snapshot at the steps that it divides.
        strict: raise in the loop when a snapshot fails.
        audit: "sampled" (default), "full", "counters": see docs/checks.md.
        gradients: capture `.grad` too.
        wait_max_s: the longest that `step` waits for a free slot before it skips the step on all ranks.
        copy_threads: native copy threads; one is enough unless the step is shorter than the copy.
        slots: how many snapshots the arena holds, the one being captured included; 0: the daemon's default.
        fresh: start anew although the job has snapshots; they are dropped when the first new one is complete.
        trust: top-level packages whose objects may be rebuilt from their fields, beside the optimizer's own.
        runtime_dir: folder of the daemon's sockets; default `SNAPD_RUNTIME_DIR`, then `XDG_RUNTIME_DIR`.
    Raises:
        SnapdError: the daemon cannot be reached or started, the arena is too small, the environment is wrong.
    """

    def __init__(
        self,
        state: Mapping[str, object],
        *,
        job: str | None = None,
        interval: int = 1,
        strict: bool = False,
        audit: str = "sampled",
        gradients: bool = False,
        wait_max_s: float = 2.0,
        copy_threads: int = 1,
        slots: int = 0,
        fresh: bool = False,
        trust: Sequence[str] = (),
        runtime_dir: str | None = None,
    ) -> None:
        self.job = job_name(job)
        self.world = World.from_environment()
        self._interval = whole_number("interval", interval, low=1, high=STEP_MAX)
        self._wait_max_s, self._fresh = seconds("wait_max_s", wait_max_s), fresh
        self._effective_interval = self._interval
        how = Audit(one_of("audit", audit, [mode.value for mode in Audit]))
        slots = whole_number("slots", slots, low=0, high=SLOTS_MAX)
        copy_threads = whole_number("copy_threads", copy_threads, low=1, high=COPY_THREADS_MAX)
        self._gradients = gradients
        self._pid = os.getpid()
        self._health = Health()
        self._trouble = Trouble(self._health, is_strict=strict)
        self._is_closed = False
        self._is_started = False  # restored, or stepped
        self._is_restored = False
        self._rollback_count = 0
        self._last: Handle | None = None
        self._replica_difference = ""
        self._has_updated = True
        self._hooks: list[Any] = []
        self._tree = StateTree(
            state, gradients=gradients, rank=self.world.rank, world_size=self.world.world_size, job=self.job
        )
        self._tree.trust(texts("trust", trust))
        self._session = Session(
            locate.find_sockets(
                runtime_dir, is_one_machine=self.world.local_world_size == self.world.world_size
            ),
            VERSION,
        )
        self._open(slots)
        self._engine = CopyEngine(copy_threads)
        self._control = ControlThread(self._session, self._trouble.lose)
        self._capturer = Capturer(
            self._tree, self._session, self._engine, self._control, self._health, how, self.world
        )
        self._control.start()
        self._capturer.warm_up()
        for number, optimizer in enumerate(self._tree.optimizers):
            self._hooks.append(
                optimizer.register_step_pre_hook(self._fence_hook(self._tree.fence_group(number)))
            )
        watch(self)

    # --- start-up -----------------------------------------------------------------------------------------------
    def _open(self, slots: int) -> None:
        world = self.world
        turn = _turns.get(self.job, 0)
        _turns[self.job] = turn + 1
        incarnation = agree_incarnation(
            default_store(), job=self.job, rank=world.rank, world_size=world.world_size, turn=turn
        )
        self._session.open(
            pb.OpenSessionRequest(
                job=self.job,
                incarnation=incarnation,
                rank=world.rank,
                world_size=world.world_size,
                local_rank=world.local_rank,
                local_world_size=world.local_world_size,
                node_rank=world.node_rank,
                state_bytes_estimate=estimate.state_bytes(self._tree),
                slots=slots,
                interval_steps=self._interval,
                fresh=self._fresh,
                pid=self._pid,
            )
        )

    @property
    def generation(self) -> int:
        """This start's number; it grows with every start, restore and rollback."""
        return self._session.generation

    def restore(
        self,
        *,
        step: int | None = None,
        accept_older: bool = False,
        allow_partial: Sequence[str] = (),
        reshard: Mapping[str, Reshard] | None = None,
    ) -> int:
        """Put the newest snapshot that is complete and verified on all ranks into the live state.

        Call it on every rank, once, before the loop. Returns the step to go on from; 0 if the job has none. The number
        of ranks and the mesh may be others than when it was taken: tensors are put together from the boxes that were
        saved (docs/elastic.md).

        Args:
            reshard: for each loader, by its name in the mapping, what becomes of its place in the data when the number
                of ranks has changed: "keep", or a function of (states of the saved ranks, rank, world size).

        Raises:
            NotRestorable: snapshots exist and none can be used; lists why.
            RestoreMismatch: other names or shapes; nothing was changed.
            UnavailableError: the daemon does not answer.
        """
        self._check_open()
        wanted = None if step is None else checked_step(step)
        asked = Asked(wanted, accept_older, texts("allow_partial", allow_partial), dict(reshard or {}))
        check_reshard(asked.reshard, self._tree.state)
        self._is_started = True
        try:
            restored = restore_state(self._restore_context(), asked)
        except SnapdError as error:
            if error.kind == "restore_step" and self._is_restored:
                raise ConfigError(
                    "restore() was called before, with other arguments",
                    hint="rollback(step) goes back in place",
                ) from error
            raise
        self._is_restored = True
        self._control.populate()
        return restored

    def rollback(self, step: int | None = None) -> int:
        """Go back to a snapshot in place, on all ranks, without leaving the process. Returns its step.

        Raises:
            NotRestorable: that snapshot is not held (the arena keeps the newest, more with `slots`).
        """
        self._check_open()
        wanted = None if step is None else checked_step(step)
        self._capturer.finish()
        wait_settled(self._session, self._health.last_committed_step)
        self._rollback_count += 1
        request = pb.BeginRollbackRequest(
            session_id=self._session.session_id, rollback_count=self._rollback_count
        )
        reply = self._session.call(lambda stub, **options: stub.BeginRollback(request, **options))
        self._session.generation = reply.generation
        self._capturer.forget_base()
        self._last = None
        return restore_state(self._restore_context(), Asked(wanted))

    def _restore_context(self) -> RestoreContext:
        return RestoreContext(self._tree, self._session, self.job, self.world)

    @property
    def values(self) -> dict[str, object]:
        """Plain values of the mapping as the last restore found them (numbers cannot be written back in place)."""
        return self._tree.restored_values

    # --- the loop -----------------------------------------------------------------------------------------------
    def step(self, step: int, *, wait: str | None = None) -> Handle | None:
        """After the update of `step`: hand its state over if a snapshot is due, and return.

        Args:
            wait: a level to wait for, e.g. "captured".
        Raises:
            ConfigError: `step` is no whole number, or `wait` no level, and nothing was handed over yet: a mistake in
            the loop. Later in a run it is a failure like any other, which is logged and counted.
        """
        number = self._checked_call(step, wait)
        if number is None or self._is_closed or not self._is_due(number):
            self._has_updated = False
            return None
        return self._save(number, wait)

    def save(self, step: int, *, wait: str | None = None) -> Handle | None:
        """Capture now, whatever the interval. Raises ConfigError as `step` does."""
        number = self._checked_call(step, wait)
        return None if number is None or self._is_closed else self._save(number, wait)

    def _save(self, step: int, wait: str | None) -> Handle | None:
        if os.getpid() != self._pid:
            return None
        if not self._is_started:
            self._refuse_to_overwrite()
        if self._last is not None and self._last.step == step and self._last.is_handed_over:
            self._trouble.warn_once(
                "same-step", f"step {step} of generation {self.generation} is captured already"
            )
            return self._last
        if self._last is not None and step < self._last.step:
            self._trouble.warn_once(
                "steps",
                f"step {step} comes after step {self._last.step}: steps must grow (not begin anew with each epoch), "
                "a restart goes on from the highest",
            )
        started = time.monotonic()
        with without_collection():
            handle: Handle | None = self._trouble.guard("snapshot", lambda: self._hand_over(step))
        self._health.handover_s.append(time.monotonic() - started)
        if wait is not None and handle is not None and handle.is_handed_over:
            self.wait(wait)
        return handle

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this Snapshotter is closed", hint="close() comes last", job=self.job)

    def _checked_call(self, step: int, wait: str | None) -> int | None:
        """The step's number; None: it is none, and a run that has been going is not ended for that."""

        def checked() -> int:
            if wait is not None:
                check_level(wait)
            return step if type(step) is int and 0 <= step <= STEP_MAX else checked_step(step)

        return checked() if self._last is None else self._trouble.guard("snapshot", checked)

    def _hand_over(self, step: int) -> Handle:
        self._notice_accumulation()
        self._control.populate()
        outcome = self._capturer.hand_over(step, self._wait_max_s, self._effective_interval)
        if outcome is Outcome.SKIPPED:
            self._health.skipped += 1
            self._trouble.warn_once(
                "skipped", f"step {step} was skipped: no slot came free within {self._wait_max_s} s"
            )
        elif outcome is Outcome.FENCED:
            self._health.is_fenced = True
            self._trouble.warn_once(
                "fenced", f"a newer generation of job {self.job} runs: this process saves nothing more"
            )
        if self._capturer.replicas() == DIFFER:
            self._trouble.warn_once(
                "replicas",
                "what should be replicas on this node is not alike: from now on each rank saves all that it has; "
                "health()['replica_difference'] and `snapd status` name the tensor",
            )
        handed_over = outcome is Outcome.HANDED_OVER
        self._last = Handle(self.generation, step, handed_over, "" if handed_over else outcome.value)
        return self._last

    def _is_due(self, step: int) -> bool:
        """By the interval that all ranks agreed on; a new one counts from its step on, until then the last one."""
        page = self._session.page
        if page is not None and step >= page.load("interval_from_step"):
            self._effective_interval = page.load("interval_steps") or self._interval
        return step % self._effective_interval == 0

    def _refuse_to_overwrite(self) -> None:
        """The first save without a restore, although the job has snapshots: a mistake that would lose them."""
        self._is_started = True
        opened = self._session.reply
        if opened.has_parent and not self._fresh:
            self._is_started = False
            raise ConfigError(
                "the job has snapshots, and this run began without restoring one",
                hint="call snap.restore() before the loop, or pass fresh=True to start anew",
                job=self.job,
                newest_step=opened.newest_step,
                generation=opened.newest_generation,
            )

    def _notice_accumulation(self) -> None:
        if not self._has_updated and not self._gradients and self._tree.has_gradients():
            self._trouble.warn_once(
                "gradients",
                "gradients are being accumulated and are not part of the snapshot (gradients=True captures them)",
            )
        self._has_updated = False

    def fence(self) -> None:
        """Before a hand-made update: everything is copied when this returns."""
        self._fence(None)

    def _fence_hook(self, group: int) -> Callable[..., None]:
        reference = weakref.ref(self)

        def snapd_fence(*_: object) -> None:
            snapshotter = reference()
            if snapshotter is not None:
                snapshotter._fence(group)

        snapd_fence._torchdynamo_disable = True  # type: ignore[attr-defined]  # a compiled step calls it, untraced
        return snapd_fence

    def _fence(self, group: int | None) -> None:
        self._has_updated = True
        if self._is_closed or os.getpid() != self._pid:
            return
        started = time.monotonic()
        self._trouble.guard("fence", lambda: self._capturer.fence(group))
        self._health.fence_s.append(time.monotonic() - started)

    # --- asking and waiting -------------------------------------------------------------------------------------
    def wait(self, level: str = "captured", timeout: float | None = None) -> str:
        """Wait until the last snapshot handed over has `level` on all ranks; returns the level that it has.

        Raises:
            ConfigError: no such level.
            UnavailableError: the time ran out, the snapshot was dropped, or the tier refuses it in a way that
                waiting does not mend; the message says which.
        """
        check_level(level)
        self._check_open()
        timeout_s = CLOSE_TIMEOUT_S if timeout is None else seconds("timeout", timeout)
        if self._last is None or not self._last.is_handed_over:
            raise UnavailableError("nothing was handed over that could be waited for")
        self._capturer.finish()
        return wait_level(self._session, self._last.step, level, timeout_s)

    def last(self, level: str = "captured") -> int | None:
        """The newest step that has `level` on all ranks."""
        check_level(level)
        self._check_open()
        reply = ask_last(self._session, level)
        return reply.step if reply.found else None

    def health(self) -> dict[str, object]:
        """Counters and recent durations (seconds); what went wrong last, in words."""
        facts = self._health.summary()
        page = self._session.page
        facts["is_connected"] = self._session.is_connected
        facts["reconnects"] = self._session.reconnect_count
        if page is not None:
            facts["captured_step"] = page.load("captured_step_plus_one") - 1
            facts["complete_step"] = page.load("complete_step_plus_one") - 1
        facts["durable_step"], facts["durable_tier"] = durable_step(self._session)
        facts["replicas"] = self._capturer.replicas()
        if facts["replicas"] == DIFFER and not self._replica_difference:
            with contextlib.suppress(SnapdError):
                self._replica_difference = ask_last(self._session, "captured").replica_difference
        facts["replica_difference"] = self._replica_difference
        return facts

    @contextlib.contextmanager
    def rng_neutral(self) -> Iterator[None]:
        """Leaves the global random generators as they were: for loaders outside the mapping."""
        with rng_neutral():
            yield

    # --- the end ------------------------------------------------------------------------------------------------
    def close(self, *, final: bool = False) -> None:
        """Wait for what is under way and leave; the snapshots stay. `final=True`: the job is done, drop them.

        Idempotent. Raises nothing: what could not be waited for is logged.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        with contextlib.suppress(SnapdError):
            self._capturer.finish()
            wait_settled(self._session, self._health.last_committed_step)
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        close_session(self._session, final=final)
        self._shut_down()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shut_down(self) -> None:
        self._capturer.abandon()
        self._control.stop()
        self._engine.close()
        self._session.disconnect()
        unwatch(self)

    def at_exit(self) -> None:
        """The process ends without close(): finish the copy, so that the last step is safe, and join the threads."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        with contextlib.suppress(SnapdError):
            self._capturer.finish()
        self._shut_down()

    def abandon_in_child(self) -> None:
        """The process was forked, and this is the child."""
        self._is_closed = True
        self._session.abandon_in_child()
        self._control.abandon_in_child()


faults.point("client.imported")
