"""Protecting one job's snapshots: this node's part of a target, from the records of its group to the last fragment.

`aim` names the target; everything else goes on by itself until another is named: records are fetched, rows planned,
memory backed, the row map stored, and the rows that this node leads are coded, unless their parity is there already.
The part is done when this node holds every fragment that the plan gives it and all records. Nothing here waits for a
trainer, and no trainer for anything here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from snapd.codec.base import Codec
from snapd.core.cluster import Code, Group
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.protection import PlacedRecord, RowMap, RowPlan, make_plan
from snapd.errors import CapacityError, IntegrityError, SnapdError
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import Links
from snapd.runtime.bulk_store import FragmentCommits
from snapd.runtime.coding import Bench
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.loop_caller import LoopCaller
from snapd.runtime.parity_memory import grow_for
from snapd.runtime.peer_backoff import PeerBackoff
from snapd.runtime.pipeline import Pipeline
from snapd.runtime.row_work import RowWork

REPLAN_S = 20.0  # without progress for so long, the members' records are compared again

FetchRecords = Callable[[str, SnapshotId], Awaitable[Sequence[ShardRecord]]]
"""(node, snapshot) -> the records of the shards of that snapshot whose bytes the node itself has; empty if it has none.

Raises UnavailableError when the node does not answer, NotFoundError when it does not know the snapshot (yet).
"""
Suspect = Callable[[str, str, SnapshotId, int], None]
"""(node, job, snapshot, rank): that node sends other bytes than its record says, twice. Returns at once."""
MayReplace = Callable[[str, SnapshotId, int], Awaitable[bool]]
"""(job, snapshot, epoch): whether other rows may take the place of those that were planned under that epoch. Asked
while the part does not count as done here; waits until the collector answers.
"""
MakeCodec = Callable[[Code], Codec]


async def may_always(job: str, snapshot: SnapshotId, epoch: int) -> bool:
    """Without a collector nobody counts on anything."""
    return True


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be protected, by whom, under which epoch of the group table. `group.code` is not None."""

    snapshot: SnapshotId
    epoch: int
    group: Group


@dataclass(frozen=True, slots=True)
class ProtectionState:
    """For Report and status. `plan`: identity of the row plan, empty until it is known; members that have different
    ones have not planned the same. `rows_*` count the fragments that this node is to hold. Bytes are of this target.
    """

    target: Target | None = None
    plan: bytes = b""
    is_done: bool = False
    rows_done: int = 0
    rows_total: int = 0
    rows_shared: int = 0
    trouble: str = ""
    own_bytes: int = 0
    pulled_bytes: int = 0
    pushed_bytes: int = 0
    exposure_byte_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Means:
    """What a node's protectors work with; one for all jobs."""

    node: str
    links: Links
    pipeline: Pipeline
    make_codec: MakeCodec
    fetch_records: Callable[[str], FetchRecords]  # by job
    metrics: ProtectionMetrics
    commits: FragmentCommits
    suspect: Suspect = lambda node, job, snapshot, rank: None
    may_replace: MayReplace = may_always


