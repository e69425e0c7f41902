"""A world of fake trainers over the daemons of a cluster, a rank on each; and bytes that go bad in a node's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from snapd_proto import admin_pb2, format_pb2

from tests.cluster.harness.daemon import ClusterDaemon
from tests.support.fake_trainer import FakeTrainer
from tests.support.waiting import wait_for

WAIT_S = 30.0
CHUNKS = 8


class FakeWorld:
    """Rank i on daemons[i], in this process. Close it."""

    def __init__(self, daemons: Sequence[ClusterDaemon], job: str, incarnation: str = "one") -> None:
        self.daemons, self.job = list(daemons), job
        self.trainers = [FakeTrainer(daemon.runtime) for daemon in daemons]
        for rank, trainer in enumerate(self.trainers):
            trainer.open(
                job=job,
                rank=rank,
                world_size=len(daemons),
                incarnation=incarnation,
                local_rank=0,
                local_world_size=1,
                state_bytes_estimate=CHUNKS * (64 << 10),
            )

    def each(self, do: str, *arguments: Any, **named: Any) -> list[Any]:
        """The same on all ranks at once, as a barrier needs it."""
        with ThreadPoolExecutor(len(self.trainers)) as pool:
            futures = [pool.submit(getattr(t, do), *arguments, **named) for t in self.trainers]
            return [future.result() for future in futures]

    def capture(self, step: int, *, is_reusing_last: bool = False) -> None:
        self.each("capture", step, chunk_count=CHUNKS, is_reusing_last=is_reusing_last)

    def restore(self) -> list[int]:
        return self.each("restore", chunk_count=CHUNKS)

    def protect(self, step: int) -> None:
        """Capture a step on all ranks, and wait until it is protected."""
        self.capture(step)
        wait_protected(self.daemons, self.job, step)

    def close(self, *, is_final: bool = False) -> None:
        for trainer in self.trainers:
            if trainer.handshake is not None:
                trainer.close(final=is_final)
                trainer.disconnect()

    def die(self) -> None:
        """Gone without a word."""
        for trainer in self.trainers:
            trainer.disconnect()


def wait_protected(daemons: Sequence[ClusterDaemon], job: str, step: int) -> None:
    def is_so() -> bool:
        found = [daemon.job(job) for daemon in daemons]
        return all(each is not None and each.has_protected and each.protected_step >= step for each in found)

    wait_for(is_so, f"step {step} of {job} is protected", WAIT_S, *(daemon.tail for daemon in daemons))


def record_of(daemon: ClusterDaemon, job: str, step: int, rank: int) -> format_pb2.ShardRecord:
    reply = daemon.asker.ask("GetSnapshot", admin_pb2.GetSnapshotRequest(job=job, has_step=True, step=step))
    return next(record for record in reply.shards if record.rank == rank)


def chunk_bytes(daemon: ClusterDaemon, record: format_pb2.ShardRecord, index: int) -> bytes:
    chunk = record.chunks[index]
    with _segment(daemon, record, index).open("rb") as file:
        return os.pread(file.fileno(), chunk.nbytes, chunk.frame * record.chunk_bytes)


def flip(daemon: ClusterDaemon, record: format_pb2.ShardRecord, *indexes: int) -> None:
    """Flip a bit in the middle of each of these chunks, where it lies in the node's memory."""
    for index in indexes:
        chunk = record.chunks[index]
        _flip_at(_segment(daemon, record, index), chunk.frame * record.chunk_bytes + chunk.nbytes // 2)


def flip_parity(daemon: ClusterDaemon, job: str, every: int = 4096) -> int:
    """Flip bits all over the node's parity of a job; returns how many."""
    count = 0
    for path in sorted((daemon.arena / "jobs" / job).glob("parity.seg-*")):
        for offset in range(0, path.stat().st_size, every):
            _flip_at(path, offset)
            count += 1
    assert count, f"{daemon.node} holds no parity of {job}"
    return count


def _segment(daemon: ClusterDaemon, record: format_pb2.ShardRecord, index: int) -> Path:
    return daemon.arena / "jobs" / record.job / f"rank-{record.rank}.seg-{record.chunks[index].segment}"


def _flip_at(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([before[0] ^ 0x10]), offset)
        assert os.pread(file.fileno(), 1, offset) != before, "the flip did not happen"


def verify(daemon: ClusterDaemon, job: str, step: int) -> admin_pb2.VerifyProgress:
    """The last message of the Admin service's Verify."""
    request = admin_pb2.VerifyRequest(job=job, has_step=True, step=step)
    return list(daemon.asker.ask("Verify", request, WAIT_S))[-1]
