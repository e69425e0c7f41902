"""Coordination inside one daemon: the table lies in the job's index, and the event loop is the lock."""

from __future__ import annotations

from dataclasses import replace

from snapd.coordination.base import GenerationStore
from snapd.core.generations import Assignment, Generation, GenerationKey, assign
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval, after_abort, after_complete
from snapd.errors import ConflictError


class EmbeddedCoordination:
    """For one job on one machine. Implements `base.Coordination`."""

    is_clustered = False

    def __init__(self, store: GenerationStore, *, interval_factor_max: int) -> None:
        self._store = store
        self._table: dict[GenerationKey, Generation] = {
            (row.incarnation, row.rollback_count): row for row in store.generations()
        }
        self._interval = Interval()
        self._factor_max = interval_factor_max
        self._above = 0

    async def next_generation(self, *, incarnation: str, rollback_count: int, world_size: int) -> Assignment:
        answer = assign(
            self._table, incarnation=incarnation, rollback_count=rollback_count, world_size=world_size
        )
        if answer.is_new:
            number = max(answer.generation.number, self._above + 1)
            answer = replace(answer, generation=replace(answer.generation, number=number))
            self._store.add_generation(answer.generation)
            self._table[incarnation, rollback_count] = answer.generation
        return answer

    async def agree_chunk_bytes(self, chosen: int) -> int:
        return chosen

    async def agree_tier_floor(self, tier: str, found: int) -> int:
        self.start_above(found)
        return found

    def start_above(self, generation: int) -> None:
        self._above = max(self._above, generation)

    async def commit_parent(self, generation: int, parent: SnapshotId) -> None:
        row = self.generation(generation)
        if row is None or (row.parent is not None and row.parent != parent):
            raise ConflictError("the generation has another parent", kind="parent", generation=generation)
        if row.parent is None:
            self._store.set_parent(generation, parent)
            self._table[row.incarnation, row.rollback_count] = replace(row, parent=parent)

    def generation(self, number: int) -> Generation | None:
        return next((row for row in self._table.values() if row.number == number), None)

    def current(self) -> int:
        return max((row.number for row in self._table.values()), default=0)

    def interval(self) -> Interval:
        return self._interval

    def configure_interval(self, steps: int) -> None:
        self._interval = Interval(configured=max(1, steps))

    def resume_interval(self, steps: int, widened_steps: int, from_step: int) -> None:
        configured = max(1, steps)
        factor = widened_steps // configured
        if 1 <= factor <= self._factor_max and widened_steps == configured * factor:
            self._interval = Interval(configured=configured, factor=factor, from_step=from_step)
        else:
            self._interval = Interval(configured=configured)

    def take_interval(self, interval: Interval) -> None:
        self._interval = interval

    def note_abort(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        self._interval, reason = after_abort(
            self._interval, newest_step_seen=newest_step_seen, factor_max=self._factor_max
        )
        return self._interval, reason

    def note_complete(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        self._interval, reason = after_complete(self._interval, newest_step_seen=newest_step_seen)
        return self._interval, reason
