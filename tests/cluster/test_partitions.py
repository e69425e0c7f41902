"""Faults of the network between daemons: training is never held, levels pause and catch up."""

from __future__ import annotations

import time

import pytest

from tests.cluster.harness import faults
from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.levels import LEVEL_S, assert_never_held, catches_up, wait_protected_beyond
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer
from tests.support.waiting import wait_for

CLUSTER = "four"
CUT_S = 8.0  # longer than `lost_after`: the other side is given up, and taken in again
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not faults.can_cut(), reason="needs iptables and tc"),
]


def test_halves_that_do_not_hear_each_other(four: Cluster, observer: Observer, world: LightWorld) -> None:
    hosts = four.hosts.nodes
    began = time.monotonic()
    with faults.partition(hosts[:2], hosts[2:]):
        time.sleep(1.0)  # what was under way has come to its end
        before = observer.protected(world.job)
        time.sleep(CUT_S)
        assert observer.protected(world.job) == before, "protected across a cut"
    assert_never_held(world, began, seconds=CUT_S)
    catches_up(four, observer, world)


def test_half_that_hears_neither_the_others_nor_etcd(
    four: Cluster, observer: Observer, world: LightWorld
) -> None:
    hosts = four.hosts.nodes
    began = time.monotonic()
    with faults.partition([*hosts[:2], four.hosts.store], hosts[2:]):
        faults.wait_unheard(four.daemons[:2], four.daemons[3].node)
        before = observer.protected(world.job)
        time.sleep(CUT_S)
        assert observer.protected(world.job) == before, "protected across a cut"
    assert_never_held(world, began, seconds=CUT_S)
    four.wait_settled()
    catches_up(four, observer, world)


def test_one_way_loss(four: Cluster, observer: Observer, world: LightWorld) -> None:
    hosts = four.hosts.nodes
    began = time.monotonic()
    with faults.one_way_loss(hosts[2], [*hosts[:2], hosts[3]]):
        time.sleep(CUT_S)
    assert_never_held(world, began, seconds=CUT_S)
    catches_up(four, observer, world)


@pytest.mark.skipif(not faults.can_delay(), reason="needs NetfilterQueue")
def test_delay_of_200_ms(four: Cluster, observer: Observer, world: LightWorld) -> None:
    host = four.hosts.nodes[1]
    began = time.monotonic()
    with faults.delay(host, 0.2, four.folder / "delay.log"):
        time.sleep(2.0)
        first = world.last
        reached = wait_protected_beyond(four, observer, world.job, first)
        wait_protected_beyond(four, observer, world.job, reached)
    assert_never_held(world, began, seconds=2.0)
    catches_up(four, observer, world)


def test_slow_network(four: Cluster, observer: Observer, world: LightWorld) -> None:
    """Protection lags behind, skips what was overtaken, and never falls silent."""
    began = time.monotonic()
    with faults.rate_limit(four.hosts.nodes[0], 8_000_000):
        first = world.last
        reached = wait_protected_beyond(four, observer, world.job, first)
        wait_protected_beyond(four, observer, world.job, reached)
    assert_never_held(world, began, seconds=2.0)
    catches_up(four, observer, world)


@pytest.mark.slow
def test_peer_that_stalls_for_ever_in_mid_transfer(four: Cluster, observer: Observer, job: str) -> None:
    """The frozen node holds no rank: it is a source of nothing and a home of parity, and is replaced by smaller
    groups once it is lost."""
    frozen = four.daemons[3]
    world = LightWorld(four.daemons[:3], job)
    try:
        world.open()
        world.restore()
        with world:
            wait_protected_beyond(four, observer, job, 0)
            with faults.rate_limit(four.hosts.nodes[0], 4_000_000):  # transfers take long: one is under way
                time.sleep(1.0)
                began = time.monotonic()
                with faults.stalled(frozen):
                    assert faults.connections_between(four.hosts.nodes[0], frozen.host), "nobody talks to it"
                    wait_for(
                        lambda: four.daemons[0].status().cluster.degraded,
                        "smaller groups",
                        LEVEL_S,
                        four.says,
                    )
                    wait_protected_beyond(four, observer, job, world.last)
                assert_never_held(world, began, seconds=time.monotonic() - began)
            four.wait_settled()
            catches_up(four, observer, world)
    finally:
        world.kill()
