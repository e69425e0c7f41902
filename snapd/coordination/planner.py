"""The one daemon that writes the group table: elected by a leased key.

Two that both believe themselves elected do no harm: a table is written only over the table that it was made from.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from snapd.coordination.kv import Check, Compacting, Write
from snapd.coordination.settings import Place, Placed
from snapd.core.cluster import GroupTable
from snapd.core.membership import table_to_json, to_json
from snapd.errors import UnavailableError

if TYPE_CHECKING:
    from snapd.coordination.cluster import ClusterState

REBUILD_LEASES = 2.0  # so many leases long a rebuild waits for the members that it has not heard
NAMED_MAX = 32


class Planner:
    """Belongs to one `ClusterState`; its `run` is part of a session and ends with it."""

    def __init__(self, state: ClusterState, place: Place) -> None:
        self._state, self._place = state, place
        self._elected_under = 0
        self._rebuild_since_s: float | None = None
        self._compacted_s = state.environment.monotonic_s()

    @property
    def is_elected(self) -> bool:
        state = self._state
        return (
            state.away is None
            and self._elected_under == state.lease_serial
            and state.view.planner == state.member.node
        )

    async def run(self) -> None:
        """Stand for election when there is no planner; plan while elected. Raises what the store raises."""
        while True:
            serial = self._state.serial
            if self.is_elected:
                members = len(self._state.view.members)
                await asyncio.sleep(self._state.settings.settle_s + members / 1000)
                serial = self._state.serial
                await self._plan()
                await self._tidy()
            else:
                await self._stand()
            await self._state.changed(serial, self._pause_s())

    async def _stand(self) -> None:
        """Take the planner's key if it is free, or our own from an earlier life."""
        state, keys = self._state, self._state.keys
        if state.view.planner not in ("", state.member.node):
            return
        spread_s = min(1.0, len(state.view.members) / 1000)
        await asyncio.sleep(state.environment.chance() * spread_s)
        if state.view.planner not in ("", state.member.node):
            return
        name = state.member.node.encode("ascii")
        version = state.view.version(keys.planner)
        if await state.store.transact(
            [Check(keys.planner, version)], [Write(keys.planner, name, is_leased=True)]
        ):
            self._elected_under = state.lease_serial
            state.view.apply(keys.planner, name, version + 1)
            state.note("planner.elected", {"node": state.member.node})

    def _wants(self) -> Placed | None:
        """The table that there should be, if it is another than there is, or must be written again."""
        state, view = self._state, self._state.view
        previous = self._previous()
        members = [each.member for _, each in sorted(view.members.items())]
        placed = self._place(
            previous,
            members,
            state.settings.asked,
            lost=sorted(set(state.absent) - state.lost),
            # one that lives says itself when it can go: until then it gives and holds parity as before
            draining=sorted(node for node in state.view.drains if node not in state.view.members),
            domains={name: known.domain for name, known in view.known.items()},
        )
        if self._is_doubted():
            return placed if self._is_heard() else None
        self._rebuild_since_s = None
        table = view.table
        if table is not None and (table.groups, table.asked, table.degraded) == (
            placed.groups,
            state.settings.asked,
            placed.degraded,
        ):
            return None
        return placed

    def _previous(self) -> GroupTable | None:
        """What to move as little as possible from: the store's table, or, where that is doubted, the one last seen."""
        state = self._state
        return state.seen.table if state.distrust and state.seen.table else state.view.table

    def _is_doubted(self) -> bool:
        epoch = self._state.view.table.epoch if self._state.view.table else 0
        return self._state.view.needs_epoch_above >= max(1, epoch)

    def _is_heard(self) -> bool:
        """A rebuild begins when all that were in the last table are back, or were waited for."""
        state = self._state
        now_s = state.environment.monotonic_s()
        if self._rebuild_since_s is None:
            self._rebuild_since_s = now_s
        waited_s = now_s - self._rebuild_since_s
        return not self._unheard() or waited_s >= REBUILD_LEASES * state.settings.lease_s

    def _unheard(self) -> list[str]:
        previous = self._previous()
        nodes = {node for group in (previous.groups if previous else ()) for node in group.nodes}
        return sorted(nodes - set(self._state.view.members))

    async def _plan(self) -> None:
        state, view, keys = self._state, self._state.view, self._state.keys
        placed = self._wants() if self.is_elected else None
        if placed is None:
            return
        reason, writes = placed.reason, []
        if self._is_doubted():
            reason = self._rebuild_reason(placed.reason)
            wanted = view.floors_wanted()
            for job, number in state.seen.generations.items():
                wanted[job] = max(number, wanted.get(job, 0))
            if wanted != view.floors:
                writes.append(Write(keys.floors, to_json(dict(sorted(wanted.items())))))
        last = view.table.epoch if view.table else 0
        epoch = max(last, view.needs_epoch_above, state.seen.epoch) + 1
        table = GroupTable(epoch, state.settings.asked, placed.groups, reason, placed.degraded)
        checks = [Check(keys.epoch, view.epoch_version)]
        # In this order: who sees the table has seen its floors.
        writes += [Write(keys.epoch, str(epoch).encode("ascii")), Write(keys.groups, table_to_json(table))]
        is_written = await state.store.transact(checks, writes)
        state.note("table.written" if is_written else "table.overtaken", {"epoch": epoch, "reason": reason})
        if is_written:
            self._rebuild_since_s = None
            await self._seen_written(epoch)

    async def _seen_written(self, epoch: int) -> None:
        """Do not plan again before our own watch has brought the table."""
        state = self._state
        while (state.view.table.epoch if state.view.table else 0) < epoch:
            await state.changed(state.serial, state.settings.lease_s)

    def _rebuild_reason(self, reason: str) -> str:
        above = max(self._state.view.needs_epoch_above, self._state.seen.epoch)
        unheard = self._unheard()
        text = f"rebuilt above epoch {above}: the store knew less than its members"
        if unheard:
            more = f" and {len(unheard) - NAMED_MAX} more" if len(unheard) > NAMED_MAX else ""
            text += f"; not heard: {', '.join(unheard[:NAMED_MAX])}{more}"
        return f"{text}; {reason}"

    async def _tidy(self) -> None:
        """Forget nodes that are long gone, and bound the store's history."""
        state = self._state
        now_s = state.environment.monotonic_s()
        placed = {node for group in (state.table.groups if state.table else ()) for node in group.nodes}
        old = [
            name
            for name, since_s in state.absent.items()
            if name in state.view.known
            and name not in placed
            and now_s - since_s >= state.settings.forget_after_s
        ]
        if old:
            await state.store.transact([], [Write(state.keys.known_node(name), None) for name in old[:64]])
        if now_s - self._compacted_s >= state.settings.compact_every_s and isinstance(
            state.store, Compacting
        ):
            self._compacted_s = now_s
            try:
                await state.store.compact(state.settings.keep_revisions)
            except UnavailableError as error:  # nothing depends on it
                state.note("coordination.uncompacted", {"kind": error.kind, "reason": str(error)})

    def _pause_s(self) -> float:
        """Until the next thing that happens by the clock alone: a node counts as lost, a wait ends."""
        state = self._state
        pause_s = min(state.settings.compact_every_s, 60.0)
        now_s, limit_s = state.environment.monotonic_s(), state.settings.lost_after_s
        for since_s in state.absent.values():
            left_s = since_s + limit_s - now_s
            if left_s > 0:
                pause_s = min(pause_s, left_s)
        if self._rebuild_since_s is not None:
            pause_s = min(pause_s, state.settings.lease_s / 4)
        return max(0.01, pause_s)
