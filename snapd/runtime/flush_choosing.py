"""What of one job is to be flushed by this node, as far as it is known now: the state behind core/flushing.py."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from snapd.core.flushing import FlushChoice, FlushRules, FlushSituation, choose_flush
from snapd.core.ids import SnapshotId
from snapd.core.reports import FlushNews
from snapd.core.tier_failures import may_pass
from snapd.runtime.job import Job, WorldPart

LASTING_TRIES = 2
STUCK_AFTER_S = 30.0  # nothing counts as stuck before: another snapshot is named then, and all begin anew
Ordered = Callable[[WorldPart], SnapshotId | None]


class FlushChooser:
    """Of one job. On the event loop. `floor`: the highest generation that the tier had before the job began; None: not
    known yet. `ordered`: what the collector of a world that spans nodes names for this tier. `current`: what was begun
    last.
    """

    def __init__(
        self, job: Job, rules: FlushRules, floor: int | None, ordered: Ordered = attrgetter("flush")
    ) -> None:
        self._job, self._rules, self._ordered = job, rules, ordered
        self.floor = floor
        self.durable: SnapshotId | None = None
        self.current: SnapshotId | None = None
        self.is_ending = False
        self.urged = 0  # how often somebody with little patience has come
        self._lasting = 0  # attempts in a row since then that failed in a way that waiting does not mend
        self.dropped: set[SnapshotId] = set()  # by retention, in the tier: never again
        self.brought: set[SnapshotId] = set()  # from the tier into memory
        self._wanted: SnapshotId | None = None
        self._first_steps: dict[int, int] = {}
        self._named: SnapshotId | None = None
        self._named_at_s = 0.0
        self.began_s = self._now_s()
        self._durable_at_s = job.context.environment.wall_s()

    def _now_s(self) -> float:
        return self._job.context.environment.monotonic_s()

    # what is known

    @property
    def newest(self) -> SnapshotId | None:
        """The newest snapshot that could become durable."""
        if self._job.world is not None:
            return self._job.world.complete
        newest = self._job.ledger.newest_complete()
        return newest.id if newest is not None else None

    def is_durable(self, snapshot: SnapshotId) -> bool:
        return self.durable is not None and self.durable >= snapshot

    def note_durable(self, snapshot: SnapshotId | None) -> bool:
        """Whether that is news."""
        if snapshot is None or self.is_durable(snapshot):
            return False
        self.durable = snapshot
        self._lasting = 0
        facts = self._job.ledger.snapshots.get(snapshot)
        if facts is not None and facts.shards:
            self._durable_at_s = max(s.record.captured_wall_time_s for s in facts.shards.values())
        return True

    def note_lost(self, durable: SnapshotId | None) -> None:
        """What was there has gone bad: `durable` is the newest that is good. Memory's newest takes its place."""
        self.durable = durable
        if self.newest is not None:
            self.brought.discard(self.newest)
            self._wanted = max(self.newest, self._wanted or self.newest)

    def behind_s(self) -> float:
        """Since the newest durable snapshot was captured."""
        return max(0.0, self._job.context.environment.wall_s() - self._durable_at_s)

    def want(self, snapshot: SnapshotId) -> bool:
        """Have it, or a newer one, become durable; whether that is news."""
        if self._wanted is not None and snapshot <= self._wanted:
            return False
        self._wanted = snapshot
        return True

    def is_behind(self) -> bool:
        """Whether the newest complete snapshot may still become durable, and is not."""
        newest = self.newest
        return newest is not None and not self.is_durable(newest) and not self.is_barred

    def urge(self) -> None:
        """Somebody waits from now on: what was refused so far is tried anew, for a person may have mended it."""
        self.urged += 1
        self._lasting = 0

    def note_failed(self, kind: str) -> None:
        """An attempt ended with an error of that kind."""
        self._lasting = 0 if may_pass(kind) else self._lasting + 1

    @property
    def is_hopeless(self) -> bool:
        """Waiting does not help. Said after a second try: a refusal has the store look for other credentials."""
        return self._lasting >= LASTING_TRIES

    @property
    def is_to_be_confirmed(self) -> bool:
        """It was refused, and the second try is still to come."""
        return 0 < self._lasting < LASTING_TRIES

    @property
    def is_barred(self) -> bool:
        """The newest complete snapshot will never become durable; only a newer one may."""
        newest, floor = self.newest, self.floor
        is_older = newest is not None and floor is not None and newest.generation <= floor
        return newest in self.dropped or (is_older and newest not in self.brought)

    def begin(self, snapshot: SnapshotId) -> None:
        """It is being flushed from now on."""
        if snapshot != self.current:
            self.current, self.began_s = snapshot, self._now_s()

    # choosing

    def choose(self, stuck: str) -> FlushChoice:
        """What this node flushes now: its own choice on one machine, the collector's where worlds span nodes. `stuck`:
        why the current one does not go on, if so.
        """
        if self._job.world is None:
            current = self.current
            if current is not None and not self._is_usable(current):
                current = None
            return self._own(current, stuck)
        own, named = self._own(None, ""), self._ordered(self._job.world)
        if own.pause:
            return own
        if named is None or self.is_durable(named):
            waits = "the job's collector has still to name the snapshot"
            return FlushChoice(None, own.reason if own.snapshot is None else waits, due_s=own.due_s)
        if not self._is_here(named):
            return FlushChoice(None, f"nothing of {named} is here", due_s=own.due_s)
        return FlushChoice(named, "being flushed by all nodes")

    def _own(self, current: SnapshotId | None, stuck: str) -> FlushChoice:
        newest = self.newest
        if newest is not None:
            self._first_steps.setdefault(newest.generation, newest.step)
            if newest in self.dropped:
                reason = f"retention has dropped {newest} from the tier; the next snapshot takes its place"
                return FlushChoice(None, reason)
        situation = FlushSituation(
            newest=newest,
            durable=self.durable,
            current=current,
            stuck=stuck,
            first_step=self._first_steps.get(newest.generation, 0) if newest is not None else 0,
            waited_s=self._now_s() - self.began_s,
            floor=self.floor,
            wanted=self._wanted,
            is_ending=self.is_ending,
            is_brought=newest in self.brought,
            generation=self._job.coordination.current(),
        )
        return choose_flush(self._rules, situation)

    def _is_here(self, snapshot: SnapshotId) -> bool:
        """Some of its shards are, and the collector says that it is complete."""
        facts = self._job.ledger.snapshots.get(snapshot)
        return facts is not None and not facts.problem and snapshot not in self.dropped

    def _is_usable(self, snapshot: SnapshotId) -> bool:
        return self._is_here(snapshot) and self._job.ledger.snapshots[snapshot].is_complete

    def news(self, stuck: str, *, is_busy: bool) -> FlushNews:
        """What the job's collector is told."""
        named = self._ordered(self._job.world) if self._job.world is not None else None
        if named != self._named:
            self._named, self._named_at_s = named, self._now_s()
        is_late = named is not None and self._now_s() - self._named_at_s > STUCK_AFTER_S
        return FlushNews(self.durable, self._own(None, "").snapshot, stuck if is_late else "", is_busy)
