"""Several nodes in one process, for protection and recovery: real arenas, indexes, stores, pipelines and codecs, joined
by links that copy bytes on the caller's thread, count them, and fail as a test says.

A node is what the daemon builds, without sockets. Shards are made by hand: deterministic bytes per (job, step, rank,
chunk), so that every copy can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from snapd.codec.isal import make_codec
from snapd.coordination.embedded import EmbeddedCoordination
from snapd.core.cluster import Code, Group
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.protection import PlacedRecord, RowMap
from snapd.errors import DeadlineExceeded, NotFoundError, SnapdError, UnavailableError
from snapd.memory.folders import ArenaFolder
from snapd.memory.hashing import hash_digests
from snapd.memory.index import Index
from snapd.obs.log import EventLog
from snapd.obs.metrics import Metrics
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import FragmentName, Name, PeerLink, Pushed
from snapd.runtime.arena_writing import ArenaWriter
from snapd.runtime.bulk_store import NodeBulkStore
from snapd.runtime.context import Context, Environment, NodeSettings
from snapd.runtime.job import Job
from snapd.runtime.pipeline import Pipeline
from snapd.runtime.protecting import Means, Protector, Target, own_records
from snapd.runtime.recovering import RecoveryMeans, ShardSources, bring_shard
from snapd.runtime.recovery import take_up

CHUNK = 64 << 10
Fault = Callable[[str, Name | None], None]
"""(what, name): may raise what a link raises, or wait. `what`: fetch, push, holds, records."""


def settings() -> NodeSettings:
    return NodeSettings(
        chunk_bytes=CHUNK, slots=3, arena_bytes=0, headroom_bytes=0, poll_interval_s=0.5, interval_factor_max=8,
        restore_settle_s=1.0, restore_finish_s=1.0, grow_retry_s=0.05, hash_threads=1, sessions_max=8, wait_max_s=1.0,
    )  # fmt: skip


def environment(seed: int) -> Environment:
    draw = random.Random(seed)
    return Environment(
        monotonic_s=time.monotonic, monotonic_ns=time.monotonic_ns, wall_s=time.time,
        random_id=lambda: draw.randrange(1, 1 << 48), random_secret=lambda: draw.randbytes(16),
        random_token=lambda: draw.randbytes(16).hex(),
    )  # fmt: skip


def chunk_bytes(*key: object, nbytes: int) -> bytes:
    """The bytes of a chunk: the same for the same key."""
    seed = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return random.Random(seed).randbytes(nbytes)


@dataclass
class Counts:
    """Bulk bytes that went over the links, by (from, to)."""

    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.moved.values())


class Network:
    """All nodes, by name, and what is wrong between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: dict[str, FakeNode] = {}
        self.faults: dict[tuple[str, str], Fault] = {}
        self.corrupt: dict[
            tuple[str, str], Callable[[Name], bool]
        ] = {}  # (asker, peer): send wrong bytes for it?
        self.counts = Counts()
        self.lock = threading.Lock()

    def add(self, name: str, **options: object) -> FakeNode:
        node = self.nodes[name] = FakeNode(self, name, **options)  # type: ignore[arg-type]
        return node

    async def lose(self, name: str) -> None:
        """The node and its memory are gone."""
        node = self.nodes.pop(name)
        await node.close()
        shutil.rmtree(node.folder)

    async def close(self) -> None:
        for node in list(self.nodes.values()):
            await node.close()

    def check(self, asker: str, peer: str, what: str, name: Name | None = None) -> FakeNode:
        fault = self.faults.get((asker, peer))
        if fault is not None:
            fault(what, name)
        node = self.nodes.get(peer)
        if node is None:
            raise UnavailableError(f"{peer} is gone", kind="peer_unknown")
        with self.lock:
            self.counts.calls[what] += 1
        return node


@dataclass
class LoopbackLinks:
    network: Network
    asker: str

    def to(self, node: str) -> PeerLink:
        return LoopbackLink(self.network, self.asker, node)


@dataclass
class LoopbackLink:
    network: Network
    asker: str
    peer: str

    def fetch(self, wanted: Sequence[tuple[Name, memoryview]], *, timeout_s: float) -> list[bytes]:
        digests = []
        for name, view in wanted:
            node = self.network.check(self.asker, self.peer, "fetch", name)
            with node.store.read(name) as (source, digest):
                assert source.nbytes == view.nbytes
                view[:] = source
            is_wrong = self.network.corrupt.get((self.asker, self.peer))
            if is_wrong is not None and is_wrong(name):
                view[0] ^= 1
            self._count(self.peer, self.asker, view.nbytes)
            digests.append(digest)
        return digests

    def push(self, pushed: Sequence[Pushed], *, timeout_s: float) -> list[SnapdError | None]:
        return [self._push(one) for one in pushed]

    def _push(self, one: Pushed) -> SnapdError | None:
        node = self.network.check(self.asker, self.peer, "push", one.name)
        try:
            with node.store.write(one.name, one.data.nbytes, one.digest) as arrival:
                arrival.view[:] = one.data
                self._count(self.asker, self.peer, one.data.nbytes)
            arrival.wait()
        except SnapdError as error:
            return error
        return None

    def holds(self, names: Sequence[FragmentName], *, timeout_s: float) -> list[bool]:
        return self.network.check(self.asker, self.peer, "holds").store.holds(names)

    def close(self) -> None:
        return

    def _count(self, source: str, destination: str, nbytes: int) -> None:
        with self.network.lock:
            self.network.counts.moved[source, destination] += nbytes


