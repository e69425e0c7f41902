"""Faults of the network between daemons: training is never held, levels pause and catch up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.harness import etcd, faults
from tests.cluster.harness.cluster import Cluster, cluster
from tests.cluster.harness.hosts import can_have_namespaces
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer, runtimes_of
from tests.cluster.harness.waiting import wait_for

HELD_S_MAX = 1.0
LEVEL_S = 40.0
CUT_S = 8.0  # longer than `lost_after`: the other side is given up, and taken in again
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        not (can_have_namespaces() and faults.can_cut()), reason="needs root, ip, iptables and tc"
    ),
    pytest.mark.skipif(not etcd.is_installed(), reason="needs etcd"),
]


@pytest.fixture(scope="module")
def four() -> Iterator[Cluster]:
    with cluster(4, "2+2") as made:
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture
def job(request: pytest.FixtureRequest) -> str:
    return request.node.name.removeprefix("test_")[:60]


@pytest.fixture
def observer(four: Cluster) -> Iterator[Observer]:
    with Observer(runtimes_of(four)) as made:
        yield made
    four.wait_settled()


@pytest.fixture
def world(four: Cluster, job: str, observer: Observer) -> Iterator[LightWorld]:
    made = LightWorld(four.daemons, job)
    try:
        made.open()
        assert made.restore() == -1
        with made:
            wait_protected_beyond(four, observer, job, 0)
            yield made
    finally:
        made.kill()


def wait_protected_beyond(four: Cluster, observer: Observer, job: str, step: int) -> int:
    """Wait until a step beyond this one is called protected; returns the newest."""
    what = f"a step of {job} beyond {step} is protected"
    wait_for(lambda: observer.protected(job)[1] > step, what, LEVEL_S, four.tails)
    return observer.protected(job)[1]


def assert_never_held(world: LightWorld, since: float, *, seconds: float) -> None:
    """It stepped on all the while, and no step took long."""
    steps = world.held_since(since)
    assert len(steps) >= seconds / world.step_s / 4, f"only {len(steps)} steps in {seconds:.0f} s"
    assert max(step.held_s for step in steps) < HELD_S_MAX, sorted(step.held_s for step in steps)[-5:]


def catches_up(four: Cluster, observer: Observer, world: LightWorld) -> None:
    """What is captured from now on becomes protected."""
    wait_protected_beyond(four, observer, world.job, world.steps[-1].number)


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
        first = world.steps[-1].number
        reached = wait_protected_beyond(four, observer, world.job, first)
        wait_protected_beyond(four, observer, world.job, reached)
    assert_never_held(world, began, seconds=2.0)
    catches_up(four, observer, world)


def test_slow_network(four: Cluster, observer: Observer, world: LightWorld) -> None:
    """Protection lags behind, skips what was overtaken, and never falls silent."""
    began = time.monotonic()
    with faults.rate_limit(four.hosts.nodes[0], 8_000_000):
        first = world.steps[-1].number
        reached = wait_protected_beyond(four, observer, world.job, first)
        wait_protected_beyond(four, observer, world.job, reached)
    assert_never_held(world, began, seconds=2.0)
    catches_up(four, observer, world)


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
                    wait_protected_beyond(four, observer, job, world.steps[-1].number)
                assert_never_held(world, began, seconds=time.monotonic() - began)
            four.wait_settled()
            catches_up(four, observer, world)
    finally:
        world.kill()
