"""`[cluster]`: what follows from settings, and one clear line for each that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snapd.config import load
from snapd.config_cluster import ClusterConfig, ClusterPlan, plan_cluster
from snapd.core.addresses import is_loopback, join, split
from snapd.core.cluster import Code, Seed
from snapd.errors import ConfigError

GOOD = ClusterConfig(coordinator="leader", node="n1", listen="127.0.0.1:7000")


def plan(**changed: object) -> ClusterPlan:
    found = plan_cluster(replace(GOOD, **changed), "machine")  # type: ignore[arg-type]
    assert found is not None
    return found


def test_without_a_coordinator_nothing_is_started_whatever_else_is_set() -> None:
    assert plan_cluster(replace(GOOD, coordinator="", code="nonsense"), "machine") is None


BAD = [
    ("listen", {"listen": "7000"}, "address", "cluster.listen = '7000': must be HOST:PORT"),
    ("listen port", {"listen": "h:http"}, "address", "cluster.listen = 'h:http': must be HOST:PORT"),
    ("port 0", {"listen": "127.0.0.1:0"}, "address", "cluster.listen = '127.0.0.1:0': must be HOST:PORT"),
    ("port too large", {"listen": "h:70000"}, "address", "cluster.listen = 'h:70000': must be HOST:PORT"),
    ("bulk is control", {"bulk_port": 7000}, "address", "cluster.bulk_port = 7000: must be another port"),
    ("bulk beyond", {"listen": "h:65535"}, "address", "cluster.bulk_port = 65536: must be another port"),
    ("node", {"node": "../x"}, "node_name", "bad node name '../x'"),
    ("long node", {"node": "n" * 129}, "node_name", f"bad node name '{'n' * 64}'"),
    ("name", {"name": "a/b"}, None, "bad"),
    ("code", {"code": "6x2"}, "code", "bad code '6x2'"),
    ("no parity", {"code": "6+0"}, "code", "bad code '6+0'"),
    ("no data", {"code": "0+2"}, "code", "bad code '0+2'"),
    ("too much data", {"code": "25+2"}, "code", "bad code '25+2'"),
    ("too much parity", {"code": "6+9"}, "code", "bad code '6+9'"),
    ("etcd", {"coordinator": "etcd://"}, "address", "cluster.coordinator names no etcd endpoint"),
    ("etcd port", {"coordinator": "etcd://h"}, "address", "cluster.coordinator = 'h': must be HOST:PORT"),
    (
        "second endpoint",
        {"coordinator": "etcd://h:1,k"},
        "address",
        "cluster.coordinator = 'k': must be HOST:PORT",
    ),
    (
        "leader",
        {"coordinator": "somewhere"},
        "address",
        "cluster.coordinator = 'somewhere': must be HOST:PORT",
    ),
    ("no leader", {"coordinator": " , "}, "address", "cluster.coordinator names nobody"),
    (
        "name without port",
        {"coordinator": "dns:x"},
        "address",
        "cluster.coordinator = 'x': must be HOST:PORT",
    ),
    (
        "a digit that is no number",
        {"listen": "h:\u00b2"},
        "address",
        "cluster.listen = 'h:\u00b2': must be HOST:PORT",
    ),
    ("leader's node", {"coordinator": "a b@h:1"}, "node_name", "bad node name 'a b'"),
    ("cert alone", {"cert": "c"}, "tls", "cluster.key and cluster.ca missing"),
    ("cert, key", {"cert": "c", "key": "k"}, "tls", "cluster.ca missing"),
    ("ca alone", {"ca": "a"}, "tls", "cluster.cert and cluster.key missing"),
    (
        "plaintext beyond loopback",
        {"listen": "10.0.0.1:7000"},
        "plaintext",
        "node n1 would speak without certificates on 10.0.0.1:7000",
    ),
    (
        "plaintext on all addresses",
        {"listen": "0.0.0.0:7000"},
        "plaintext",
        "node n1 would speak without certificates on machine:7000",
    ),
    (
        "plaintext behind a name",
        {"advertise": "node-1.example"},
        "plaintext",
        "node n1 would speak without certificates on node-1.example:7000",
    ),
]


@pytest.mark.parametrize(
    ("changed", "kind", "text"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_what_cannot_be_is_one_clear_line(changed: dict[str, object], kind: str | None, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changed)
    assert caught.value.message.startswith(text)
    assert "\n" not in str(caught.value)
    assert len(caught.value.message) < 200
    if kind is not None:
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ('bulk = "carrier pigeon"', "cluster.bulk"),
        ('plaintext = "perhaps"', "cluster.plaintext"),
        ("lease = 0.1", "cluster.lease"),
        ('lost_after = "soon"', "cluster.lost_after"),
        ("rate = -1", "cluster.rate"),
        ("bulk_port = 70000", "cluster.bulk_port"),
        ('peers = "a"', "cluster.peers"),
    ],
)
def test_a_setting_of_the_wrong_form_is_named_with_where_it_comes_from(
    tmp_path: Path, lines: str, text: str
) -> None:
    file = tmp_path / "snapd.toml"
    file.write_text(f"[cluster]\n{lines}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=text) as caught:
        load(file=file, environ={})
    assert str(file) in str(caught.value)


# what follows from what is given


def test_defaults_follow_from_the_host() -> None:
    found = plan_cluster(ClusterConfig(coordinator="leader", plaintext="yes"), "machine")
    assert found is not None
    assert (found.node, found.host, found.domain, found.advertise) == ("machine",) * 4
    assert (found.address, found.bulk_address) == ("machine:7421", "machine:7422")
    assert found.code == Code(6, 2)
    assert found.is_leader


def test_a_domain_is_the_host_where_none_is_named() -> None:
    assert plan(host="h1").domain == "h1"
    assert plan(host="h1", domain="rack-7").domain == "rack-7"


def test_what_is_listened_on_and_what_is_told_to_others_may_differ() -> None:
    found = plan(listen="0.0.0.0:7000", advertise="127.0.0.9", bulk_port=9000)
    assert (found.listen_host, found.port) == ("0.0.0.0", 7000)
    assert (found.address, found.bulk_address) == ("127.0.0.9:7000", "127.0.0.9:9000")


def test_certificates_turn_tls_on_and_their_absence_turns_it_off_for_bulk_too() -> None:
    files = {"cert": "c", "key": "k", "ca": "a", "listen": "10.0.0.1:7000"}
    assert (plan(**files).is_plaintext, plan(**files).bulk) == (False, "tls")
    assert (plan(**files, bulk="plain").is_plaintext, plan(**files, bulk="plain").bulk) == (False, "plain")
    assert (plan().is_plaintext, plan().bulk) == (True, "plain")
    assert plan(bulk="grpc").bulk == "grpc"


def test_plaintext_has_to_be_asked_for() -> None:
    assert plan(listen="10.0.0.1:7000", plaintext="yes").is_plaintext


@pytest.mark.parametrize(
    ("coordinator", "endpoints", "seeds"),
    [
        ("leader", (), ()),
        ("etcd://a:1", ("a:1",), ()),
        ("etcds://a:1,b:2,", ("a:1", "b:2"), ()),
        ("h:7421", (), (Seed("h", "h:7421"),)),
        ("n0@h:7421", (), (Seed("n0", "h:7421"),)),
        ("n0@h:1, k:2,", (), (Seed("n0", "h:1"), Seed("k", "k:2"))),
        ("dns:snapd.ns:7421", (), (Seed("snapd.ns", "snapd.ns:7421", True),)),
    ],
)
def test_coordinators(coordinator: str, endpoints: tuple[str, ...], seeds: tuple[Seed, ...]) -> None:
    found = plan(coordinator=coordinator)
    assert found.etcd_endpoints == endpoints
    assert found.seeds == seeds
    assert found.is_leader == (coordinator == "leader")


@pytest.mark.parametrize(("host", "port"), [("h", 1), ("10.0.0.1", 65535), ("::1", 7421), ("fe80::1", 7)])
def test_addresses_are_read_as_they_are_written(host: str, port: int) -> None:
    assert split(join(host, port), "x") == (host, port)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False),
     ("0.0.0.0", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
