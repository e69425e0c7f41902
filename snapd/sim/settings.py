"""What a run is made of, beside its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from snapd.coordination.settings import ClusterSettings
from snapd.core.cluster import Code
from snapd.sim.bugs import Bug


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSettings:
    """Times in virtual seconds. `racks`: 0: each node is a domain of its own. `faults`: how many node-faults strike,
    one every `fault_every_s` on average. `progress_s`: how long after the last fault a newer snapshot may take to
    become protected. `is_crowd`: see `crowd.py`.
    """

    nodes: int = 6
    ranks: int = 4
    ranks_per_node_max: int = 2
    racks: int = 0
    code: Code = field(default_factory=lambda: Code(2, 1))
    chunks: tuple[int, ...] = (6, 2, 3, 2)
    slots: int = 3
    step_s: float = 1.0
    faults: int = 50
    fault_every_s: float = 2.5
    kinds: tuple[str, ...] = ()
    lease_s: float = 2.0
    lost_after_s: float = 8.0
    restore_settle_s: float = 10.0
    restore_wait_s: float = 12.0
    restore_finish_s: float = 20.0
    start_timeout_s: float = 60.0
    progress_s: float = 150.0
    interval_factor_max: int = 4
    beyond_code: bool = False
    is_crowd: bool = False
    bugs: frozenset[Bug] = frozenset()

    @property
    def cluster(self) -> ClusterSettings:
        return ClusterSettings(asked=self.code, lease_s=self.lease_s, lost_after_s=self.lost_after_s)

    def chunks_of(self, rank: int) -> int:
        return self.chunks[rank % len(self.chunks)]


Clock = Callable[[], float]
