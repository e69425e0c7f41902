"""A job's end across nodes: closed for good by all ranks, or removed by hand; nodes that are away follow later."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness.cluster import Cluster, cluster
from tests.support.cluster_jobs import WAIT_S, FakeWorld
from tests.support.waiting import wait_for

_names = itertools.count()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False) as made:
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture
def world(nodes: Cluster) -> Iterator[FakeWorld]:
    """Two ranks, on n2 and n3; n1 has parity only. Step 1 is protected."""
    made = FakeWorld(nodes.daemons[1:], f"end{next(_names)}")
    made.protect(1)
    wait_for(lambda: where(nodes, made.job) == nodes.nodes, "all nodes hold some of it", WAIT_S, nodes.says)
    yield made
    made.die()


def where(nodes: Cluster, job: str) -> list[str]:
    """The nodes whose arena has a folder of the job."""
    return [daemon.node for daemon in nodes.daemons if (daemon.arena / "jobs" / job).exists()]


def mapped(nodes: Cluster, job: str) -> list[str]:
    """What daemons have mapped of the job's segments: memory in use, whether its file is there or not."""
    found = []
    for daemon in nodes.daemons:
        assert daemon.process is not None
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text(encoding="utf-8")
        found += [line for line in maps.splitlines() if f"/jobs/{job}/" in line]
    return found


def wait_gone(nodes: Cluster, job: str) -> None:
    wait_for(lambda: not where(nodes, job), f"{job} is gone from all nodes", WAIT_S, nodes.says)


def test_a_job_that_all_ranks_closed_for_good_is_gone_everywhere(nodes: Cluster, world: FakeWorld) -> None:
    world.close(is_final=True)
    wait_gone(nodes, world.job)
    again = FakeWorld(nodes.daemons[1:], world.job, "two")
    world.trainers = again.trainers
    assert [trainer.session.has_parent for trainer in again.trainers] == [False, False]
    assert {trainer.session.generation for trainer in again.trainers} == {2}
    assert again.restore() == [-1, -1]
    again.protect(1)
    again.close()
    assert where(nodes, world.job) == nodes.nodes
    nodes["n1"].command("rm", world.job)
    wait_gone(nodes, world.job)


def test_a_rank_that_did_not_close_for_good_keeps_the_job(nodes: Cluster, world: FakeWorld) -> None:
    first, second = world.trainers
    first.close(final=True)
    second.close(final=False)
    world.die()
    with pytest.raises(TimeoutError):
        wait_for(lambda: not where(nodes, world.job), "it is removed", 3.0)
    assert where(nodes, world.job) == nodes.nodes
    again = FakeWorld(nodes.daemons[1:], world.job, "two")
    world.trainers = again.trainers
    assert again.restore() == [1, 1]


def test_rm_refuses_while_trainers_run_anywhere_and_then_removes_everywhere(
    nodes: Cluster, world: FakeWorld
) -> None:
    told = nodes["n1"].command("rm", world.job, code=2)
    assert "n2: rank 0" in told and "n3: rank 1" in told
    assert where(nodes, world.job) == nodes.nodes
    assert any("parity.seg" in line for line in mapped(nodes, world.job))
    found = json.loads(nodes["n1"].command("rm", world.job, "--force", "--json"))
    assert found["nodes"] == nodes.nodes and not found["late_nodes"] and not found["absent_nodes"]
    assert found["snapshots_removed"] == 1 and found["arena_bytes_freed"] > 0
    assert not where(nodes, world.job)
    wait_for(lambda: not mapped(nodes, world.job), "its memory is given back", WAIT_S, nodes.says)
    assert all(trainer.word("fenced") for trainer in world.trainers)
    assert "no job" in nodes["n2"].command("rm", world.job, code=1)


def test_a_removed_job_begins_anew_on_daemons_that_have_just_begun(nodes: Cluster, world: FakeWorld) -> None:
    """They hear of the old removal while the first rank's session is being opened."""
    world.close()
    nodes["n1"].command("rm", world.job)
    wait_gone(nodes, world.job)
    for daemon in world.daemons:
        daemon.kill()
        daemon.start()
    nodes.wait_settled()
    again = FakeWorld(nodes.daemons[1:], world.job, "two")
    world.trainers = again.trainers
    assert {trainer.session.generation for trainer in again.trainers} == {2}
    assert again.restore() == [-1, -1]
    again.protect(1)


def test_a_node_that_is_absent_is_named_and_follows_when_it_comes_back(
    nodes: Cluster, world: FakeWorld
) -> None:
    world.close()
    absent = nodes["n3"]
    absent.kill()

    def is_missed() -> bool:
        rows = nodes["n1"].status().cluster.nodes
        return any(row.node == "n3" and row.state == "absent" for row in rows)

    wait_for(is_missed, "n3 is missed", WAIT_S, nodes.says)
    assert "n3 cannot be asked" in nodes["n1"].command("rm", world.job, code=4)
    assert where(nodes, world.job) == nodes.nodes
    found = json.loads(nodes["n1"].command("rm", world.job, "--force", "--json"))
    assert found["absent_nodes"] == ["n3"]
    assert where(nodes, world.job) == ["n3"]
    absent.start()
    nodes.wait_settled()
    wait_gone(nodes, world.job)


def test_a_daemon_that_restarts_forgets_no_rank_that_closed_for_good(
    nodes: Cluster, world: FakeWorld
) -> None:
    collector = nodes["n1"].job(world.job).collector
    first = 0 if collector != world.daemons[0].node else 1  # the collector's own daemon would forget it
    daemon, trainer, other = world.daemons[first], world.trainers[first], world.trainers[1 - first]
    trainer.close(final=True)
    trainer.disconnect()
    time.sleep(1.0)  # its daemon reports it within a hundredth of a second
    daemon.kill()
    daemon.start()
    nodes.wait_settled()
    assert where(nodes, world.job) == nodes.nodes
    other.close(final=True)
    other.disconnect()
    wait_gone(nodes, world.job)
