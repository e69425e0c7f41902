"""The Peer service of a real daemon over gRPC on loopback: whatever a peer sends is answered with one clear error, and
the daemon goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from snapd_proto import peer_pb2, peer_pb2_grpc, trainer_pb2

from snapd.rpc.peer_calls import MESSAGE_BYTES_MAX
from snapd.rpc.status import ERROR_KEY
from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.cluster import cluster as make_cluster
from tests.support.waiting import wait_for

Call = Callable[[peer_pb2_grpc.PeerStub, peer_pb2.Sender], Any]
TIMEOUT_S = 10.0


@pytest.fixture(scope="module", params=["plain", "tls"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    is_tls = request.param == "tls"
    with make_cluster(2, "1+1", is_tls=is_tls, is_etcd=False, is_namespaced=False) as made:
        made.daemons[0].start()
        wait_for(lambda: made.daemons[0].status().cluster.cluster_id != "", "the cluster has an id", 20.0)
        yield made


def channel(cluster: Cluster, *, as_node: str = "") -> grpc.Channel:
    """To the first node; under TLS with the second one's certificate."""
    first, second = cluster.daemons
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    if cluster.authority is None:
        return grpc.insecure_channel(first.address, options=options)
    files = cluster.authority.issue(as_node or second.node, also=["127.0.0.1"])
    ca, key, cert = (Path(files[f"SNAPD_CLUSTER_{name}"]).read_bytes() for name in ("CA", "KEY", "CERT"))
    options.append(("grpc.ssl_target_name_override", first.node))
    return grpc.secure_channel(first.address, grpc.ssl_channel_credentials(ca, key, cert), options=options)


