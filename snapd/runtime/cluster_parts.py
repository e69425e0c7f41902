"""What a cluster is made of, and what it needs of the node: the seams of runtime/cluster.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from snapd.coordination.cluster import ClusterState
from snapd.coordination.embedded_kv import KvServer
from snapd.core.ids import SnapshotId
from snapd.obs.log import EventLog
from snapd.runtime.collecting import CollectorSettings
from snapd.runtime.job import Job
from snapd.runtime.peers import PeerCalls, Records
from snapd.runtime.world import Protection


class ClusterProtection(Protection, Protocol):
    """The protection of all jobs of this node, and what it serves to peers."""

    def records(
        self, job: Job, snapshot: SnapshotId, *, ranks: set[int], own_only: bool, epoch: int = 0
    ) -> Records: ...

    def facts(self) -> tuple[int, int, int, float]:
        """(parity bytes, bytes sent, bytes received, exposure in byte seconds)."""


class Jobs(Protocol):
    """The node's jobs, as the cluster needs them."""

    @property
    def jobs(self) -> Mapping[str, Job]: ...
    def job_for(self, name: str) -> Job: ...
    def end_job(self, job: Job, through: int) -> None:
        """All of the generations up to this one was removed in the whole world."""

    def overtake(self, job: Job) -> None:
        """A newer generation has begun somewhere: sessions of older ones are fenced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterParts:
    """What a cluster is made of. `spawn` runs a task whose error is fatal; `kv_server`: on an embedded leader."""

    state: ClusterState
    calls: PeerCalls
    protection: ClusterProtection
    collector_settings: CollectorSettings
    jobs: Jobs
    log: EventLog
    instance: int
    version: str
    monotonic_s: Callable[[], float]
    spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    arena_bytes: Callable[[], int]
    kv_server: KvServer | None = None
