"""What a run has established, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId


class BrokenPromise(Exception):
    """`promise`: P1 to P7."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise


class BegunAnew(Exception):
    """The store and all that knew the job's past are gone: nothing of before is promised, and the run ends here."""


@dataclass(slots=True)
class Protected:
    """A snapshot was found protected under an epoch: by which groups, with which arenas. `is_fact`: it was recorded,
    or somebody was told.
    """

    id: SnapshotId
    epoch: int
    at_s: float
    groups: tuple[tuple[tuple[str, ...], int], ...]  # (nodes, m)
    arenas: dict[str, str]
    is_fact: bool = False


@dataclass(slots=True)
class Captured:
    """A snapshot was complete: where its shards lay (rank -> node -> arena), and which daemons were told."""

    id: SnapshotId
    holders: dict[int, dict[str, str]]
    told: set[int] = field(default_factory=set)
