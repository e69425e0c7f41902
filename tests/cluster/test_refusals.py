"""What a cluster's daemon refuses: one clear line and exit code 2; strangers are kept out and disturb nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.harness.certificates import Authority
from tests.cluster.harness.cluster import Cluster, cluster
from tests.cluster.harness.daemon import ClusterDaemon
from tests.cluster.harness.levels import catches_up
from tests.cluster.harness.light import LightWorld
from tests.cluster.harness.observer import Observer
from tests.support.waiting import wait_for

CLUSTER = "led"
USAGE = 2
REFUSED_S = 30.0
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def led(is_real: None) -> Iterator[Cluster]:
    """Three daemons with a leader among them; the fourth host is for guests."""
    with cluster(4, "2+1", is_etcd=False) as made:
        made.daemons[0].settings["SNAPD_CLUSTER_ALLOW_SAME_HOST"] = "no"
        guest = made.daemons.pop()
        made.guests = [guest]
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture
def guest(made: Cluster) -> Iterator[ClusterDaemon]:
    daemon = made.guests[0]
    daemon.log.unlink(missing_ok=True)
    yield daemon
    daemon.host.kill_everything()


def refusal(guest: ClusterDaemon, **settings: str) -> str:
    """The one line that it ended with."""
    guest.start(is_waiting=False, **settings)
    code = guest.wait_ended(30.0)
    lines = [line for line in guest.log.read_text().splitlines() if not line.startswith("{")]
    assert (code, len(lines)) == (USAGE, 1), (code, lines, guest.tail())
    assert lines[0].startswith("snapd: "), lines
    return lines[0]


@pytest.mark.parametrize("code", ["6-2", "0+2", "4+0", "many", "300+2"])
def test_wrong_code(guest: ClusterDaemon, code: str) -> None:
    assert code in refusal(guest, SNAPD_CLUSTER_CODE=code)


def test_node_name_that_is_taken(guest: ClusterDaemon, made: Cluster) -> None:
    trust = made.trust_of("n2")
    line = refusal(guest, SNAPD_CLUSTER_NODE="n2", **trust)
    assert "n2" in line


def test_second_daemon_of_a_host(guest: ClusterDaemon) -> None:
    line = refusal(guest, SNAPD_CLUSTER_HOST="n2")
    assert "host" in line and "n2" in line


def test_plaintext_beyond_loopback(guest: ClusterDaemon) -> None:
    none = {f"SNAPD_CLUSTER_{name}": "" for name in ("CERT", "KEY", "CA")}
    assert "certificate" in refusal(guest, SNAPD_CLUSTER_PLAINTEXT="no", **none)


def test_certificate_without_its_key(guest: ClusterDaemon) -> None:
    assert "cluster.key" in refusal(guest, SNAPD_CLUSTER_KEY="")


def test_certificate_of_another_node(guest: ClusterDaemon, made: Cluster) -> None:
    assert guest.node in refusal(guest, **made.trust_of("n2"))


def test_expired_certificate(guest: ClusterDaemon, made: Cluster) -> None:
    assert made.authority is not None
    expired = made.authority.issue(guest.node, is_expired=True, file="expired")
    assert "expired" in refusal(guest, **expired)


def test_address_that_is_taken(guest: ClusterDaemon) -> None:
    assert "listen" in refusal(guest, SNAPD_CLUSTER_LISTEN="10.255.255.1:7421")


def test_stranger_with_the_certificate_of_another_authority(
    guest: ClusterDaemon, made: Cluster, observer: Observer, world: LightWorld
) -> None:
    """It comes up, for its trainers' sake, and is nobody's peer; it says why, and the others are not flooded."""
    epoch = made.daemons[0].status().cluster.epoch
    stranger = Authority(made.folder / "strangers", "stranger").issue(guest.node, also=[guest.host.address])
    guest.start(**stranger)

    def is_refused() -> bool:
        return any("CERTIFICATE_VERIFY_FAILED" in e["reason"] for e in guest.events("coordination.away"))

    wait_for(is_refused, "it tried, and was refused", REFUSED_S, guest.tail)
    for _ in range(3):
        catches_up(made, observer, world)
    assert made.daemons[0].status().cluster.epoch == epoch, made.says()
    said = [e for e in made.daemons[0].events() if guest.host.address in str(e) and e["level"] != "info"]
    assert len(said) <= 2, said
    assert guest.is_running and guest.node not in {row.node for row in made.daemons[0].status().cluster.nodes}