def sender(cluster: Cluster, **changed: object) -> peer_pb2.Sender:
    known = cluster.daemons[0].status().cluster
    facts: dict[str, object] = {
        "node": cluster.daemons[1].node,
        "cluster_id": known.cluster_id,
        "epoch": known.epoch,
        "arena_id": "a" * 16,
        "protocol_version": 1,
    }
    return peer_pb2.Sender(**{**facts, **changed})  # type: ignore[arg-type]


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, str]:
    """(status, kind, message) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    kinds = [value for key, value in error.trailing_metadata() or () if key == ERROR_KEY]
    kind = trainer_pb2.Refusal.FromString(kinds[0]).kind if kinds else ""
    return error.code(), kind, error.details()


def goes_on(cluster: Cluster) -> None:
    """The daemon is the same, and serves peers and commands."""
    daemon = cluster.daemons[0]
    assert daemon.is_running
    assert daemon.status().pid == daemon.pid
    with channel(cluster) as open_channel:
        stub = peer_pb2_grpc.PeerStub(open_channel)
        reply = stub.Greet(peer_pb2.GreetRequest(sender=sender(cluster)), timeout=TIMEOUT_S)
    assert reply.answerer.node == daemon.node


def report(sender: peer_pb2.Sender, **facts: object) -> peer_pb2.ReportRequest:
    return peer_pb2.ReportRequest(sender=sender, **{"job": "j", **facts})  # type: ignore[arg-type]


SENDERS = [
    ("another cluster", {"cluster_id": "f" * 16}, grpc.StatusCode.ABORTED, "cluster_id", "another cluster"),
    ("version 99", {"protocol_version": 99}, grpc.StatusCode.INVALID_ARGUMENT, "peer_version", "protocol 99"),
    ("no version", {"protocol_version": 0}, grpc.StatusCode.INVALID_ARGUMENT, "peer_version", "protocol 0"),
    ("bad name", {"node": "../etc"}, grpc.StatusCode.INVALID_ARGUMENT, "node_name", "bad node name"),
    ("no name", {"node": ""}, grpc.StatusCode.INVALID_ARGUMENT, "node_name", "bad node name"),
]


@pytest.mark.parametrize(
    ("changed", "code", "kind", "text"), [s[1:] for s in SENDERS], ids=[s[0] for s in SENDERS]
)
def test_a_sender_that_is_not_of_us_is_refused_by_every_call(
    cluster: Cluster, changed: dict[str, object], code: grpc.StatusCode, kind: str, text: str
) -> None:
    calls: list[Call] = [
        lambda stub, who: stub.Greet(peer_pb2.GreetRequest(sender=who), timeout=TIMEOUT_S),
        lambda stub, who: stub.Report(report(who), timeout=TIMEOUT_S),
        lambda stub, who: stub.Inventory(peer_pb2.InventoryRequest(sender=who, job="j"), timeout=TIMEOUT_S),
        lambda stub, who: stub.FetchRecords(
            peer_pb2.FetchRecordsRequest(sender=who, job="j"), timeout=TIMEOUT_S
        ),
        lambda stub, who: stub.NodeStatus(peer_pb2.NodeStatusRequest(sender=who), timeout=TIMEOUT_S),
        lambda stub, who: stub.PlanWorldRestore(
            peer_pb2.PlanWorldRestoreRequest(sender=who, job="j", world_size=1), timeout=TIMEOUT_S
        ),
        lambda stub, who: stub.FinishWorldRestore(
            peer_pb2.FinishWorldRestoreRequest(sender=who, job="j"), timeout=TIMEOUT_S
        ),
        lambda stub, who: stub.KvRead(peer_pb2.KvReadRequest(sender=who, prefix="/"), timeout=TIMEOUT_S),
    ]
    with channel(cluster) as open_channel:
        stub = peer_pb2_grpc.PeerStub(open_channel)
        for number, call in enumerate(calls):
            if kind == "cluster_id" and number == len(calls) - 1:
                continue  # the store is read before the cluster's id is known
            found = refused(lambda call=call: call(stub, sender(cluster, **changed)))  # type: ignore[misc]
            assert found[:2] == (code, kind), f"call {number}: {found}"
            assert text in found[2]
            assert "\n" not in found[2]
    goes_on(cluster)


def test_a_name_that_the_certificate_does_not_have(cluster: Cluster) -> None:
    if cluster.authority is None:
        pytest.skip("names are what callers say without TLS")
    with channel(cluster, as_node="somebody-else") as open_channel:
        stub = peer_pb2_grpc.PeerStub(open_channel)
        code, kind, text = refused(
            lambda: stub.Greet(peer_pb2.GreetRequest(sender=sender(cluster)), timeout=TIMEOUT_S)
        )
    assert (code, kind) == (grpc.StatusCode.UNAUTHENTICATED, "peer_name")
    assert f"the certificate is not of node {cluster.daemons[1].node}" in text
    goes_on(cluster)


CONTENTS: list[tuple[str, Call, grpc.StatusCode, str]] = [
    (
        "unknown job",
        lambda stub, who: stub.FetchRecords(
            peer_pb2.FetchRecordsRequest(sender=who, job="nobody"), timeout=TIMEOUT_S
        ),
        grpc.StatusCode.NOT_FOUND,
        "job",
    ),
    (
        "job that is a path",
        lambda stub, who: stub.Inventory(
            peer_pb2.InventoryRequest(sender=who, job="../../etc"), timeout=TIMEOUT_S
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "job_name",
    ),
    (
        "plan of a job that nobody collects here",
        lambda stub, who: stub.PlanWorldRestore(
            peer_pb2.PlanWorldRestoreRequest(sender=who, job="nobody", world_size=1), timeout=TIMEOUT_S
        ),
        grpc.StatusCode.UNAVAILABLE,
        "no_collector",
    ),
    (
        "barrier of a job that nobody collects here",
        lambda stub, who: stub.FinishWorldRestore(
            peer_pb2.FinishWorldRestoreRequest(sender=who, job="nobody"), timeout=TIMEOUT_S
        ),
        grpc.StatusCode.UNAVAILABLE,
        "no_collector",
    ),
    (
        "rank beyond the world",
        lambda stub, who: stub.Report(
            report(who, held=[peer_pb2.HeldShard(generation=1, step=1, rank=5, world_size=2)]),
            timeout=TIMEOUT_S,
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "peer",
    ),
    (
        "a step beyond all bounds",
        lambda stub, who: stub.Report(
            report(who, held=[peer_pb2.HeldShard(generation=1, step=(1 << 64) - 1, world_size=2)]),
            timeout=TIMEOUT_S,
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "peer",
    ),
    (
        "a world beyond all bounds",
        lambda stub, who: stub.Report(report(who, world_size=(1 << 32) - 1), timeout=TIMEOUT_S),
        grpc.StatusCode.INVALID_ARGUMENT,
        "peer",
    ),
    (
        "a plan that is no identity",
        lambda stub, who: stub.Report(
            report(who, parts_done=[peer_pb2.PartDone(generation=1, step=1, plan=bytes(1000))]),
            timeout=TIMEOUT_S,
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "peer",
    ),
]


@pytest.mark.parametrize(("call", "code", "kind"), [c[1:] for c in CONTENTS], ids=[c[0] for c in CONTENTS])
def test_contents_that_cannot_be(cluster: Cluster, call: Call, code: grpc.StatusCode, kind: str) -> None:
    with channel(cluster) as open_channel:
        stub = peer_pb2_grpc.PeerStub(open_channel)
        found = refused(lambda: call(stub, sender(cluster)))
    assert found[:2] == (code, kind), found
    assert "\n" not in found[2]
    assert len(found[2]) < 300
    goes_on(cluster)


def test_a_report_to_a_node_that_does_not_collect_is_told_so(cluster: Cluster) -> None:
    with channel(cluster) as open_channel:
        reply = peer_pb2_grpc.PeerStub(open_channel).Report(report(sender(cluster)), timeout=TIMEOUT_S)
    assert not reply.is_collector


@pytest.mark.parametrize("method", ["Greet", "Report", "FetchRecords", "KvTransact", "NoSuchCall"])
def test_garbage_is_refused(cluster: Cluster, method: str) -> None:
    with channel(cluster) as open_channel:
        call = open_channel.unary_unary(f"/snapd.v1.Peer/{method}")
        code, _, _ = refused(lambda: call(b"\xff\x00garbage" * 100, timeout=TIMEOUT_S))
    expected = grpc.StatusCode.UNIMPLEMENTED if method == "NoSuchCall" else grpc.StatusCode.INTERNAL
    assert code in (expected, grpc.StatusCode.UNKNOWN)
    goes_on(cluster)


def test_a_message_beyond_the_bound_is_refused_before_it_is_read(cluster: Cluster) -> None:
    with channel(cluster) as open_channel:
        call = open_channel.unary_unary("/snapd.v1.Peer/Greet")
        code, _, text = refused(lambda: call(bytes(MESSAGE_BYTES_MAX + 1), timeout=60))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text
    goes_on(cluster)


def test_each_refusal_is_one_line_of_the_log(cluster: Cluster) -> None:
    def lines() -> list[dict[str, Any]]:
        text = cluster.daemons[0].log.read_text(encoding="utf-8")
        events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [event for event in events if event.get("event") == "call.refused"]

    before = len(lines())
    with channel(cluster) as open_channel:
        stub = peer_pb2_grpc.PeerStub(open_channel)
        who = sender(cluster, protocol_version=99)
        refused(lambda: stub.Greet(peer_pb2.GreetRequest(sender=who), timeout=TIMEOUT_S))
    new = lines()[before:]
    assert [line["kind"] for line in new] == ["peer_version"]
