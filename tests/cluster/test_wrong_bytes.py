"""Bytes that are wrong in memory or on their way: found by their hash, named in the log, never handed out."""

from __future__ import annotations

import time

import pytest

from tests.cluster.harness import faults
from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.levels import assert_never_held, catches_up, wait_protected_beyond
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer
from tests.support.waiting import wait_for

CLUSTER = "four"
FOUND_S = 30.0
pytestmark = pytest.mark.timeout(180)


def named(made: Cluster, event: str, job: str, text: str = "") -> list[str]:
    """What the daemons logged of a job under this name."""
    found = [e for daemon in made.running for e in daemon.events(event) if e.get("job") == job]
    return [str(e) for e in found if text in str(e)]


@pytest.mark.skipif(not faults.can_cut(), reason="needs tc")
def test_peer_that_sends_wrong_bytes_while_it_is_protected(
    made: Cluster, observer: Observer, world: LightWorld
) -> None:
    """Its memory goes bad after its chunks were hashed and before the others have pulled them."""
    world.pause()
    liar = made.daemons[1]
    number = world.last
    wait_protected_beyond(made, observer, world.job, number - 1)
    began = time.monotonic()
    with faults.rate_limit(liar.host, 1_000_000):
        world.capture(number + 1)
        world.ranks[1].send("wait_captured", step=number + 1)
        world.ranks[1].answer()
        faults.corrupt(liar, world.job)
        wait_for(
            lambda: named(made, "peer.wrong_bytes", world.job, liar.node),
            "named in a log",
            FOUND_S,
            made.tails,
        )
    with world:
        catches_up(made, observer, world)
    assert_never_held(world, began, seconds=1.0)


def test_own_memory_that_went_bad_is_mended_from_the_others(
    made: Cluster, observer: Observer, world: LightWorld, job: str
) -> None:
    world.pause()
    number = world.last
    wait_protected_beyond(made, observer, job, number - 1)
    protected = observer.protected(job)[1]
    world.kill()
    bad = made.daemons[2]
    faults.corrupt(bad, job)
    again = LightWorld(made.daemons, job)
    try:
        again.open()
        assert again.restore() >= protected  # bytes are compared
        assert named(made, "shard.bad", job), made.tails()
        with again:
            catches_up(made, observer, again)
    finally:
        again.kill()


def test_node_is_lost_and_a_survivors_memory_is_bad(
    made: Cluster, observer: Observer, world: LightWorld, job: str
) -> None:
    """2 + 2: what n1 lost is decoded although one of the sources sends wrong bytes; the log names it."""
    world.pause()
    number = world.last
    wait_protected_beyond(made, observer, job, number - 1)
    protected = observer.protected(job)[1]
    world.kill()
    lost, bad = made.daemons[0], made.daemons[1]
    lost.kill()
    lost.wipe()
    faults.corrupt(bad, job)
    lost.start()
    again = LightWorld(made.daemons, job)
    try:
        again.open()
        assert again.restore() >= protected
        assert named(made, "peer.wrong_bytes", job) or named(made, "shard.bad", job), made.tails()
    finally:
        again.kill()


def test_parity_that_went_bad_is_not_believed(
    made: Cluster, observer: Observer, world: LightWorld, job: str
) -> None:
    """The rows of the group's last node have their parity on its first two: as bytes of the second's are wrong, the
    first's and data are taken.
    """
    world.pause()
    number = world.last
    wait_protected_beyond(made, observer, job, number - 1)
    protected = observer.protected(job)[1]
    world.kill()
    nodes = made.daemons[0].status().cluster.groups[0].nodes  # in the order in which they joined
    lost, bad = made[nodes[3]], made[nodes[1]]
    faults.corrupt(bad, job, files="parity.seg-*")
    lost.kill()
    lost.wipe()
    lost.start()
    again = LightWorld(made.daemons, job)
    try:
        again.open()
        assert again.restore() >= protected
        assert named(made, "peer.wrong_bytes", job, f"{bad.node} sent wrong bytes for parity"), made.tails()
        with again:
            catches_up(made, observer, again)
    finally:
        again.kill()
