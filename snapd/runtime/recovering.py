"""Bringing a shard of another node here, as an ordinary captured shard of this one.

First from a node that has it whole, else from the rows of its group; several sources are mixed chunk by chunk. Bytes
are received and decoded straight into frames that were granted for them; every chunk is hashed before the record is
written, and a kill before that leaves free frames and nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from snapd.codec.base import Codec
from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.protection import PlacedRecord, RowMap
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import Links
from snapd.runtime.job import Job
from snapd.runtime.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class ShardSources:
    """Where one rank's shard of the snapshot may come from.

    `whole`: nodes that have its bytes, the preferred first (this node may be among them). `record_nodes`: nodes that
    have the records of the row map of `epoch` by which it is coded; empty, and epoch 0, if it is not.
    """

    whole: tuple[str, ...] = ()
    record_nodes: tuple[str, ...] = ()
    epoch: int = 0


FetchOwn = Callable[[str, str, SnapshotId], Awaitable[Sequence[ShardRecord]]]
"""(node, job, snapshot) -> records of the shards whose bytes that node has."""
FetchRows = Callable[[str, str, SnapshotId, int], Awaitable[tuple[RowMap, Sequence[PlacedRecord]]]]
"""(node, job, snapshot, epoch) -> the row map of that epoch and its records, as that node replicates them.

Both raise UnavailableError or NotFoundError.
"""


@dataclass(frozen=True, slots=True)
class RecoveryMeans:
    """What recovery works with; one for all jobs of the node."""

    node: str
    links: Links
    pipeline: Pipeline
    make_codec: Callable[[Code], Codec]
    fetch_own: FetchOwn
    fetch_rows: FetchRows
    metrics: ProtectionMetrics


async def bring_shard(
    job: Job, means: RecoveryMeans, snapshot: SnapshotId, rank: int, sources: Mapping[int, ShardSources]
) -> ShardRecord:
    """Bring the shard of `rank` into this node's arena of that rank; nothing is done if it is here. `sources`: of all
    ranks of the snapshot: the chunks of others are data fragments of its rows.

    When it returns, the shard is in the index and the ledger, verified, and its snapshot is held once
    (`job.ledger.unhold` when whoever needed it is done); a snapshot that is not held may be dropped at once.

    Raises:
        NotRestorable: kind `shard_sources`: some chunk cannot be had: names the row, the nodes and what is missing.
        CapacityError: it does not fit. ConflictError: kind `chunk_bytes`: the job has another chunk size here.
        UnavailableError: nobody answered who could have helped.
    """
    raise NotImplementedError
