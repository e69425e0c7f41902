"""What the cluster's coordination is told by its daemon: bounds, clock, chance, and how to place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from snapd.core.cluster import Code, Group, GroupTable, Member


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """`lease_s`: after so long without a sign a node counts as absent; `lost_after_s`: after so long absent, as lost,
    and its place is given away. `settle_s`: how long the planner waits for further changes before it writes a table
    (plus a millisecond per member). `forget_after_s`: when a node that is lost and in no group is forgotten.
    `keep_revisions`: what is left of the history of a store that must be compacted, each `compact_every_s`.
    """

    asked: Code
    lease_s: float = 5.0
    lost_after_s: float = 30.0
    allow_same_host: bool = False
    settle_s: float = 0.3
    retry_max_s: float = 5.0
    forget_after_s: float = 86_400.0
    compact_every_s: float = 300.0
    keep_revisions: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEnvironment:
    """`chance`: uniform in [0, 1). `random_id`: a fresh name, printable ASCII, for a cluster."""

    monotonic_s: Callable[[], float]
    chance: Callable[[], float]
    random_id: Callable[[], str]


class Placed(Protocol):
    """What placement decides; a GroupTable is one (its epoch is not looked at)."""

    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def reason(self) -> str: ...
    @property
    def degraded(self) -> str: ...


class Place(Protocol):
    """The pure placement function, `core.placement.place`. `lost`: nodes that are absent, but not for so long that
    their place is given up; `domains`: of nodes that were members once.
    """

    def __call__(
        self,
        previous: GroupTable | None,
        members: Sequence[Member],
        asked: Code,
        *,
        lost: Collection[str],
        draining: Collection[str],
        domains: Mapping[str, str],
    ) -> Placed: ...


Note = Callable[[str, Mapping[str, object]], None]
"""Takes an event's name (`noun.verb`) and its fields, for the log."""
