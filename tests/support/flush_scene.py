"""What a tier has, looked at from outside: every snapshot that is listed is read to its last byte."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snapd_proto import admin_pb2, format_pb2

from snapd.codec.compress import decode_chunk
from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.known_chunks import committed_snapshots, read_entry, read_record
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer
from tests.support.stores import directory_store
from tests.support.waiting import wait_for

# every second step, nothing by time, as fast as it goes
BY_STEPS = {"SNAPD_TIER_EVERY_STEPS": "2", "SNAPD_TIER_EVERY": "0", "SNAPD_TIER_RATE": "0"}
ON_DEMAND = {**BY_STEPS, "SNAPD_TIER_EVERY_STEPS": "0"}


def read_tier(store: Store, job: str) -> dict[SnapshotId, list[list[bytes]]]:
    """Every committed snapshot -> for each rank its chunks. Raises what is wrong with any of them."""
    keys = TierKeys(job)
    found: dict[SnapshotId, list[list[bytes]]] = {}
    for snapshot, revisions in committed_snapshots(store, keys).items():
        record = read_record(store, keys, snapshot, revisions[0])
        found[snapshot] = [read_shard(store, keys, shard) for shard in shards_of(store, record)]
    return found


def shards_of(store: Store, record: StoredSnapshot) -> list[StoredShard]:
    return [read_entry(store, record, entry) for entry in record.shards]


def read_shard(store: Store, keys: TierKeys, shard: StoredShard) -> list[bytes]:
    return [read_chunk(store, keys, chunk) for chunk in shard.chunks]


def read_chunk(store: Store, keys: TierKeys, chunk: StoredChunk) -> bytes:
    """Checks the digest, too."""
    stored = bytearray(chunk.stored_nbytes)
    store.read_into(keys.pack(chunk.pack), chunk.offset, memoryview(stored))
    out = bytearray(chunk.nbytes)
    decode_chunk(stored, chunk, memoryview(out))
    return bytes(out)


def intents(store: Store, job: str) -> list[str]:
    return [info.key for info in store.list(TierKeys(job).intents)]


def unfinished(store: Store) -> list[str]:
    """Keys of uploads that were neither finished nor called off."""
    return [key for key, _, _ in store.unfinished() if key.startswith("jobs/")]


def orphans(store: Store, job: str) -> set[str]:
    """Packs that no committed snapshot names."""
    keys = TierKeys(job)
    named: set[str] = set()
    for snapshot, revisions in committed_snapshots(store, keys).items():
        data = store.read(keys.snapshot(snapshot, revisions[0]), max_nbytes=NBYTES_MAX[Kind.SNAPSHOT])
        assert data
        named.update(read_record(store, keys, snapshot, revisions[0]).packs)
    there = {keys.pack_name(info.key) for info in store.list(keys.packs)}
    return {name for name in there if name is not None} - named


class TierDaemon:
    """A daemon with a directory tier, and one trainer that captures, restarts the daemon's connection when it must."""

    def __init__(self, daemon: DaemonProcess, root: Path) -> None:
        self.daemon, self.root = daemon, root
        self.store = directory_store(root)

    def snapshots(self, job: str = "a") -> dict[SnapshotId, list[list[bytes]]]:
        return read_tier(self.store, job)

    def flush(self, job: str = "a") -> Any:
        """The job's `FlushStatus`."""
        return self.daemon.job(job).flush

    def wait_durable(
        self, step: int, job: str = "a", *, generation: int = 1, timeout_s: float = 30.0
    ) -> None:
        def is_durable() -> bool:
            flush = self.flush(job)
            newest = (flush.durable_generation, flush.durable_step)
            return bool(flush.has_durable and newest >= (generation, step))

        wait_for(is_durable, f"step {step} is durable", timeout_s)

    def flush_request(self, timeout_s: float, job: str = "a") -> admin_pb2.FlushRequest:
        return admin_pb2.FlushRequest(job=job, timeout_s=timeout_s)

    def record(self, step: int, job: str = "a") -> format_pb2.ShardRecord:
        """Of rank 0's shard in memory."""
        request = admin_pb2.GetSnapshotRequest(job=job, has_step=True, step=step)
        return self.daemon.admin("GetSnapshot", request).shards[0]

    def wait_pause(self, kind: str, job: str = "a") -> None:
        wait_for(lambda: self.flush(job).pause == kind, f"a pause for {kind}")


@contextmanager
def tier_daemon(root: Path | None = None, **settings: str) -> Iterator[TierDaemon]:
    """A daemon that is not started yet, its tier in a folder of its own or in `root`."""
    own = Path(tempfile.mkdtemp(prefix="snapd-test-tier-"))
    root = root or own / "tier"
    root.mkdir(exist_ok=True)
    try:
        with daemon_folders(SNAPD_TIER_SHARED=str(root), **{**BY_STEPS, **settings}) as daemon:
            yield TierDaemon(daemon, root)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def capture_steps(
    trainer: FakeTrainer, first: int, last: int, *, seed: int = 1, pause_s: float = 0.0
) -> None:
    """Capture each step, as a training loop does; `pause_s` after each."""
    for step in range(first, last + 1):
        trainer.capture(step, seed)
        time.sleep(pause_s)
