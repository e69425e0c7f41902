"""Bringing a shard of another node here, as an ordinary captured shard of this one.

First from the nodes that have it whole, else from the rows of its group; several sources are mixed chunk by chunk.
Bytes are received and decoded straight into frames that were granted for them; every chunk is hashed before the record
is written, and a kill before that leaves free frames and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from snapd.codec.base import Codec
from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.protection import PlacedRecord, RowMap, RowPlan, make_plan
from snapd.core.rows import rows_of_shard
from snapd.errors import NotRestorable, SnapdError, UnavailableError
from snapd.memory.hashing import hash_digests
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import BulkStore, Links
from snapd.runtime.arena_writing import ArenaWriter, bad_reused
from snapd.runtime.chunk_sources import (
    REASONS_SHOWN,
    BringBench,
    Findings,
    Need,
    RowNeed,
    decode_rows,
    pull_whole,
    row_sources,
)
from snapd.runtime.job import Job
from snapd.runtime.pipeline import Pipeline
from snapd.units import MIB

ATTEMPTS = 3
PAUSE_FIRST_S = 0.5
PULL_BYTES = 16 * MIB  # of one call
PULL_CHUNKS = 64
ORIGINS_SHOWN = 4

FetchOwn = Callable[[str, str, SnapshotId], Awaitable[Sequence[ShardRecord]]]
"""(node, job, snapshot) -> records of the shards whose bytes that node has."""
FetchRows = Callable[[str, str, SnapshotId, int], Awaitable[tuple[RowMap, Sequence[PlacedRecord]]]]
"""(node, job, snapshot, epoch) -> the row map of that epoch and its records, as that node replicates them.

Both raise UnavailableError or NotFoundError.
"""
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ShardSources:
    """Where one rank's shard of the snapshot may come from.

    `whole`: nodes that have its bytes, the preferred first (this node may be among them). `record_nodes`: nodes that
    have the records of the row map of `epoch` by which it is coded; empty, and epoch 0, if it is not.
    """

    whole: tuple[str, ...] = ()
    record_nodes: tuple[str, ...] = ()
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class RecoveryMeans:
    """What recovery works with; one for all jobs of the node. `store`: the node's own. `links`: not the paced ones."""

    node: str
    links: Links
    store: BulkStore
    pipeline: Pipeline
    make_codec: Callable[[Code], Codec]
    fetch_own: FetchOwn
    fetch_rows: FetchRows
    metrics: ProtectionMetrics


async def bring_shard(
    job: Job, means: RecoveryMeans, snapshot: SnapshotId, rank: int, sources: Mapping[int, ShardSources]
) -> ShardRecord:
    """Bring the shard of `rank` into this node's arena of that rank. One that is here is hashed, and what is bad of it
    brought anew. `sources`: of all ranks of the snapshot, since the chunks of others are data fragments of its rows.

    When it returns, the shard is in the index and the ledger, verified, and its snapshot is held once more: the caller
    calls `job.ledger.unhold` when whoever needed it is done.

    Raises:
        NotRestorable: kind `shard_sources`: some chunk cannot be had: names the row, the nodes and what is missing.
        UnavailableError: kind `shard_sources`: as above, but a node that did not answer may have what is missing.
        CapacityError: it does not fit. ConflictError: kind `chunk_bytes`: the job has another chunk size here.
    """
    work = _Bringing(job, means, snapshot, rank, sources)
    try:
        with means.pipeline.used():
            return await work.run()
    finally:
        work.stop.set()


async def find_record(
    job: Job, means: RecoveryMeans, snapshot: SnapshotId, rank: int, sources: Mapping[int, ShardSources]
) -> ShardRecord:
    """The record of a rank's shard, from any node that has it.

    Raises:
        NotRestorable, UnavailableError: kind `shard_sources`.
    """
    work = _Bringing(job, means, snapshot, rank, sources)
    found: list[ShardRecord] = []

    async def attempt() -> bool:
        record = await work.find_record()
        found.extend([record] if record is not None else [])
        return record is not None

    await work.insist(attempt)
    return found[-1]


