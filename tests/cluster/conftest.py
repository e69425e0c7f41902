"""A cluster per file, of light trainers; which file needs what."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness import etcd
from tests.cluster.harness.cluster import Cluster, cluster
from tests.cluster.harness.hosts import can_have_namespaces
from tests.cluster.harness.levels import wait_protected_beyond
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer, runtimes_of


@pytest.fixture(scope="module")
def is_real() -> None:
    """For tests of the network and of etcd themselves."""
    if not can_have_namespaces():
        pytest.skip("needs network namespaces: root and iproute2")
    if not etcd.is_installed():
        pytest.skip("needs etcd")


@pytest.fixture(scope="module")
def four(is_real: None) -> Iterator[Cluster]:
    """Four nodes, 2 + 2, TLS, etcd."""
    with cluster(4, "2+2") as made:
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture(scope="module")
def three(is_real: None) -> Iterator[Cluster]:
    """Three nodes, 2 + 1, TLS, etcd."""
    with cluster(3, "2+1") as made:
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture
def job(request: pytest.FixtureRequest) -> str:
    return str(request.node.name.removeprefix("test_")[:60])


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Cluster:
    """The file's cluster: `CLUSTER` names its fixture."""
    found = request.getfixturevalue(request.module.CLUSTER)
    assert isinstance(found, Cluster)
    return found


@pytest.fixture
def observer(made: Cluster) -> Iterator[Observer]:
    with Observer(runtimes_of(made)) as watching:
        yield watching
    keep_logs(made)
    made.wait_settled()


@pytest.fixture
def world(made: Cluster, job: str, observer: Observer) -> Iterator[LightWorld]:
    """A rank beside every daemon, stepping, something of it protected."""
    opened = LightWorld(made.daemons, job)
    try:
        opened.open()
        assert opened.restore() == -1
        with opened:
            wait_protected_beyond(made, observer, job, 0)
            yield opened
    finally:
        opened.kill()


def keep_logs(made: Cluster) -> None:
    """For looking at what a test did: copy the daemons' logs to $SNAPD_TEST_LOGS."""
    target = os.environ.get("SNAPD_TEST_LOGS")
    if target:
        for daemon in made.daemons:
            shutil.copy(daemon.log, Path(target) / daemon.log.name)
