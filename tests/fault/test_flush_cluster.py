"""Several nodes flush one snapshot: the collector names it, each node writes its own ranks' shards, whoever is last
commits.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from tests.cluster.harness.cluster import cluster
from tests.cluster.harness.daemon import ClusterDaemon
from tests.support.cluster_jobs import CHUNKS, FakeWorld
from tests.support.flush_scene import BY_STEPS, ON_DEMAND, intents, read_tier, unfinished
from tests.support.stores import directory_store
from tests.support.waiting import wait_for

WAIT_S = 40.0


@pytest.fixture
def tier() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="snapd-test-tier-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def wait_durable(nodes: Sequence[ClusterDaemon], job: str, step: int, *, generation: int = 1) -> None:
    def is_so() -> bool:
        flushes = [daemon.job(job).flush for daemon in nodes]
        return all(
            f.has_durable and (f.durable_generation, f.durable_step) >= (generation, step) for f in flushes
        )

    wait_for(is_so, f"step {step} is durable", WAIT_S, *(daemon.tail for daemon in nodes))


def expected(world: FakeWorld, step: int) -> list[list[bytes]]:
    return [trainer.chunks(step, 0, CHUNKS) for trainer in world.trainers]


def test_all_nodes_flush_the_same_snapshot_and_one_of_them_commits(tier: Path) -> None:
    settings = {**BY_STEPS, "SNAPD_TIER_SHARED": str(tier)}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "both")
        for step in range(1, 7):
            world.capture(step)
        wait_durable(nodes.daemons, "both", 6)
        store = directory_store(tier)
        found = read_tier(store, "both")
        assert found[SnapshotId(1, 6)] == expected(world, 6)
        done = [daemon.events("snapshot.durable") for daemon in nodes.daemons]
        for snapshot in found:
            ours = [e for events in done for e in events if e["step"] == snapshot.step and e["is_ours"]]
            assert len(ours) == 1, "each snapshot is committed by one node"
        wait_for(lambda: intents(store, "both") == [], "all intents are removed", WAIT_S)
        assert unfinished(store) == []
        world.die()


def test_a_node_that_is_killed_in_its_flush_comes_back_and_the_world_goes_on(tier: Path) -> None:
    settings = {**BY_STEPS, "SNAPD_TIER_SHARED": str(tier)}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "killed")
        world.capture(1)
        world.capture(2)
        wait_durable(nodes.daemons, "killed", 2)
        victim = nodes["n3"]
        victim.kill()
        victim.start(SNAPD_FAULT_POINTS="daemon.flush.manifest.before=kill")
        world.trainers[2].reconnect()
        nodes.wait_settled()
        world.capture(4)
        wait_for(lambda: not victim.is_running, "n3 is killed", WAIT_S, victim.tail)
        store = directory_store(tier)
        assert set(read_tier(store, "killed")) == {SnapshotId(1, 2)}
        victim.start()
        world.trainers[2].reconnect()
        wait_durable(nodes.daemons, "killed", 4)
        assert read_tier(store, "killed")[SnapshotId(1, 4)] == expected(world, 4)
        world.die()


def test_a_node_without_its_store_holds_up_nobody_and_catches_up(tier: Path) -> None:
    settings = {**BY_STEPS, "SNAPD_TIER_SHARED": str(tier)}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "apart")
        world.capture(1)
        world.capture(2)
        wait_durable(nodes.daemons, "apart", 2)
        mounted = tier.with_name(tier.name + "-elsewhere")
        nodes["n3"].kill()
        nodes["n3"].start(SNAPD_TIER_SHARED=str(mounted))
        world.trainers[2].reconnect()
        nodes.wait_settled()
        for step in range(3, 9):
            world.capture(step)  # training goes on
        wait_for(
            lambda: nodes["n3"].job("apart").flush.pause == "bucket", "n3 pauses", WAIT_S, nodes["n3"].tail
        )
        assert set(read_tier(directory_store(tier), "apart")) == {SnapshotId(1, 2)}
        assert "does not become durable" in nodes["n3"].command("drain", "--job", "apart", code=4)
        nodes["n3"].kill()
        nodes["n3"].start()
        world.trainers[2].reconnect()
        world.capture(9)
        world.capture(10)
        wait_durable(nodes.daemons, "apart", 8)
        assert max(read_tier(directory_store(tier), "apart")) >= SnapshotId(1, 8)
        world.die()


def test_a_node_that_is_told_to_stop_makes_the_world_s_newest_snapshot_durable(tier: Path) -> None:
    settings = {**ON_DEMAND, "SNAPD_TIER_SHARED": str(tier)}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "notice")
        for step in range(1, 4):
            world.capture(step)
        wait_for(lambda: nodes["n3"].job("notice").has_complete, "complete", WAIT_S)
        store = directory_store(tier)
        assert read_tier(store, "notice") == {}
        assert nodes["n3"].stop(40.0) == 0
        assert read_tier(store, "notice")[SnapshotId(1, 3)] == expected(world, 3)
        assert nodes["n3"].events("levels.finished")[-1]["not_durable_jobs"] == []
        world.die()
