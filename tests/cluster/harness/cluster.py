"""A cluster under test: hosts, a coordinator, a daemon per host."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from snapd_proto import admin_pb2

from tests.cluster.harness.certificates import Authority
from tests.cluster.harness.daemon import PORT, ClusterDaemon
from tests.cluster.harness.etcd import EtcdServer
from tests.cluster.harness.hosts import Hosts
from tests.support.fake_trainer import Refused
from tests.support.waiting import wait_for

SETTLE_S = 60.0
# Short times, so that a test sees what takes minutes in a real cluster; the order between them is as there.
QUICK = {
    "SNAPD_CLUSTER_LEASE": "2",
    "SNAPD_CLUSTER_LOST_AFTER": "6",
    "SNAPD_CLUSTER_RESTORE_WAIT": "30",
    "SNAPD_CLUSTER_RATE": "0",
    "SNAPD_CAPTURE_POLL_INTERVAL": "0.2",
    "SNAPD_ARENA_CHUNK_BYTES": str(64 << 10),
}


@dataclass
class Cluster:
    """`daemons` by node name, in the order of the hosts."""

    hosts: Hosts
    folder: Path
    arena: Path
    etcd: EtcdServer | None
    authority: Authority | None
    daemons: list[ClusterDaemon] = field(default_factory=list)
    guests: list[ClusterDaemon] = field(default_factory=list)  # hosts for what is no member, at first

    def __getitem__(self, node: str) -> ClusterDaemon:
        return next(daemon for daemon in self.daemons if daemon.node == node)

    @property
    def nodes(self) -> list[str]:
        return [daemon.node for daemon in self.daemons]

    @property
    def running(self) -> list[ClusterDaemon]:
        return [daemon for daemon in self.daemons if daemon.is_running]

    def trust(self, daemon: ClusterDaemon) -> dict[str, str]:
        if self.authority is None:
            return {"SNAPD_CLUSTER_PLAINTEXT": "yes", "SNAPD_CLUSTER_BULK": "plain"}
        return self.authority.issue(daemon.node, also=[daemon.host.address])

    def trust_of(self, node: str) -> dict[str, str]:
        """The settings of another node's certificate."""
        return self.trust(self[node])

    def rename(self, daemon: ClusterDaemon, node: str) -> None:
        """The next start of this daemon is another node of the cluster."""
        assert not daemon.is_running
        daemon.node = node
        daemon.settings |= self.trust(daemon)

    def start(self, daemons: Iterable[ClusterDaemon] | None = None) -> None:
        """Start all, then wait for all."""
        chosen = list(self.daemons if daemons is None else daemons)
        for daemon in chosen:
            daemon.start(is_waiting=False)
        for daemon in chosen:
            daemon.wait_answering()

    def wait_settled(self, nodes: Iterable[str] | None = None, timeout_s: float = SETTLE_S) -> int:
        """Wait until all running daemons have the same group table, which holds just these nodes (default: the
        running ones), and see them alive. Returns the epoch."""
        wanted = set(nodes if nodes is not None else [daemon.node for daemon in self.running])

        def epoch() -> int:
            found = set()
            for daemon in self.running:
                status = daemon.status().cluster
                grouped = {node for group in status.groups for node in group.nodes}
                living = {row.node for row in status.nodes if row.state == "living"}
                if grouped != wanted or living != wanted or status.is_away or status.distrust:
                    return 0
                found.add(status.epoch)
            return found.pop() if len(found) == 1 else 0

        return wait_for(
            _patient(epoch), f"a group table of {sorted(wanted)}", timeout_s, self.says, every_s=0.1
        )

    def says(self) -> str:
        """What each daemon says of the cluster and its jobs, for messages."""
        lines = []
        for daemon in self.running:
            try:
                status = daemon.status(timeout_s=2.0)
            except (OSError, grpc.RpcError, Refused) as error:
                lines.append(f"{daemon.node}: does not answer: {type(error).__name__}")
                continue
            seen = status.cluster
            groups = "; ".join(f"{','.join(g.nodes)} {g.code}" for g in seen.groups)
            states = " ".join(f"{row.node}={row.state}" for row in seen.nodes)
            lines.append(
                f"{daemon.node}: epoch {seen.epoch} [{groups}] {states} {seen.away_reason} {seen.distrust}"
            )
            lines += [f"    {job_line(job)}" for job in status.jobs]
        return "\n".join(lines)

    def tails(self) -> str:
        return "\n".join([self.says(), *(daemon.tail() for daemon in self.daemons)])

    def close(self) -> None:
        for host in self.hosts.all:
            host.kill_everything()
        for daemon in [*self.daemons, *self.guests]:
            daemon.asker.forget()


def job_line(job: admin_pb2.JobStatus) -> str:
    def name(has: bool, generation: int, step: int) -> str:
        return f"{generation}/{step}" if has else "-"

    complete = name(job.has_complete, job.complete_generation, job.complete_step)
    protected = name(job.has_protected, job.protected_generation, job.protected_step)
    target = name(job.has_target, job.target_generation, job.target_step)
    return (
        f"job {job.job}: generation {job.generation} complete {complete} target {target} protected {protected}"
        f" at {job.collector} ({job.protection}) {job.problem}"
    )


def _patient(is_so):  # type: ignore[no-untyped-def]
    """A daemon that does not answer at the moment: not yet."""

    def asked():  # type: ignore[no-untyped-def]
        try:
            return is_so()
        except (OSError, grpc.RpcError, Refused):
            return None

    return asked


@contextmanager
def cluster(
    count: int,
    code: str,
    *,
    is_tls: bool = True,
    is_etcd: bool = True,
    is_namespaced: bool | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A cluster whose daemons are not started yet. At the end nothing of it is left, but when it failed the logs.

    Without etcd the first host's daemon is the leader, which must not be lost.
    """
    folder = Path(tempfile.mkdtemp(prefix="snapdt-"))
    arena = Path(tempfile.mkdtemp(prefix="snapdt-", dir="/dev/shm"))
    is_failed = True
    try:
        with Hosts(count, is_namespaced=is_namespaced) as hosts:
            authority = Authority(folder / "certs") if is_tls else None
            etcd = EtcdServer(hosts.store, folder) if is_etcd else None
            made = Cluster(hosts, folder, arena, etcd, authority)
            leader = hosts.nodes[0]
            for host in hosts.nodes:
                coordinator = etcd.coordinator if etcd else f"{leader.address}:{PORT}"
                if etcd is None and host is leader:
                    coordinator = "leader"
                base = {"SNAPD_CLUSTER_COORDINATOR": coordinator, "SNAPD_CLUSTER_CODE": code}
                daemon = ClusterDaemon(host, folder, arena, QUICK | base | dict(settings or {}))
                daemon.settings |= made.trust(daemon)
                made.daemons.append(daemon)
            if etcd is not None:
                etcd.start()
            try:
                yield made
            finally:
                made.close()
        is_failed = False
    finally:
        shutil.rmtree(arena, ignore_errors=True)
        if not is_failed:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the logs are in {folder}")
