"""Nodes that are lost beyond what parity bears: the shared tier has what they had, for some ranks or for all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from snapd_proto import trainer_pb2

from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys
from snapd.tier.known_chunks import read_record
from tests.cluster.harness.cluster import Cluster, cluster
from tests.support.cluster_jobs import FakeWorld
from tests.support.fake_trainer import Refused
from tests.support.flush_scene import BY_STEPS, shards_of
from tests.support.stored_snapshot import flip_bit
from tests.support.stores import directory_store
from tests.support.waiting import wait_for

WAIT_S = 40.0
KEYS = TierKeys("w")


@pytest.fixture
def tier() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="snapd-test-tier-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(tier: Path) -> Iterator[Cluster]:
    """Three nodes, 2+1; steps 2 and 4 of a world of three are in the tier, and nobody trains."""
    settings = {**BY_STEPS, "SNAPD_TIER_SHARED": str(tier), "SNAPD_CLUSTER_LOST_AFTER": "3"}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=settings) as made:
        made.start()
        made.wait_settled()
        world = FakeWorld(made.daemons, "w")
        for step in (2, 4):
            world.capture(step)
            for daemon in made.daemons:
                wait_for(
                    lambda d=daemon, s=step: d.job("w").flush.durable_step >= s, f"{step} is durable", WAIT_S
                )
        world.die()
        yield made


def brought(nodes: Cluster) -> dict[int, str]:
    """Rank -> where its shard came from, as the nodes' logs say; the last time counts."""
    events = [event for daemon in nodes.daemons for event in daemon.events("shard.brought")]
    return {event["rank"]: event["origins"] for event in events}


def test_two_nodes_of_a_group_are_lost(nodes: Cluster, tier: Path) -> None:
    for node in ("n2", "n3"):
        nodes[node].kill()
        assert nodes[node].wipe() > 0
        nodes[node].start()
    nodes.wait_settled()
    world = FakeWorld(nodes.daemons, "w", "two")
    assert world.restore() == [4, 4, 4]
    assert brought(nodes) == {1: str(tier), 2: str(tier)}
    world.close()


def test_all_nodes_are_lost(nodes: Cluster, tier: Path) -> None:
    """And come back with as much memory as training took."""
    taken = {daemon.node: str(daemon.status().arena_bytes) for daemon in nodes.daemons}
    for daemon in nodes.daemons:
        daemon.kill()
        assert daemon.wipe() > 0
    for daemon in nodes.daemons:
        daemon.start(is_waiting=False, SNAPD_ARENA_BYTES=taken[daemon.node])
    nodes.wait_settled()
    world = FakeWorld(nodes.daemons, "w", "two")
    assert all(trainer.session.has_parent for trainer in world.trainers)
    assert world.restore() == [4, 4, 4]
    assert brought(nodes) == {rank: str(tier) for rank in range(3)}
    world.capture(5)
    world.close()


def test_one_ranks_bytes_are_bad_in_the_tier_and_all_take_the_older_snapshot(
    nodes: Cluster, tier: Path
) -> None:
    store = directory_store(tier)
    record = read_record(store, KEYS, SnapshotId(1, 4), 0)
    older = {
        c.pack for s in shards_of(store, read_record(store, KEYS, SnapshotId(1, 2), 0)) for c in s.chunks
    }
    chunk = next(c for c in shards_of(store, record)[1].chunks if c.pack not in older)
    flip_bit(tier, KEYS.pack(chunk.pack), chunk.offset + 40)
    for daemon in nodes.daemons:
        daemon.kill()
        assert daemon.wipe() > 0
    nodes.start()
    nodes.wait_settled()
    world = FakeWorld(nodes.daemons, "w", "two")
    with pytest.raises(Refused, match="shard_sources") as refused:  # rank 1's node says so to its trainer
        world.trainers[1].plan()
    for rank in (0, 2):
        world.trainers[rank].plan()
    assert all(answer.try_again for answer in finish(world, bad_rank=1, what=str(refused.value)))
    second = world.each("plan", 1)
    assert {plan.step for plan in second} == {2}
    assert any(KEYS.pack(chunk.pack) in c.reason for c in second[0].candidates)
    world.die()


def finish(world: FakeWorld, *, bad_rank: int, what: str) -> list[trainer_pb2.FinishRestoreReply]:
    """All ranks report round 0, as trainers do: one could not have its shard."""

    def report(rank: int) -> trainer_pb2.FinishRestoreReply:
        bad = [trainer_pb2.BadChunk(rank=rank, chunk_index=0, what=what)] if rank == bad_rank else []
        trainer = world.trainers[rank]
        request = trainer_pb2.FinishRestoreRequest(
            session_id=trainer.session.session_id, succeeded=not bad, bad_chunks=bad
        )
        return trainer.call("FinishRestore", request)

    with ThreadPoolExecutor(len(world.trainers)) as pool:
        return list(pool.map(report, range(len(world.trainers))))
