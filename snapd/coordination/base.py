"""What a daemon asks of coordination. Implementations: embedded (one machine); a clustered one joins it
later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from snapd.core.generations import Assignment, Generation
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval


class GenerationStore(Protocol):
    """Where the embedded implementation keeps a job's generations; each call is durable when it returns."""

    def generations(self) -> Iterable[Generation]: ...
    def add_generation(self, generation: Generation) -> None: ...
    def set_parent(self, generation: int, parent: SnapshotId) -> None: ...


class Coordination(Protocol):
    """One job's share of the state that all of its nodes must agree on."""

    @property
    def is_clustered(self) -> bool:
        """True when worlds may span machines."""

    async def next_generation(self, *, incarnation: str, rollback_count: int, world_size: int) -> Assignment:
        """Map (incarnation, rollback count) to a generation by compare-and-set, once. Errors:
        `generations.assign`.
        """

    async def agree_chunk_bytes(self, chosen: int) -> int:
        """The one chunk size of the job on all nodes: `chosen`, unless another node named one before."""

    async def agree_tier_floor(self, tier: str, found: int) -> int:
        """The highest generation that `tier` (a URL) had of the job before the job began, the same on all nodes: what
        the first of them `found`. Generations that are given out from now on are above it.
        """

    def start_above(self, generation: int) -> None:
        """Generations that are given out from now on are above this one."""

    async def commit_parent(self, generation: int, parent: SnapshotId) -> None:
        """Record what a generation was restored from. Idempotent; a second, other parent is refused with
        ConflictError.
        """

    def generation(self, number: int) -> Generation | None:
        """What is known of a generation."""

    def current(self) -> int:
        """The newest generation's number; 0 if there was none."""

    def interval(self) -> Interval:
        """The capture interval of the current generation."""

    def configure_interval(self, steps: int) -> None:
        """A new world begins: its interval is as configured."""

    def resume_interval(self, steps: int, widened_steps: int, from_step: int) -> None:
        """After a restart: what the ranks were told last (`widened_steps` 0: as configured)."""

    def take_interval(self, interval: Interval) -> None:
        """What the job's collector decided, where worlds span nodes."""

    def note_abort(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        """A rank skipped a step for want of a free slot."""

    def note_complete(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        """A snapshot became complete on all ranks."""
