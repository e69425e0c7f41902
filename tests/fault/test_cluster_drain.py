"""A node is emptied before its maintenance: nothing is lost when it then goes, and m more nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.harness.cluster import Cluster, cluster
from tests.support.cluster_jobs import WAIT_S, FakeWorld, record_of
from tests.support.waiting import wait_for


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with cluster(4, "2+1", is_tls=False, is_etcd=False, is_namespaced=False) as made:
        made.start()
        made.wait_settled()
        yield made


def drained(nodes: Cluster, *options: str, code: int = 0) -> dict[str, object]:
    found = json.loads(nodes["n1"].command("drain", "--node", "n3", "--json", *options, code=code))
    assert isinstance(found, dict)
    return found


def grouped(nodes: Cluster) -> set[str]:
    return {node for group in nodes["n1"].status().cluster.groups for node in group.nodes}


def test_a_drained_node_and_m_others_may_go(nodes: Cluster) -> None:
    world = FakeWorld([nodes["n2"], nodes["n3"]], "drain")
    world.protect(1)
    assert not drained(nodes)["is_drained"]

    def says_trainers() -> bool:
        return "trainers run on it (job drain: rank 1)" in str(drained(nodes)["waits_for"])

    wait_for(says_trainers, "it names its trainers", WAIT_S, nodes.says)
    world.protect(2)  # meanwhile it protects on
    assert "n3" in grouped(nodes)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(drained, nodes, "--wait")
        world.close()
        assert waiting.result(60.0)["is_drained"]
    assert "n3" not in grouped(nodes)
    copies = [node for node in ("n1", "n2", "n4") if has_shard(nodes, node, 1)]
    assert copies, "rank 1's shard is nowhere else"

    for node in ("n3", "n2"):  # the drained one, and m more
        nodes[node].kill()
        assert nodes[node].wipe() > 0
    again = FakeWorld([nodes["n1"], nodes["n4"]], "drain", "two")
    assert again.restore() == [2, 2]
    again.die()


def has_shard(nodes: Cluster, node: str, rank: int) -> bool:
    summaries = nodes[node].asker.snapshots("drain")
    return any(rank in summary.ranks_captured for summary in summaries)


def test_a_node_that_stays_after_all_gets_its_place_back(nodes: Cluster) -> None:
    world = FakeWorld([nodes["n2"], nodes["n3"]], "drain")
    world.protect(1)
    world.close()
    assert drained(nodes, "--wait")["is_drained"]
    found = drained(nodes, "--undo")
    assert not found["is_draining"] and not found["is_drained"]
    nodes.wait_settled()
    assert "n3" in grouped(nodes)
    again = FakeWorld([nodes["n2"], nodes["n3"]], "drain", "two")
    assert again.restore() == [1, 1]
    assert record_of(nodes["n3"], "drain", 1, 1).rank == 1
    again.die()


def test_what_cannot_be_drained_is_said(nodes: Cluster) -> None:
    assert "no node" in nodes["n1"].command("drain", "--node", "n9", code=1)
    nodes["n3"].kill()
    wait_for(lambda: "n3" in absent(nodes), "n3 is missed", WAIT_S, nodes.says)
    assert "it is away" in str(drained(nodes, code=4)["waits_for"])
    nodes.wait_settled({"n1", "n2", "n4"}, 20.0)
    nodes["n4"].kill()
    wait_for(lambda: "n4" in absent(nodes), "n4 is missed", WAIT_S, nodes.says)

    def is_refused() -> bool:
        found = json.loads(nodes["n1"].command("drain", "--node", "n2", "--json"))
        return "too few to protect anything" in str(found["waits_for"])

    wait_for(is_refused, "the last but one stays", WAIT_S, nodes.says)
    assert "n2" in grouped(nodes)


def absent(nodes: Cluster) -> set[str]:
    rows = nodes["n1"].status().cluster.nodes
    return {row.node for row in rows if row.state in ("absent", "lost")}
