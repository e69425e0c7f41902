"""What a daemon asks of its peers over gRPC, in the core's words.

rpc/peer_calls.py sends it, rpc/peer_service.py answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.recovery import Inventory
from snapd.core.reports import NodeReport, Orders
from snapd.core.restore import Decision, RankReport, Verdicts


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """`is_collector` False: the job is collected elsewhere (`collector`: where, if it is known)."""

    is_collector: bool
    collector: str
    orders: Orders


@dataclass(frozen=True, slots=True)
class Records:
    """Shard records with the nodes that they are planned for, and the group that they were fetched under, if any."""

    placed: tuple[tuple[str, ShardRecord], ...]
    epoch: int = 0
    nodes: tuple[str, ...] = ()
    code: Code | None = None
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldAsk:
    """One restore's round, as any rank of the world asks for it."""

    generation: int
    number: int
    world_size: int
    step: int | None
    accept_older: bool
    is_elastic: bool = False  # a snapshot of another number of ranks will do


@dataclass(frozen=True, slots=True)
class ShardSource:
    """Where a shard can be had: whole on `nodes`; else by rows of the group, whose records lie on `record_nodes`."""

    rank: int
    nodes: tuple[str, ...]
    is_coded: bool = False
    group: int = 0
    epoch: int = 0
    record_nodes: tuple[str, ...] = ()


FROM_NODES = "other nodes"


@dataclass(frozen=True, slots=True)
class Brought:
    """A shard that is here now. `source`: where its bytes came from, in words: `FROM_NODES`, or the tier's URL."""

    record: ShardRecord
    source: str = FROM_NODES


@dataclass(frozen=True, slots=True)
class WorldPlan:
    decision: Decision
    sources: tuple[ShardSource, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node, for `snapd status` over the cluster."""

    node: str
    version: str
    arena_bytes: int = 0
    parity_bytes: int = 0
    trouble: str = ""
    jobs: tuple[str, ...] = ()
    sent_bytes: int = 0
    received_bytes: int = 0
    exposure_byte_s: float = 0.0
    is_draining: bool = False
    drain_waits_for: str = ""


class PeerCalls(Protocol):
    """Each raises UnavailableError when the node does not answer in time, and what the node itself raises."""

    async def report(
        self, node: str, job: str, report: NodeReport, *, known_orders: int, hold_s: float
    ) -> ReportAnswer: ...

    async def inventory(self, node: str, job: str) -> Inventory: ...

    async def fetch_records(
        self,
        node: str,
        job: str,
        snapshot: SnapshotId,
        *,
        ranks: Sequence[int] = (),
        own_only: bool = False,
        epoch: int = 0,
    ) -> Records:
        """`epoch`: of the row map whose records are wanted; 0: of the newest one."""

    async def plan_world_restore(
        self, node: str, job: str, ask: WorldAsk, *, timeout_s: float
    ) -> WorldPlan: ...

    async def finish_world_restore(
        self,
        node: str,
        job: str,
        generation: int,
        number: int,
        rank: int,
        report: RankReport,
        *,
        timeout_s: float,
    ) -> Verdicts: ...

    async def take_shard(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None: ...

    async def suspect(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        """Tell a node that a chunk of its shard came with another hash than its record says."""

    async def node_facts(self, node: str) -> NodeFacts: ...
