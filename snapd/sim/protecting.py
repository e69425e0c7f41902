"""A node's part in protecting a target: records, plan, row map, fragments (runtime/protecting.py, row_work.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snapd.core.cluster import Group, GroupTable
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.protection import PlacedRecord, RowMap, RowPlan
from snapd.core.rows import Row
from snapd.errors import SnapdError
from snapd.sim.bugs import Bug
from snapd.sim.disk import Content, Parity, encode

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

CALL_S = 1.0
RETRY_S = 0.4
RECHECK_S = 2.0
REPLAN_S = 6.0
PullKey = tuple[int, int, Content]  # rank, index, digest
Push = tuple[bytes, int, Parity]


@dataclass(frozen=True, slots=True)
class Target:
    snapshot: SnapshotId
    epoch: int
    group: Group


class SimProtector:
    """`aim` names the target; everything else goes on by itself."""

    def __init__(self, daemon: SimDaemon) -> None:
        self._daemon = daemon
        self.target: Target | None = None
        self._task: asyncio.Task[None] | None = None
        self._done_since_s = 0.0
        self.planning: tuple[SnapshotId, int] | None = (
            None  # no part that counts as done, until it is planned
        )

    def aim(self, snapshot: SnapshotId | None, table: GroupTable | None) -> None:
        daemon = self._daemon
        group = table.group_of(daemon.node) if table is not None else None
        wanted = None
        if snapshot is not None and table is not None and group is not None and group.code is not None:
            wanted = Target(snapshot, table.epoch, group)
        if wanted == self.target and not self._is_stuck():
            return
        former, self.target = self.target, wanted
        self.planning = None
        self._done_since_s = daemon.now_s
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if Bug.TARGET_DROPS_FORMER in daemon.bugs and former is not None and wanted is not None:
            if former.snapshot != wanted.snapshot:
                daemon.parity.drop(former.snapshot)
        if wanted is not None:
            self._task = daemon.life.spawn(self._protect(wanted), "protect")

    def _is_stuck(self) -> bool:
        """Our part is done and the target is not: another member has planned other rows."""
        daemon, target = self._daemon, self.target
        if target is None or not any(part.id == target.snapshot for part in daemon.parity.done()):
            self._done_since_s = daemon.now_s
        return daemon.now_s - self._done_since_s > REPLAN_S

    async def _protect(self, target: Target) -> None:
        while True:
            self.planning = target.snapshot, target.epoch
            group = target.group
            assert group.code is not None
            row_map = RowMap(target.snapshot, target.epoch, group.number, group.nodes, group.code)
            parts = await asyncio.gather(*(self._records_of(node, target.snapshot) for node in group.nodes))
            records = [record for part in parts for record in part]
            plan = self._daemon.plans.of(row_map, records)
            known = self._daemon.parity.plan(*row_map.key)
            if known is None or known.identity == plan.identity or await self._may_replace(*row_map.key):
                if known is None or known.identity != plan.identity:
                    self._daemon.parity.adopt(plan, records)
            else:
                plan = known
            self.planning = None
            self._daemon.world.changed()
            await self._work(plan)

    async def _may_replace(self, snapshot: SnapshotId, epoch: int) -> bool:
        daemon = self._daemon
        return Bug.REPLANNED_UNASKED in daemon.bugs or await daemon.world.may_replace(snapshot, epoch)

    async def _records_of(self, node: str, snapshot: SnapshotId) -> list[PlacedRecord]:
        daemon = self._daemon
        while True:
            try:
                records: Sequence[ShardRecord] = (
                    daemon.own_records(snapshot)
                    if node == daemon.node
                    else await daemon.call(node, "own_records", snapshot, timeout_s=CALL_S)
                )
            except SnapdError:
                await asyncio.sleep(RETRY_S * (0.5 + daemon.chance()))
            else:
                return [PlacedRecord(node, record) for record in records]

    async def _work(self, plan: RowPlan) -> None:
        """Code what this node leads, and look again whether it still is in place; returns to plan anew, when nothing
        has moved for long.
        """
        daemon, parity = self._daemon, self._daemon.parity
        led = plan.led_by(daemon.node)
        confirmed: set[tuple[int, int]] = set()
        moved_s, asked_s = daemon.now_s, -RECHECK_S
        while True:
            if daemon.now_s - asked_s >= RECHECK_S:
                asked_s = daemon.now_s
                await self._ask_held(led, confirmed)
            lacking = [row for row in led if self._lacks(row, confirmed)]
            before = (parity.version, len(confirmed))
            if lacking:
                await self._code(lacking, confirmed)
            is_done = all(parity.has(row.id, number) for row, number in plan.given_to(daemon.node))
            if (parity.version, len(confirmed)) != before or is_done:
                moved_s = daemon.now_s
            if daemon.now_s - moved_s > REPLAN_S:
                return
            if is_done and not any(self._lacks(row, confirmed) for row in led):
                await asyncio.sleep(RECHECK_S)
                confirmed.clear()
            await asyncio.sleep(RETRY_S * (0.5 + daemon.chance()))

    def _lacks(self, row: Row, confirmed: set[tuple[int, int]]) -> bool:
        return not self._daemon.parity.has(row.id, 0) or any(
            (row.number, number) not in confirmed for number in range(1, len(row.parity_nodes))
        )

    async def _ask_held(self, led: Sequence[Row], confirmed: set[tuple[int, int]]) -> None:
        """Which fragments the peers hold already: those rows are shared by reference."""
        theirs: dict[str, list[tuple[Row, int]]] = {}
        for row in led:
            for number, node in enumerate(row.parity_nodes):
                if number:
                    theirs.setdefault(node, []).append((row, number))
        for node, rows in theirs.items():
            names = [(row.id, number) for row, number in rows]
            held = await self._try(node, "holds", names)
            if held is not None:
                confirmed.update(
                    (row.number, number) for (row, number), has in zip(rows, held, strict=True) if has
                )

    async def _code(self, rows: Sequence[Row], confirmed: set[tuple[int, int]]) -> None:
        """Pull, encode, keep, push: rows whose chunks cannot all be had stay for the next time."""
        daemon = self._daemon
        wanted: dict[str, list[PullKey]] = {}
        for row in rows:
            for chunk in row.chunks:
                wanted.setdefault(chunk.node, []).append((chunk.rank, chunk.index, chunk.digest))
        pulled: dict[tuple[str, PullKey], Content] = {}
        for node, keys in wanted.items():
            bodies = await self._try(node, "pull", keys)
            for key, body in zip(keys, bodies or (), strict=bodies is not None):
                arrived = daemon.arrive(body)
                if arrived == key[2] or (arrived is not None and Bug.FRAGMENT_UNCHECKED in daemon.bugs):
                    pulled[node, key] = arrived
        pushes: dict[str, list[tuple[Row, Push]]] = {}
        for row in rows:
            bodies = [pulled.get((c.node, (c.rank, c.index, c.digest))) for c in row.chunks]
            if any(body is None for body in bodies):
                continue
            if not daemon.parity.has(row.id, 0):
                daemon.commit_fragment(row.id, 0, encode(bodies, 0))
            for number, node in enumerate(row.parity_nodes):
                if number and (row.number, number) not in confirmed:
                    pushes.setdefault(node, []).append((row, (row.id, number, encode(bodies, number))))
        for node, items in pushes.items():
            taken = await self._try(node, "push", [push for _, push in items])
            for (row, push), is_taken in zip(items, taken or (), strict=taken is not None):
                if is_taken:
                    confirmed.add((row.number, push[1]))

    async def _try(self, node: str, method: str, argument: object) -> Any:
        """The answer, or None when there is none."""
        daemon = self._daemon
        try:
            if node == daemon.node:
                return daemon.handlers[method](argument)
            return await daemon.call(node, method, argument, timeout_s=CALL_S)
        except SnapdError:
            return None