class FakeNode:
    """One node: its jobs, its store, its pipeline, one protector per job."""

    def __init__(self, network: Network, name: str, *, threads: int = 2, bytes_max: int = 4 << 20) -> None:
        self.network = network
        self.name = name
        self.folder = network.folder / name
        self.errors: list[BaseException] = []
        self.jobs: dict[str, Job] = {}
        self.protectors: dict[str, Protector] = {}
        self.threads, self.bytes_max = threads, bytes_max
        self._open()

    def _open(self) -> None:
        self.hashing = ThreadPoolExecutor(1)
        self.blocking = ThreadPoolExecutor(1)
        self.context = Context(
            settings(), ArenaFolder.open(self.folder), EventLog(logging.getLogger(f"test.{self.name}")), Metrics(),
            environment(hash(self.name)), self.hashing, self.blocking, self.errors.append,
            held_by_job=lambda: {name: job.arena_bytes for name, job in self.jobs.items()},
            quarantine=self.errors.append,
        )  # fmt: skip
        self.metrics = ProtectionMetrics(self.context.metrics.registry)
        self.pipeline = Pipeline(threads=self.threads, bytes_max=self.bytes_max, bring_threads=2)
        self.store = NodeBulkStore(self.jobs.get, asyncio.get_running_loop())
        self.links = LoopbackLinks(self.network, self.name)

    async def close(self) -> None:
        """As kill -9, but for the threads: nothing is written any more, nothing is tidied up."""
        for protector in self.protectors.values():
            await protector.close()
        for task in self.context.tasks:
            task.cancel()
        await asyncio.gather(*self.context.tasks, return_exceptions=True)
        await asyncio.to_thread(self.pipeline.close)
        self.hashing.shutdown()
        self.blocking.shutdown()
        for job in self.jobs.values():
            job.is_removed = True
            job.index.close()

    async def restart(self) -> None:
        """Close, and take up what is in the arena."""
        await self.close()
        self.jobs, self.protectors = {}, {}
        self._open()
        self.take_up()

    def take_up(self) -> None:
        """All jobs that an earlier process left."""
        for name in self.context.arena.job_names():
            job = take_up(self.context, name, self._coordination, lambda *_: None)
            assert job is not None
            self.jobs[name] = job

    def _coordination(self, name: str, index: Index) -> EmbeddedCoordination:
        return EmbeddedCoordination(index, interval_factor_max=8)

    def job(self, name: str) -> Job:
        if name not in self.jobs:
            folder = self.context.arena.job(name)
            folder.path.mkdir(mode=0o700)
            index = Index.open(folder.index, job=name, may_create=True)
            self.jobs[name] = Job(self.context, name, folder, index, self._coordination(name, index))
        return self.jobs[name]

    # shards

    async def capture(
        self,
        job: str,
        step: int,
        rank: int,
        sizes: Sequence[int],
        *,
        versions: Sequence[int] | None = None,
        is_blank: bool = False,
    ) -> ShardRecord:
        """A captured shard with chunks of these sizes. `versions`: chunk i's bytes follow from (rank, i, versions[i]);
        the step, if it is not given. A version below the step was first stored for that step. `is_blank`: all zeros.
        """
        versions = versions or [step] * len(sizes)
        blobs = [
            bytes(nbytes) if is_blank else chunk_bytes(job, rank, i, version, nbytes=nbytes)
            for i, (nbytes, version) in enumerate(zip(sizes, versions, strict=True))
        ]
        chunks = tuple(
            Chunk(
                len(blob), xxhash.xxh3_128_digest(blob), Place(0, 0), None if v == step else SnapshotId(1, v)
            )
            for blob, v in zip(blobs, versions, strict=True)
        )
        record = ShardRecord(
            job, SnapshotId(1, step), rank, 4096, CHUNK, 1, CHUNK, 0, chunks, None, 0.0,
            hash_digests([chunk.digest for chunk in chunks]),
        )  # fmt: skip
        writer = await ArenaWriter.open(self.job(job), record)
        for index in writer.places:
            if index not in writer.reused:
                writer.view(index)[:] = blobs[index]
        return writer.commit()

    def shard(self, job: str, step: int, rank: int) -> list[bytes]:
        """The bytes that lie here."""
        owner = self.jobs[job]
        record = owner.ledger.snapshots[SnapshotId(1, step)].shards[rank].record
        return [bytes(owner.arena(rank).memory.view(c.place, c.nbytes)) for c in record.chunks]

    # protection

    def protector(self, job: str) -> Protector:
        if job not in self.protectors:
            means = Means(
                self.name, self.links, self.pipeline, make_codec, lambda name: self._fetch_for(name),
                self.metrics, self.store.commits,
            )  # fmt: skip
            self.protectors[job] = Protector(self.job(job), means, lambda: None)
        return self.protectors[job]

    def _fetch_for(self, job: str) -> Callable[[str, SnapshotId], object]:
        async def fetch(node: str, snapshot: SnapshotId) -> list[ShardRecord]:
            return await self.fetch_own(node, job, snapshot)

        return fetch

    async def fetch_own(self, node: str, job: str, snapshot: SnapshotId) -> list[ShardRecord]:
        peer = self.network.check(self.name, node, "records")
        await asyncio.sleep(0)
        return own_records(peer.job(job), snapshot)

    async def fetch_rows(
        self, node: str, job: str, snapshot: SnapshotId, epoch: int
    ) -> tuple[RowMap, list[PlacedRecord]]:
        parity = self.network.check(self.name, node, "records").job(job).parity
        plan = parity.plan(snapshot, epoch)
        if plan is None:
            raise NotFoundError("no row map", kind="row_map")
        return plan.map, parity.records(plan.map)

    async def bring(self, job: str, step: int, rank: int, sources: dict[int, ShardSources]) -> ShardRecord:
        means = RecoveryMeans(
            self.name, self.links, self.store, self.pipeline, make_codec, self.fetch_own, self.fetch_rows,
            self.metrics,
        )  # fmt: skip
        return await bring_shard(self.job(job), means, SnapshotId(1, step), rank, sources)


