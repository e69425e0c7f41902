"""The garbage of a tier into which several nodes flush is collected by one of them; it is killed in the middle of that,
and another takes over. All the time every snapshot that the tier offers is read to its last byte.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapd.core.ids import SnapshotId
from snapd.store.base import Store
from tests.cluster.harness.cluster import Cluster, cluster
from tests.cluster.harness.daemon import ClusterDaemon
from tests.support.cluster_jobs import CHUNKS, FakeWorld
from tests.support.fake_trainer import Refused
from tests.support.stores import directory_store
from tests.support.tier_audit import audit, unnamed
from tests.support.waiting import wait_for

JOB = "all"
FALL_S = 5.0
STEP_S = 0.1
WAIT_S = 60.0
PAUSE_S = 0.05
KEEP = 2
SETTINGS = {
    "SNAPD_TIER_EVERY_STEPS": "1",
    "SNAPD_TIER_EVERY": "0",
    "SNAPD_TIER_RATE": "0",
    "SNAPD_TIER_KEEP_LAST": str(KEEP),
    "SNAPD_TIER_GC_EVERY": "1s",
    "SNAPD_TIER_INTENT_TTL": "4s",
}


@pytest.fixture
def tier() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="snapd-test-tier-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Auditor:
    """Reads all that the tier offers, again and again. `seen`: snapshots that were whole at some time."""

    def __init__(self, store: Store) -> None:
        self.seen: dict[SnapshotId, list[list[bytes]]] = {}
        self.audits = 0
        self.error: BaseException | None = None
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                self.seen.update(audit(self._store, JOB))
            except BaseException as error:
                self.error = error
                return
            self.audits += 1

    def check(self) -> None:
        if self.error is not None:
            raise AssertionError("what the tier offers is not whole") from self.error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.check()


@contextmanager
def auditing(store: Store) -> Iterator[Auditor]:
    made = Auditor(store)
    try:
        yield made
    finally:
        made.close()


class Scene:
    """A world of two ranks over two of three daemons, which begins anew when one of them fell. The first daemon, where
    the cluster agrees, never falls.
    """

    def __init__(self, nodes: Cluster, store: Store, beside: Auditor) -> None:
        self.nodes, self.store, self.beside = nodes, store, beside
        nodes.daemons[0].settings.pop("SNAPD_FAULT_POINTS", None)
        nodes.start()
        nodes.wait_settled()
        self.ranks = nodes.daemons[1:]
        self.world = FakeWorld(self.ranks, JOB)
        self.step = 0
        self.starts = 1
        self.fell: list[str] = []

    @property
    def fallen(self) -> list[ClusterDaemon]:
        return [daemon for daemon in self.ranks if not daemon.is_running]

    def capture(self) -> None:
        """A step on all ranks, durable; a daemon that falls meanwhile is started again, and the world with it."""
        self.step += 1
        before = {daemon.node: len(self.deletions(daemon)) for daemon in self.nodes.daemons}
        try:
            self.world.capture(self.step)
            wait_for(
                self._is_over, f"step {self.step} is durable, or a daemon fell", WAIT_S, self.nodes.tails
            )
        except (OSError, RuntimeError, TimeoutError, grpc.RpcError, Refused):
            if not self._has_fallen_by_now():
                raise
        self.beside.check()
        if self.fallen:
            self._see_another_go_on(before)
            self._revive()

    def _has_fallen_by_now(self) -> bool:
        """Its sockets go a moment before its process is seen to have ended."""
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self.fallen, "a daemon has fallen", FALL_S)
        return bool(self.fallen)

    def _is_over(self) -> bool:
        if self.fallen:
            return True
        job = self.ranks[0].job(JOB)
        return job is not None and job.flush.durable_step >= self.step

    def _see_another_go_on(self, before: dict[str, int]) -> None:
        """While it is down another node deletes something, or falls at the same point. `before`: deletions of each node
        when the step began: the other may be done with all of it before the fall is noticed here.
        """
        fallen = self.fallen
        others = [daemon for daemon in self.nodes.daemons if daemon not in fallen]

        def goes_on() -> bool:
            self.beside.check()
            is_deleting = any(len(self.deletions(daemon)) > before[daemon.node] for daemon in others)
            return len(self.fallen) > len(fallen) or is_deleting

        wait_for(goes_on, "another node collects in the place of what fell", WAIT_S, self.nodes.tails)

    def _revive(self) -> None:
        self.world.die()
        for daemon in self.fallen:
            assert daemon.process is not None and daemon.process.returncode == -signal.SIGKILL, daemon.tail()
            self.fell.append(daemon.node)
            daemon.asker.forget()
            daemon.start(SNAPD_FAULT_POINTS="")
        self.nodes.wait_settled()
        self.starts += 1
        self.world = FakeWorld(self.ranks, JOB, incarnation=f"start-{self.starts}")

    def settle(self) -> None:
        """What is stored is what is named: the newest snapshots, whole, and nothing else."""
        wait_for(self._only_newest, "old snapshots go", WAIT_S, self.nodes.tails)
        wait_for(self._nothing_unnamed, "nothing unnamed is left", WAIT_S, self.nodes.tails)
        found = audit(self.store, JOB)
        assert max(found).step == self.step
        for snapshot, shards in found.items():
            assert shards == [trainer.chunks(snapshot.step, 0, CHUNKS) for trainer in self.world.trainers]
        url = self.nodes.daemons[0].settings["SNAPD_TIER_SHARED"]
        self.nodes.daemons[0].command("verify", JOB, "--deep", "--from", url)

    def _only_newest(self) -> bool:
        self.beside.check()
        return len(audit(self.store, JOB)) == KEEP

    def _nothing_unnamed(self) -> bool:
        self.beside.check()
        return not unnamed(self.store, JOB)

    def deletions(self, daemon: ClusterDaemon) -> list[dict[str, Any]]:
        """What it says of its passes that deleted something."""
        return [event for event in daemon.events("gc.pass") if event["deleted"]]


@contextmanager
def collected(tier: Path, **more: str) -> Iterator[Scene]:
    settings = {**SETTINGS, "SNAPD_TIER_SHARED": str(tier), **more}
    store = directory_store(tier)
    with (
        cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as nodes,
        auditing(store) as beside,
    ):
        scene = Scene(nodes, store, beside)
        yield scene
        scene.world.die()


@pytest.mark.timeout(300)
def test_what_several_nodes_have_written_is_collected_by_one(tier: Path) -> None:
    with collected(tier) as scene:
        for _ in range(6):
            scene.capture()
        scene.settle()
        job = scene.ranks[0].job(JOB)
        assert job is not None
        assert [each.node for each in scene.nodes.daemons if scene.deletions(each)] == [job.collector]
        assert {snapshot.step for snapshot in scene.beside.seen} >= {5, 6} and scene.beside.audits > 5


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "point",
    [
        "daemon.gc.pack.before",
        pytest.param("daemon.gc.list.after", marks=pytest.mark.slow),
        pytest.param("daemon.gc.void.after", marks=pytest.mark.slow),
        pytest.param("daemon.gc.manifest.before", marks=pytest.mark.slow),
    ],
)
def test_a_collector_that_is_killed_in_the_middle_is_followed_by_another(tier: Path, point: str) -> None:
    with collected(tier, SNAPD_FAULT_POINTS=f"{point}=kill") as scene:
        until_s = time.monotonic() + WAIT_S
        while not scene.fell:
            assert time.monotonic() < until_s, f"nobody came to {point}"
            scene.capture()
            time.sleep(STEP_S)  # rounds of collecting take their time
        for _ in range(3):
            scene.capture()
        scene.settle()
        assert scene.beside.audits > 10