class Protector:
    """One per job; lives on the event loop. `on_change` is called after every change of `state`."""

    def __init__(self, job: Job, means: Means, on_change: Callable[[], None]) -> None:
        self.state = ProtectionState()
        self._job = job
        self._means = means
        self._fetch = means.fetch_records(job.name)
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._began_s = 0.0

    def aim(self, target: Target | None) -> None:
        """Protect this from now on; None: nothing. The same target again changes nothing. What was placed for the
        one before stays until `drop_protection` says otherwise.
        """
        if target == self.state.target:
            return
        self._call_off()
        self._count_exposure()
        self._began_s = self._job.context.environment.monotonic_s()
        self.state = ProtectionState(target=target, own_bytes=self._own_bytes(target))
        if target is not None and target.group.code is not None and not self._job.is_removed:
            self._stop = threading.Event()
            self._task = self._job.context.spawn(self._protect(target), f"protect {self._job.name}")
        self._on_change()

    async def close(self) -> None:
        """Call the work off, and wait until its coroutine has ended (threads end with the pipeline)."""
        task = self._task
        self._call_off()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    def _call_off(self) -> None:
        self._stop.set()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    # the steps

    async def _protect(self, target: Target) -> None:
        environment = self._job.context.environment
        backoff = PeerBackoff(environment.monotonic_s)
        with self._means.pipeline.used():
            while not self._job.is_removed:
                plan, records = await self._plan(target, backoff)
                plan = await self._new_or_known(plan)
                if not await self._take_up(plan, records, backoff):
                    continue
                if await self._work(plan, backoff):
                    return

    async def _plan(self, target: Target, backoff: PeerBackoff) -> tuple[RowPlan, list[PlacedRecord]]:
        """Fetch all records; return the rows that follow, and the records."""
        assert target.group.code is not None
        row_map = RowMap(
            target.snapshot, target.epoch, target.group.number, target.group.nodes, target.group.code
        )
        parts = await asyncio.gather(*(self._records_of(node, target, backoff) for node in row_map.nodes))
        records = [record for part in parts for record in part]
        plan = await self._means.pipeline.plan(make_plan, row_map, records)
        return plan, records

    async def _new_or_known(self, plan: RowPlan) -> RowPlan:
        """The plan that is to be worked on. Who holds what may have changed since the rows were planned that lie here;
        they give way only once nobody counts on them.
        """
        known = self._job.parity.plan(*plan.map.key)
        if known is None or known.identity == plan.identity:
            return plan
        return plan if await self._means.may_replace(self._job.name, *plan.map.key) else known

    def _store(self, plan: RowPlan, records: Sequence[PlacedRecord]) -> None:
        """Store the row map with its records. Only now, with the memory backed, peers may push."""
        known = self._job.parity.plan(*plan.map.key)
        if (known is None or known.identity != plan.identity) and not self._job.is_removed:
            point("daemon.protect.records.before")
            self._job.parity.adopt(plan, records)
            point("daemon.protect.records.after")
        self._tell(plan=plan.identity, trouble="")

    async def _records_of(self, node: str, target: Target, backoff: PeerBackoff) -> list[PlacedRecord]:
        while True:
            await asyncio.sleep(backoff.wait_s([node]))
            try:
                if node == self._means.node:
                    records: Sequence[ShardRecord] = own_records(self._job, target.snapshot)
                else:
                    records = await self._fetch(node, target.snapshot)
                check_records(self._job.name, target.snapshot, node, records)
            except SnapdError as error:
                backoff.failed(node, error.message)
                self._tell(trouble=backoff.trouble)
            else:
                backoff.succeeded(node)
                return [PlacedRecord(node, record) for record in records]

    async def _take_up(self, plan: RowPlan, records: Sequence[PlacedRecord], backoff: PeerBackoff) -> bool:
        """Back what the plan lacks and store it; False after a refusal, when it is to be tried again."""
        try:
            await grow_for(self._job, plan, self._means.node, self._means.metrics)
            self._store(plan, records)
        except CapacityError as error:
            backoff.failed("", error.message)
            self._tell(trouble=backoff.trouble)
            await asyncio.sleep(self._job.context.settings.grow_retry_s)
            return False
        backoff.succeeded("")
        return True

    async def _work(self, plan: RowPlan, backoff: PeerBackoff) -> bool:
        """Code and wait. Returns only to plan anew (False), when nothing has moved for long, or at the end (True)."""
        bench = Bench(
            self._job,
            plan.map.id,
            self._means.make_codec(plan.map.code),
            self._means.links,
            self._means.pipeline.buffers,
            LoopCaller(asyncio.get_running_loop()),
            self._means.commits,
            self._stop,
        )
        work = RowWork(
            plan, self._means.node, bench, self._means.pipeline, self._means.metrics, backoff, self._suspect
        )
        async with contextlib.aclosing(work):
            await work.check_held()
            while not self._job.is_removed:
                self._tell(
                    rows_done=work.held_count,
                    rows_total=work.given_count,
                    rows_shared=work.rows_shared,
                    pulled_bytes=work.pulled_bytes,
                    pushed_bytes=work.pushed_bytes,
                    trouble=backoff.trouble,
                    is_done=work.held_count == work.given_count,
                )
                if work.is_stuck(REPLAN_S):
                    return False
                await work.go_on()
        return True

    def _suspect(self, node: str, rank: int) -> None:
        target = self.state.target
        if target is not None:
            self._means.suspect(node, self._job.name, target.snapshot, rank)

    # what is told

    def _tell(
        self,
        *,
        plan: bytes | None = None,
        trouble: str | None = None,
        is_done: bool = False,
        rows_done: int | None = None,
        rows_total: int | None = None,
        rows_shared: int | None = None,
        pulled_bytes: int | None = None,
        pushed_bytes: int | None = None,
    ) -> None:
        former = self.state
        self.state = replace(
            former,
            plan=former.plan if plan is None else plan,
            trouble=former.trouble if trouble is None else trouble,
            is_done=is_done,
            rows_done=former.rows_done if rows_done is None else rows_done,
            rows_total=former.rows_total if rows_total is None else rows_total,
            rows_shared=former.rows_shared if rows_shared is None else rows_shared,
            pulled_bytes=former.pulled_bytes if pulled_bytes is None else pulled_bytes,
            pushed_bytes=former.pushed_bytes if pushed_bytes is None else pushed_bytes,
        )
        if self.state == former:
            return
        if is_done and not former.is_done:
            self._done()
        if self.state.trouble and self.state.trouble != former.trouble:
            self._job.context.log.once(
                f"protect {self._job.name} {self.state.trouble}",
                "protect.held_up",
                job=self._job.name,
                reason=self.state.trouble,
            )
        self._on_change()

    def _done(self) -> None:
        target, state = self.state.target, self.state
        assert target is not None
        point("daemon.protect.done.after")
        self._count_exposure()
        elapsed_s = self._job.context.environment.monotonic_s() - self._began_s
        self._means.metrics.targets_done.inc()
        self._means.metrics.seconds.inc(max(0.0, elapsed_s))
        self._job.context.log.info(
            "protect.part_done",
            job=self._job.name,
            generation=target.snapshot.generation,
            step=target.snapshot.step,
            epoch=target.epoch,
            fragments=state.rows_total,
            rows_shared=state.rows_shared,
            pulled_bytes=state.pulled_bytes,
            pushed_bytes=state.pushed_bytes,
            seconds=round(elapsed_s, 3),
        )

    def _own_bytes(self, target: Target | None) -> int:
        facts = self._job.ledger.snapshots.get(target.snapshot) if target is not None else None
        return sum(shard.record.nbytes for shard in facts.shards.values()) if facts is not None else 0

    def _count_exposure(self) -> None:
        """Own bytes of the target x the time in which our part of it was not done, once."""
        state = self.state
        if state.target is None or state.exposure_byte_s:
            return
        elapsed_s = max(0.0, self._job.context.environment.monotonic_s() - self._began_s)
        self.state = replace(state, exposure_byte_s=state.own_bytes * elapsed_s)
        self._means.metrics.exposure_byte_s.inc(self.state.exposure_byte_s)