async def fill_chunks(
    job: Job,
    means: RecoveryMeans,
    record: ShardRecord,
    sources: Mapping[int, ShardSources],
    wanted: Iterable[tuple[int, memoryview]],
) -> None:
    """Fill memory of the caller's with chunks of a shard (number, as large as the chunk), each verified.

    Raises:
        NotRestorable, UnavailableError: as `bring_shard`; the memory is then undefined.
    """
    work = _Bringing(job, means, record.id, record.rank, sources)
    chunks = record.chunks
    left = [Need(at, chunks[at].nbytes, chunks[at].digest, chunks[at].place, view) for at, view in wanted]

    async def attempt() -> bool:
        nonlocal left
        left = await work.pull(left)
        left = await work.decode(left) if left else []
        return not left

    try:
        with means.pipeline.used():
            await work.insist(attempt)
    finally:
        work.stop.set()


@dataclass(slots=True)
class _Bringing:
    job: Job
    means: RecoveryMeans
    snapshot: SnapshotId
    rank: int
    sources: Mapping[int, ShardSources]
    stop: threading.Event = field(default_factory=threading.Event)
    findings: Findings = field(default_factory=Findings)
    reasons: list[str] = field(default_factory=list)
    maps: dict[int, tuple[RowMap, Sequence[PlacedRecord]]] = field(default_factory=dict)  # by epoch

    async def run(self) -> ShardRecord:
        brought: list[ShardRecord] = []

        async def attempt() -> bool:
            record = await self._attempt()
            brought.extend([record] if record is not None else [])
            return record is not None

        await self.insist(attempt)
        return brought[-1]

    async def insist(self, attempt: Callable[[], Awaitable[bool]]) -> None:
        """Try until it worked, or until nobody who does not answer could help."""
        for turn in range(ATTEMPTS):
            if turn:
                await asyncio.sleep(PAUSE_FIRST_S * 2 ** (turn - 1))
            self.findings = Findings()
            self.reasons.clear()
            is_done = await attempt()
            self._tell_findings()
            if is_done:
                return
            if not self.findings.is_unreachable:
                break
        told = "; ".join(dict.fromkeys(self.reasons[:REASONS_SHOWN])) or "no node is known to have it"
        error = UnavailableError if self.findings.is_unreachable else NotRestorable
        raise error(
            f"shard of rank {self.rank} of snapshot {self.snapshot}: {told}",
            kind="shard_sources",
            job=self.job.name,
            rank=self.rank,
        )

    async def _attempt(self) -> ShardRecord | None:
        started_s = self.job.context.environment.monotonic_s()
        found = await self.find_record()
        if found is None:
            return None
        writer = await self._writer(found)
        try:
            left = await self.pull(_needs(writer))
            if left:
                left = await self.decode(left)
            if left:
                return None
            record = writer.commit()
            self.job.ledger.hold(self.snapshot)
        finally:
            writer.close()
        self.job.context.log.info(
            "shard.brought",
            job=self.job.name,
            generation=self.snapshot.generation,
            step=self.snapshot.step,
            rank=self.rank,
            nbytes=record.nbytes,
            reused_chunks=len(writer.reused),
            arrived_chunks=len(writer.arrived),
            fetched_bytes=self.findings.fetched_bytes,
            decoded_bytes=self.findings.decoded_bytes,
            origins="; ".join(self.findings.origins[:ORIGINS_SHOWN]),
            seconds=round(self.job.context.environment.monotonic_s() - started_s, 3),
        )
        metrics = self.means.metrics.recovered_bytes
        metrics.labels(how="decoded").inc(self.findings.decoded_bytes)
        metrics.labels(how="fetched").inc(record.nbytes - self.findings.decoded_bytes)
        self.job.changes.notify()
        return record

    # the record

    async def find_record(self) -> ShardRecord | None:
        """The shard's record, from here, from who has the bytes, or from who replicates it."""
        facts = self.job.ledger.snapshots.get(self.snapshot)
        if facts is not None and self.rank in facts.shards:
            return facts.shards[self.rank].record
        self._take_own_maps()
        source = self.sources.get(self.rank)
        for node in self._others(source.whole if source else ()):
            own = await self._asked(node, self.means.fetch_own(node, self.job.name, self.snapshot))
            record = self._checked(own or ())
            if record is not None:
                return record
        if not any(self._checked(p.record for p in records) for _, records in self.maps.values()):
            await self._fetch_maps()
        for _, records in self.maps.values():
            record = self._checked(placed.record for placed in records)
            if record is not None:
                return record
        self.reasons.append("no node that answers has the shard's record")
        return None

    async def _fetch_maps(self) -> None:
        """Row maps that cover the rank, from the first node that replicates each."""
        source = self.sources.get(self.rank)
        for node in self._others(source.record_nodes if source else ()):
            if source is None or source.epoch in self.maps:
                return
            rows = await self._asked(
                node, self.means.fetch_rows(node, self.job.name, self.snapshot, source.epoch)
            )
            if rows is not None:
                self._take_map(*rows)

    def _take_own_maps(self) -> None:
        for plan in self.job.parity.plans():
            if plan.map.id == self.snapshot:
                self._take_map(plan.map, self.job.parity.records(plan.map))

    def _take_map(self, row_map: RowMap, records: Sequence[PlacedRecord]) -> None:
        if any(placed.record.rank == self.rank for placed in records):
            self.maps[row_map.epoch] = (row_map, records)

    def _others(self, nodes: Iterable[str]) -> list[str]:
        return [node for node in nodes if node != self.means.node]

    async def _asked(self, node: str, call: Awaitable[R]) -> R | None:
        try:
            return await call
        except UnavailableError as error:
            self.findings.note_away(node, error)
            self.reasons.append(f"{node} does not answer: {error.message}")
        except SnapdError as error:
            self.reasons.append(f"{node}: {error.message}")
        return None

    def _checked(self, records: Iterable[ShardRecord]) -> ShardRecord | None:
        """The record of our shard among these, if it is what its own digest says."""
        for record in records:
            if (record.job, record.id, record.rank) != (self.job.name, self.snapshot, self.rank):
                continue
            if hash_digests([chunk.digest for chunk in record.chunks]) == record.digest:
                return record
            self.reasons.append("a record does not agree with its own digest")
        return None

    # frames

    async def _writer(self, record: ShardRecord) -> ArenaWriter:
        """Frames for all chunks; what captured shards here hold already was hashed."""
        refused: set[Place] = set()
        while True:
            writer = await ArenaWriter.open(self.job, record, refused=refused)
            try:
                bad = await self.means.pipeline.bring(bad_reused, writer.arena.memory, record, writer.reused)
                if not bad:
                    await self.means.pipeline.bring(writer.check_arrived)
            except BaseException:
                writer.close()
                raise
            if not bad:
                return writer
            writer.close()
            refused |= bad

    # sources

    def _bench(self) -> BringBench:
        return BringBench(
            self.job.name,
            self.snapshot,
            self.rank,
            self.means.node,
            self.means.store,
            self.means.links,
            self.means.pipeline.buffers,
            self.findings,
            self.stop,
        )

    async def pull(self, left: list[Need]) -> list[Need]:
        """All that nodes with the whole shard give; each chunk is asked of every such node before it is given up.
        Returns what they do not have.
        """
        source = self.sources.get(self.rank)
        nodes = self._others(source.whole if source else ())
        bench, tried = self._bench(), defaultdict[int, set[str]](set)
        while left:
            batches = _share_out(left, [n for n in nodes if n not in self.findings.away], tried)
            if not batches:
                break
            handed = {need.index for _, needs in batches for need in needs}
            results = await self._all(
                self.means.pipeline.bring(pull_whole, bench, node, needs) for node, needs in batches
            )
            lacking = [entry for result in results for entry in result]
            self.reasons.extend(reason for _, reason in lacking)
            left = [need for need in left if need.index not in handed] + [need for need, _ in lacking]
        return left

    async def decode(self, left: list[Need]) -> list[Need]:
        """What the rows of any row map give. Returns what they do not."""
        if not self.maps:
            self._take_own_maps()
        if not self.maps:
            await self._fetch_maps()
        for epoch in sorted(self.maps, reverse=True):
            plan = await self.means.pipeline.plan(make_plan, *self.maps[epoch])
            left = await self._decode_by(plan, left)
            if not left:
                return []
        self.reasons.extend([] if self.maps else ["its rows are not known to any node that answers"])
        return left

    async def _decode_by(self, plan: RowPlan, left: list[Need]) -> list[Need]:
        where = rows_of_shard(plan.rows, self.rank)
        needs: list[RowNeed] = []
        for need in left:
            row, number = where.get(need.index, (None, 0))
            if row is not None and row.chunks[number].digest == need.digest:
                needs.append(RowNeed(row, number, need, row_sources(row, number, self._holders)))
        codec, bench, pipeline = self.means.make_codec(plan.map.code), self._bench(), self.means.pipeline
        size = pipeline.rows_per_batch(plan.map.code.k, plan.frame_bytes, threads=pipeline.bring_threads)
        batches = [needs[first : first + size] for first in range(0, len(needs), size)]
        results = await self._all(
            pipeline.bring(decode_rows, bench, codec, batch, plan.frame_bytes) for batch in batches
        )
        failed = [row for result in results for row in result]
        self.reasons.extend(row.problem() for row in failed)
        lacking = {row.need.index for row in failed} | {n.index for n in left} - {r.need.index for r in needs}
        return [need for need in left if need.index in lacking]

    def _holders(self, rank: int) -> Iterable[str]:
        source = self.sources.get(rank)
        return source.whole if source is not None else ()

    async def _all(self, works: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
        """Run all to their end, also when one fails or we are cancelled: none may write into a frame that was given
        back.
        """
        gathered = asyncio.gather(*works, return_exceptions=True)
        try:
            results = await asyncio.shield(gathered)
        except asyncio.CancelledError:
            self.stop.set()
            await gathered
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    def _tell_findings(self) -> None:
        for text in dict.fromkeys(self.findings.wrong):
            self.means.metrics.wrong_bytes.inc()
            self.job.context.log.error("peer.wrong_bytes", job=self.job.name, rank=self.rank, reason=text)


def _needs(writer: ArenaWriter) -> list[Need]:
    """What has to be brought into a shard's frames."""
    chunks = writer.record.chunks
    return [
        Need(index, chunks[index].nbytes, chunks[index].digest, writer.places[index], writer.view(index))
        for index in writer.missing
    ]


def _share_out(
    left: Iterable[Need], nodes: Sequence[str], tried: dict[int, set[str]]
) -> list[tuple[str, list[Need]]]:
    """Give each chunk to the node with least to do among those that were not asked for it; cut into calls."""
    load = dict.fromkeys(nodes, 0)
    open_calls: dict[str, list[Need]] = {}
    calls: list[tuple[str, list[Need]]] = []
    for need in left:
        able = [node for node in nodes if node not in tried[need.index]]
        if not able:
            continue
        node = min(able, key=lambda name: load[name])
        load[node] += need.nbytes
        tried[need.index].add(node)
        call = open_calls.get(node)
        is_full = call is not None and (
            len(call) >= PULL_CHUNKS or sum(n.nbytes for n in call) + need.nbytes > PULL_BYTES
        )
        if call is None or is_full:
            call = open_calls[node] = []
            calls.append((node, call))
        call.append(need)
    return calls
