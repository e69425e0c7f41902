"""etcd killed, restarted, wiped, rolled back: training goes on, levels come back, no generation is used twice."""

from __future__ import annotations

import time

import pytest

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.etcd import EtcdServer
from tests.cluster.harness.levels import assert_never_held, catches_up
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer
from tests.support.waiting import wait_for

CLUSTER = "three"
AWAY_S = 8.0  # longer than leases and `lost_after`
NOTICED_S = 30.0
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def store(made: Cluster) -> EtcdServer:
    assert made.etcd is not None
    return made.etcd


def token(made: Cluster) -> tuple[str, int]:
    """(cluster id, epoch) that all daemons have."""
    found = {(s.cluster_id, s.epoch) for s in (daemon.status().cluster for daemon in made.running)}
    assert len(found) == 1, made.says()
    return found.pop()


def restart(made: Cluster, world: LightWorld) -> LightWorld:
    """The job's next start, ready to step."""
    world.kill()
    again = LightWorld(made.daemons, world.job)
    again.open()
    return again


def test_killed_and_restarted(
    made: Cluster, observer: Observer, world: LightWorld, store: EtcdServer
) -> None:
    before = token(made)
    began = time.monotonic()
    store.kill()
    wait_for(
        lambda: all(d.status().cluster.is_away for d in made.running), "etcd is missed", NOTICED_S, made.says
    )
    time.sleep(AWAY_S)
    assert_never_held(world, began, seconds=AWAY_S)
    store.start()
    made.wait_settled()
    catches_up(made, observer, world)
    assert_never_held(world, began, seconds=AWAY_S)
    assert token(made)[0] == before[0]
    assert token(made)[1] >= before[1]


def test_wiped(made: Cluster, observer: Observer, world: LightWorld, store: EtcdServer) -> None:
    before = token(made)
    began = time.monotonic()
    store.kill()
    store.wipe()
    store.start()
    wait_for(lambda: all(d.status().cluster.cluster_id != before[0] for d in made.running), "a new cluster id",
             NOTICED_S, made.says)  # fmt: skip
    made.wait_settled()
    catches_up(made, observer, world)
    assert_never_held(world, began, seconds=2.0)
    assert token(made)[1] > before[1], "an epoch below one that was used"
    protected = observer.protected(world.job)
    again = restart(made, world)
    try:
        assert again.generation > world.generation
        assert again.restore() >= protected[1]
        with again:
            catches_up(made, observer, again)
    finally:
        again.kill()


def test_rolled_back(made: Cluster, observer: Observer, world: LightWorld, store: EtcdServer) -> None:
    """The copy knows the job's first generation; two more were given out since, and epochs."""
    store.kill()
    store.save("old")
    store.start()
    made.wait_settled()
    catches_up(made, observer, world)
    generations = [world.generation]
    for _ in range(2):
        world = restart(made, world)
        generations.append(world.generation)
        assert world.restore() > 0
    assert sorted(set(generations)) == generations, generations
    try:
        with world:
            catches_up(made, observer, world)
            before = token(made)
            began = time.monotonic()
            store.kill()
            store.put_back("old")
            store.start()
            made.wait_settled()
            catches_up(made, observer, world)
            assert_never_held(world, began, seconds=2.0)
        assert token(made)[1] > before[1] or token(made)[0] != before[0], "an epoch was used twice"
        protected = observer.protected(world.job)
        world = restart(made, world)
        assert world.generation > max(generations), (world.generation, generations)
        assert world.restore() >= protected[1]
    finally:
        world.kill()