# worlds


def group_of(nodes: Sequence[str], code: str, number: int = 0) -> Group:
    return Group(number, tuple(nodes), Code.parse(code))


def target(step: int, group: Group, epoch: int = 1) -> Target:
    return Target(SnapshotId(1, step), epoch, group)


def sources_now(
    network: Network, job: str, step: int, group: Group, epoch: int = 1
) -> dict[int, ShardSources]:
    """What a collector would say of a snapshot: who has which shard, and who the records of the group."""
    whole: dict[int, list[str]] = {}
    holders: list[str] = []
    ranks: set[int] = set()
    for name, node in sorted(network.nodes.items()):
        if job not in node.jobs:
            continue
        facts = node.jobs[job].ledger.snapshots.get(SnapshotId(1, step))
        for rank in facts.shards if facts else ():
            whole.setdefault(rank, []).append(name)
        plan = node.jobs[job].parity.plan(SnapshotId(1, step), epoch)
        if plan is not None:
            holders.append(name)
            ranks |= {chunk.rank for row in plan.rows for chunk in row.chunks}
    return {
        rank: ShardSources(tuple(whole.get(rank, ())), tuple(holders), epoch) for rank in ranks | set(whole)
    }


async def until(condition: Callable[[], bool], timeout_s: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so in time: {what}"
        await asyncio.sleep(0.01)


async def protect(
    network: Network, job: str, step: int, group: Group, *, epoch: int = 1, timeout_s: float = 20.0
) -> None:
    """Aim all members, and wait until all parts are done."""
    protectors = [network.nodes[name].protector(job) for name in group.nodes]
    for protector in protectors:
        protector.aim(target(step, group, epoch))
    await until(
        lambda: all(p.state.is_done for p in protectors),
        timeout_s,
        "; ".join(f"{p.state.rows_done}/{p.state.rows_total} {p.state.trouble}" for p in protectors),
    )
    identities = {protector.state.plan for protector in protectors}
    assert len(identities) == 1, "members planned different rows"


@contextlib.asynccontextmanager
async def network_of(folder: Path, names: Sequence[str], **options: object) -> AsyncIterator[Network]:
    """Nodes below `folder`; when it ends, none has met an error that it did not handle, and all frames add up."""
    network = Network(folder)
    for name in names:
        network.add(name, **options)
    try:
        yield network
        for node in network.nodes.values():
            assert node.errors == []
            for job in node.jobs.values():
                job.parity.check()
                for arena in job.arenas.values():
                    arena.pool.check()
    finally:
        await network.close()


def stall(seconds: float, *, what: str = "") -> Fault:
    """The peer falls silent: the call waits, then fails as a transport's deadline does."""

    def fault(kind: str, name: Name | None) -> None:
        if what in ("", kind):
            time.sleep(seconds)
            raise DeadlineExceeded("did not answer in time")

    return fault
