"""Bringing back chunks that are bad in this node's memory, from nodes that have them or from parity, so that a bit flip
costs no snapshot.

A shard keeps its place while that is tried: only its bad chunks are brought, and its record is replaced at the end. It
counts as lost only when every node that may have something of it has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.restore import Repair
from snapd.errors import IntegrityError, NotFoundError, NotRestorable, SnapdError
from snapd.memory.parity import ParityStore
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import FragmentName
from snapd.runtime.bulk_store import discard_fragment
from snapd.runtime.faultpoints import point
from snapd.runtime.inventories import gather_inventories
from snapd.runtime.job import Job
from snapd.runtime.peers import Brought, ShardSource

BadChunk = tuple[int, str]


class Around(Protocol):
    """The cluster, as far as a repair needs it."""

    @property
    def living(self) -> Iterable[str]: ...
    @property
    def sees_all(self) -> bool:
        """No member is in doubt, and the coordinator answers: what is found nowhere is nowhere."""

    async def inventory(self, node: str, job: str) -> Inventory: ...


class Bringing(Protocol):
    """runtime/bringing.py."""

    async def bring(
        self, job: Job, snapshot: SnapshotId, rank: int, sources: Sequence[ShardSource], *, is_here_bad: bool
    ) -> Brought: ...

    async def mend_parity(self, job: Job, snapshot: SnapshotId) -> str: ...


class Repairs:
    """One per node; implements `job.Repairing`. On the event loop."""

    def __init__(self, cluster: Around, bringing: Bringing, metrics: ProtectionMetrics) -> None:
        self._cluster = cluster
        self._bringing = bringing
        self._metrics = metrics
        self._locks: dict[tuple[str, int], asyncio.Lock] = {}

    async def repair(self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[BadChunk]) -> Repair:
        """Bring back what is bad of a shard that is here, and of the other snapshots that share its bad frames."""
        async with self._locks.setdefault((job.name, rank), asyncio.Lock()):
            return await self._repair(job, snapshot, rank, bad)

    async def verify_parity(self, job: Job, snapshot: SnapshotId) -> tuple[int, int]:
        """As the function, and what was bad is coded again here."""
        checked, bad = await verify_parity(job, snapshot)
        why = await self._bringing.mend_parity(job, snapshot)
        if why:
            job.context.log.warning("parity.not_mended", job=job.name, step=snapshot.step, reason=why)
        return checked, bad

    async def take(self, job: Job, snapshot: SnapshotId, rank: int) -> None:
        """Bring a shard here that another node is to give up. Raises what `bring` raises."""
        async with self._locks.setdefault((job.name, rank), asyncio.Lock()):
            if job.ledger.has_shard(snapshot, rank):
                return
            sources, _ = await self._sources(job.name, snapshot)
            await self._bringing.bring(job, snapshot, rank, sources, is_here_bad=False)
            job.ledger.unhold(snapshot)
        job.settle()

    async def _repair(self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[BadChunk]) -> Repair:
        facts = job.ledger.snapshots.get(snapshot)
        if facts is None or rank not in facts.shards:
            return Repair(False, is_proved=False, why="the shard has been dropped meanwhile")
        point("daemon.repair.before")
        outcome = Repair(False)
        for one in self._sharing(job, snapshot, rank, bad):
            result = await self._bring(job, one, rank)
            if one == snapshot:
                outcome = result
        if not outcome.is_whole:  # what another snapshot got back may be what this one lacks
            outcome = await self._bring(job, snapshot, rank)
        point("daemon.repair.after")
        if outcome.is_whole:
            self._metrics.repaired_chunks.inc(len(bad))
        else:
            self._metrics.repairs_failed.inc()
        return outcome

    def _sharing(
        self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[BadChunk]
    ) -> list[SnapshotId]:
        """The snapshots whose shards lie in the bad frames; those first whose rows are known."""
        chunks = job.ledger.snapshots[snapshot].shards[rank].record.chunks
        places = {chunks[index].place for index, _ in bad if index < len(chunks)}
        found = []
        for facts in job.ledger.newest_first():
            shard = facts.shards.get(rank)
            if shard is None or facts.problem:
                continue
            if facts.id == snapshot or any(chunk.place in places for chunk in shard.record.chunks):
                shard.is_verified = False
                found.append(facts.id)
        planned = {plan.map.id for plan in job.parity.plans()}
        return sorted(found, key=lambda each: (each not in planned, each != snapshot))

    async def _bring(self, job: Job, snapshot: SnapshotId, rank: int) -> Repair:
        if snapshot not in job.ledger.snapshots:
            return Repair(False, why="the snapshot has been dropped meanwhile")
        job.ledger.hold(snapshot)
        try:
            sources, silent = await self._sources(job.name, snapshot)
            found = await self._bringing.bring(job, snapshot, rank, sources, is_here_bad=True)
        except NotRestorable as error:
            doubt = f"; {', '.join(silent)} did not answer" if silent else ""
            return Repair(False, self._cluster.sees_all and not silent, error.message + doubt)
        except SnapdError as error:
            return Repair(False, False, error.message)
        finally:
            job.ledger.unhold(snapshot)
        job.ledger.unhold(snapshot)  # what `bring` holds for a restore
        return Repair(True, source=found.source)

    async def _sources(self, job: str, snapshot: SnapshotId) -> tuple[list[ShardSource], list[str]]:
        """Where each shard of the snapshot is, and who did not say what it has."""
        inventories, silent = await gather_inventories(
            self._cluster.living, lambda node: self._cluster.inventory(node, job)
        )
        return sources_of(snapshot, inventories), silent


def sources_of(snapshot: SnapshotId, inventories: Iterable[Inventory]) -> list[ShardSource]:
    """Per rank: who has the shard whole, and who the records of the newest rows that cover it."""
    whole: dict[int, list[str]] = {}
    rows: dict[int, tuple[int, int, list[str]]] = {}  # rank -> epoch, group, nodes with the records
    for inventory in inventories:
        for held in inventory.held:
            if held.id == snapshot:
                whole.setdefault(held.rank, []).append(inventory.node)
        for some in inventory.rows:
            for rank in some.record_ranks if some.id == snapshot else ():
                epoch, group, nodes = rows.get(rank, (0, 0, []))
                if some.epoch > epoch:
                    epoch, group, nodes = some.epoch, some.group, []
                if some.epoch == epoch:
                    rows[rank] = (epoch, group, [*nodes, inventory.node])
    found = []
    for rank in sorted({*whole, *rows}):
        epoch, group, nodes = rows.get(rank, (0, 0, []))
        found.append(ShardSource(rank, tuple(whole.get(rank, ())), rank in rows, group, epoch, tuple(nodes)))
    return found


# parity


async def verify_parity(job: Job, snapshot: SnapshotId) -> tuple[int, int]:
    """Hash this node's parity of a snapshot again. Bad fragments are forgotten. Returns (fragments hashed, of these
    bad).
    """
    wanted = {
        (row.id, number)
        for plan in job.parity.plans()
        if plan.map.id == snapshot
        for row in plan.rows
        for number in range(len(row.parity_nodes))
    }
    keys = job.parity.doubt(sorted(wanted))
    found = await asyncio.get_running_loop().run_in_executor(
        job.context.hashing, _bad_fragments, job.parity, keys
    )
    for (row_id, number), error in found:
        discard_fragment(job, FragmentName(job.name, row_id, number), error)
    if found:
        job.settle()
    return len(keys), len(found)


def _bad_fragments(
    parity: ParityStore, keys: Sequence[tuple[bytes, int]]
) -> list[tuple[tuple[bytes, int], IntegrityError]]:
    bad: list[tuple[tuple[bytes, int], IntegrityError]] = []
    for key in keys:
        try:
            with parity.read(*key):
                pass
        except NotFoundError:
            continue  # dropped meanwhile
        except IntegrityError as error:
            bad.append((key, error))
    return bad
