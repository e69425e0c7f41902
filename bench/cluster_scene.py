"""A cluster under measurement: nodes in network namespaces, light ranks with synthetic bytes, and what is read off:
CPU of the daemons, bytes on the interfaces, parity in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from snapd_proto import admin_pb2  # noqa: E402

from tests.cluster.harness.cluster import Cluster, cluster  # noqa: E402
from tests.cluster.harness.daemon import BULK_PORT, ClusterDaemon  # noqa: E402
from tests.cluster.harness.hosts import Host  # noqa: E402
from tests.cluster.harness.light import LightWorld  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PULLER = Path(__file__).with_name("cluster_puller.py")
WAIT_S = 120.0
LOOK_S = 0.1


@dataclass(frozen=True)
class Reading:
    """Totals at a moment: of all daemons' CPU seconds, and of bytes sent over all nodes' interfaces."""

    t: float
    cpu_s: float
    sent_bytes: int


def cpu_s(daemon: ClusterDaemon) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def sent_bytes(host: Host) -> int:
    """Bytes that a host has sent over its interface, headers included."""
    if not host.namespace:
        return 0
    said = json.loads(host.run("ip", "-s", "-j", "link", "show", "dev", host.interface))
    return int(said[0]["stats64"]["tx"]["bytes"])


def read(made: Cluster) -> Reading:
    cpu = sum(cpu_s(daemon) for daemon in made.running)
    return Reading(time.monotonic(), cpu, sum(sent_bytes(daemon.host) for daemon in made.daemons))


@contextmanager
def measured_cluster(
    code: str, nodes: int, *, is_tls: bool, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Cluster]:
    """Started and settled. The rate limit is off: what is measured is what it costs, not how slowly it may be done."""
    settings = {
        "SNAPD_ARENA_CHUNK_BYTES": str(chunk_bytes),
        "SNAPD_CLUSTER_LEASE": "2",
        "SNAPD_CLUSTER_LOST_AFTER": "10",
        "SNAPD_CAPTURE_POLL_INTERVAL": "0.5",
    }
    with cluster(nodes, code, is_tls=is_tls, settings=settings) as made:
        made.start()
        made.wait_settled()
        yield made


def wait_complete(made: Cluster, job: str, step: int) -> None:
    wait_for(
        lambda: _job(made, job).complete_step >= step,
        f"step {step} complete",
        WAIT_S,
        made.says,
        every_s=LOOK_S,
    )


def wait_protected(made: Cluster, job: str, step: int) -> None:
    wait_for(
        lambda: _job(made, job).protected_step >= step,
        f"step {step} protected",
        WAIT_S,
        made.says,
        every_s=LOOK_S,
    )


def _job(made: Cluster, job: str) -> admin_pb2.JobStatus:
    return made.daemons[0].job(job) or admin_pb2.JobStatus()


def parity_bytes(made: Cluster, job: str) -> tuple[int, int]:
    """(in use, backed) bytes of parity on all nodes. Backed is room for two snapshots: the protected one's parity stays
    until a newer one's is whole.
    """
    used = backed = 0
    for daemon in made.daemons:
        folder = daemon.arena / "jobs" / job
        backed += sum(path.stat().st_blocks * 512 for path in folder.glob("parity.seg-*"))
        with contextlib.closing(sqlite3.connect(f"file:{folder / 'index.db'}?mode=ro", uri=True)) as index:
            used += index.execute("SELECT COALESCE(SUM(nbytes), 0) FROM fragments").fetchone()[0]
    return used, backed


def world_of(made: Cluster, job: str, state_bytes: int, chunk_bytes: int = 0) -> LightWorld:
    """One rank beside each daemon, `state_bytes` in all; `chunk_bytes`: 0 for what the daemons choose."""
    each = state_bytes // len(made.daemons)
    world = LightWorld(made.daemons, job, state_bytes=each, chunk_bytes=chunk_bytes)
    world.open()
    return world


def pull(
    made: Cluster, job: str, *, at: ClusterDaemon, peers: list[ClusterDaemon], nbytes: int
) -> dict[str, Any]:
    """Pull about so many bytes of the newest complete snapshot from peers to a node; with the CPU of both sides."""
    status = _job(made, job)
    chunks = []
    for peer in peers:
        request = admin_pb2.GetSnapshotRequest(
            job=job, has_step=True, step=status.complete_step, has_generation=True,
            generation=status.complete_generation,
        )  # fmt: skip
        rank = made.daemons.index(peer)
        for shard in peer.asker.ask("GetSnapshot", request).shards:
            if shard.rank == rank:
                found = [(i, c.nbytes) for i, c in enumerate(shard.chunks)]
                chunks += [
                    [job, status.complete_generation, status.complete_step, rank, i, n, peer.node]
                    for i, n in found
                ]
    total = sum(chunk[5] for chunk in chunks)
    chunks = (chunks * (nbytes // total + 1))[: max(1, round(len(chunks) * nbytes / total))]
    seen = made.daemons[0].status().cluster
    trust = made.trust(at)
    order = {
        "node": at.node, "cluster_id": seen.cluster_id, "epoch": seen.epoch, "chunks": chunks,
        "addresses": {peer.node: f"{peer.host.address}:{BULK_PORT}" for peer in peers},
        "certificate": trust.get("SNAPD_CLUSTER_CERT", ""), "key": trust.get("SNAPD_CLUSTER_KEY", ""),
        "ca": trust.get("SNAPD_CLUSTER_CA", ""),
    }  # fmt: skip
    before = read(made)
    done = subprocess.run(
        at.host.command(sys.executable, str(PULLER)), input=json.dumps(order), capture_output=True, text=True,
        env={**os.environ, **at.trainer_env()}, timeout=WAIT_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the puller failed: {done.stderr[-2000:]}")
    after = read(made)
    result = json.loads(done.stdout)
    result["daemons_cpu_s"] = after.cpu_s - before.cpu_s
    return dict(result)
