"""The protection of all jobs of this node: one protector each, and what reports, inventories and peers hear of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapd.core.cluster import GroupTable
from snapd.core.ids import SnapshotId
from snapd.core.obeying import parity_to_drop
from snapd.core.protection import RowMap, RowPlan
from snapd.core.recovery import HeldRows
from snapd.core.reports import PartDone
from snapd.errors import IntegrityError
from snapd.runtime.job import Job
from snapd.runtime.peers import Records
from snapd.runtime.protecting import Means, Protector, Target, drop_protection, own_records

REPLAN_AFTER_S = 10.0  # our part is done and the target is not: another member has planned other rows


@dataclass(slots=True)
class _Part:
    """One job's protector, and what is known to be done (`seen`: the state that it was computed from)."""

    job: Job
    protector: Protector
    seen: tuple[int, int, tuple[SnapshotId, int] | None, int] = (-1, -1, None, -1)
    is_lacking: bool = False
    told: tuple[object, ...] = ()
    done: tuple[PartDone, ...] = ()
    done_since_s: float = 0.0


class NodeProtection:
    """Implements `cluster.ClusterProtection`. On the event loop. `changed(job)`: there is something to report."""

    def __init__(
        self,
        means: Means,
        *,
        changed: Callable[[str], None],
        epoch: Callable[[], int],
        traffic: Callable[[], tuple[int, int]],
    ) -> None:
        self._means = means
        self._changed = changed
        self._epoch = epoch
        self._traffic = traffic
        self._parts: dict[str, _Part] = {}

    def _part(self, job: Job) -> _Part:
        part = self._parts.get(job.name)
        if part is None or part.job is not job:
            name = job.name
            part = _Part(job, Protector(job, self._means, lambda: self._tell(name)))
            if not job.is_removed:
                self._parts[name] = part
                job.on_removed.append(lambda: self._let_go(part))
        return part

    def _let_go(self, part: _Part) -> None:
        """The job was removed: its memory is given back when nobody keeps it any more."""
        part.protector.aim(None)
        if self._parts.get(part.job.name) is part:
            del self._parts[part.job.name]

    def _tell(self, name: str) -> None:
        """A protector's state has changed; counts alone are nobody's news."""
        part = self._parts.get(name)
        if part is None:
            return
        state = part.protector.state
        told = (state.target, state.is_done, state.plan, state.trouble)
        if told != part.told:
            part.told = told
            self._changed(name)

    async def close(self) -> None:
        for part in self._parts.values():
            await part.protector.close()
        self._parts.clear()

    # orders

    def aim(self, job: Job, target: SnapshotId | None, table: GroupTable | None) -> None:
        """Protect `target` with our group of `table`; nothing where either is missing."""
        group = table.group_of(self._means.node) if table is not None else None
        part = self._part(job)
        if target is None or table is None or group is None or group.code is None:
            part.protector.aim(None)
            return
        wanted = Target(target, table.epoch, group)
        if self._is_stuck(part, wanted):
            job.context.log.info("protect.replanned", job=job.name, step=target.step)
            part.protector.aim(None)
        part.protector.aim(wanted)

    def _is_stuck(self, part: _Part, wanted: Target) -> bool:
        now_s = part.job.context.environment.monotonic_s()
        state = part.protector.state
        if state.target != wanted or not state.is_done:
            part.done_since_s = now_s
            return False
        return now_s - part.done_since_s > REPLAN_AFTER_S

    def forget(
        self, job: Job, keep: set[SnapshotId], *, protected: SnapshotId | None, protected_epoch: int
    ) -> None:
        """Drop what need not stay: see `parity_to_drop`."""
        row_maps = [plan.map for plan in job.parity.plans()]
        for snapshot, below_epoch in parity_to_drop(
            row_maps, keep, protected=protected, protected_epoch=protected_epoch
        ):
            drop_protection(job, snapshot, below_epoch=below_epoch)

    # what is told

    def done(self, job: Job) -> tuple[PartDone, ...]:
        """Snapshots of which all that the plan of this epoch gives to this node is here."""
        part, epoch, parity = self._part(job), self._epoch(), job.parity
        state = part.protector.state
        is_active = state.target is not None and not state.is_done
        active = (state.target.snapshot, state.target.epoch) if state.target and is_active else None
        # a fragment that comes changes nothing, but where one of a plan that nobody works on is lacking
        seen = (parity.losses, epoch, active, parity.version if part.is_lacking else -1)
        if part.seen != seen:
            plans = [p for p in parity.plans() if p.map.epoch == epoch and p.map.key != active]
            whole = [p for p in plans if self._is_whole(job, p)]
            part.done = tuple(PartDone(plan.map.id, plan.identity) for plan in whole)
            part.is_lacking = len(whole) < len(plans)
            part.seen = (*seen[:3], parity.version if part.is_lacking else -1)
        return part.done

    def _is_whole(self, job: Job, plan: RowPlan) -> bool:
        return all(job.parity.has(row.id, number) for row, number in plan.given_to(self._means.node))

    def held_rows(self, job: Job) -> tuple[HeldRows, ...]:
        return tuple(job.parity.held_rows())

    def trouble(self, job: Job) -> str:
        return self._part(job).protector.state.trouble

    def records(
        self, job: Job, snapshot: SnapshotId, *, ranks: set[int], own_only: bool, epoch: int = 0
    ) -> Records:
        """Our own records of a snapshot; without `own_only` all of the row map of that epoch (0: of the newest)."""
        own = own_records(job, snapshot)
        if own_only:
            return Records(tuple((self._means.node, r) for r in own if not ranks or r.rank in ranks))
        row_map = self._map(job, snapshot, epoch)
        if row_map is None:
            return Records(tuple((self._means.node, record) for record in own))
        try:
            placed = job.parity.records(row_map)
        except IntegrityError as error:
            job.context.log.error("records.damaged", job=job.name, reason=str(error))
            return Records(tuple((self._means.node, record) for record in own))
        return Records(
            tuple((p.node, p.record) for p in placed if not ranks or p.record.rank in ranks),
            row_map.epoch,
            row_map.nodes,
            row_map.code,
            row_map.group,
        )

    def _map(self, job: Job, snapshot: SnapshotId, epoch: int) -> RowMap | None:
        maps = [
            plan.map
            for plan in job.parity.plans()
            if plan.map.id == snapshot and epoch in (0, plan.map.epoch)
        ]
        return max(maps, key=lambda row_map: row_map.epoch, default=None)

    def facts(self) -> tuple[int, int, int, float]:
        sent, received = self._traffic()
        parity = sum(part.job.parity.nbytes for part in self._parts.values())
        exposure = sum(part.protector.state.exposure_byte_s for part in self._parts.values())
        return parity, sent, received, exposure