def own_records(job: Job, snapshot: SnapshotId) -> list[ShardRecord]:
    """What this node answers to `FetchRecords` with `own_only`: the records of its own shards of a snapshot."""
    facts = job.ledger.snapshots.get(snapshot)
    if facts is None:
        return []
    return [shard.record for _, shard in sorted(facts.shards.items())]


def check_records(job: str, snapshot: SnapshotId, node: str, records: Sequence[ShardRecord]) -> None:
    """Raise IntegrityError (kind `record`) unless these are records of that snapshot, each rank at most once."""
    ranks = {record.rank for record in records}
    if len(ranks) != len(records) or any((record.job, record.id) != (job, snapshot) for record in records):
        raise IntegrityError("a peer sent records of another snapshot", kind="record", peer=node)


def drop_protection(job: Job, snapshot: SnapshotId, *, below_epoch: int | None = None) -> None:
    """Forget the row maps and records of a snapshot (those made before `below_epoch`, if given), and the parity that
    no other row map needs. For orders only: after a newer snapshot, or the same under a newer epoch, is protected
    everywhere. Idempotent.
    """
    if job.is_removed:
        return
    point("daemon.protect.drop.before")
    freed = job.parity.drop(snapshot, below_epoch=below_epoch)
    point("daemon.protect.drop.after")
    if freed:
        job.context.log.info(
            "protect.dropped", job=job.name, generation=snapshot.generation, step=snapshot.step, frames=freed
        )
        job.changes.notify()
