"""All nodes of a cluster lose their memory at once: each has its shards back from its own disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapd.core.tier_keys import TierKeys
from tests.cluster.harness.cluster import Cluster, cluster
from tests.support.cluster_jobs import FakeWorld
from tests.support.disk_scene import OFTEN
from tests.support.waiting import wait_for

WAIT_S = 40.0


@contextmanager
def nodes_with_disks(count: int, code: str, **settings: str) -> Iterator[Cluster]:
    """Not started. Each node's disk is a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="snapd-test-disks-"))
    try:
        with cluster(
            count, code, is_tls=False, is_etcd=False, is_namespaced=False, settings={**OFTEN, **settings}
        ) as made:
            for daemon in made.daemons:
                (folder / daemon.node).mkdir()
                daemon.settings["SNAPD_TIER_NODE"] = str(folder / daemon.node)
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def disk_of(nodes: Cluster, node: str) -> Path:
    return Path(nodes[node].settings["SNAPD_TIER_NODE"])


def steps_on(nodes: Cluster, node: str) -> list[int]:
    return sorted(
        int(path.name.partition("-")[2]) for path in (disk_of(nodes, node) / TierKeys("w").shards).glob("*")
    )


def wait_kept(nodes: Cluster, step: int, generation: int = 1) -> None:
    def is_kept() -> bool:
        disks = [daemon.job("w").disk for daemon in nodes.running]  # type: ignore[union-attr]
        return all((d.durable_generation, d.durable_step) >= (generation, step) for d in disks)

    wait_for(is_kept, f"step {step} is on all disks", WAIT_S, nodes.tails)


def power_cut(nodes: Cluster) -> None:
    """Everything but the disks is gone, on all nodes, also what the leader knew."""
    for daemon in nodes.daemons:
        daemon.kill()
    for daemon in nodes.daemons:
        assert daemon.wipe() > 0


def test_all_nodes_lose_their_memory_at_once() -> None:
    with nodes_with_disks(3, "2+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        for step in (1, 2, 3):
            world.capture(step)
            wait_kept(nodes, step)
        # one more where it was not known yet that all have step 2
        assert {node: steps_on(nodes, node)[-2:] for node in nodes.nodes} == {
            node: [2, 3] for node in nodes.nodes
        }
        world.die()
        power_cut(nodes)
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w", "two")
        assert {trainer.session.generation for trainer in world.trainers} == {2}
        assert world.restore() == [3, 3, 3]  # each compares every byte
        world.capture(4)
        wait_kept(nodes, 4, 2)
        assert {node: steps_on(nodes, node)[-1] for node in nodes.nodes} == dict.fromkeys(nodes.nodes, 4)
        world.close()


def test_disks_that_differ_by_one_and_a_node_that_is_late() -> None:
    """One node's disk did not get the newest snapshot: all take the one that they have in common."""
    with nodes_with_disks(3, "2+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        for step in (1, 2):
            world.capture(step)
            wait_kept(nodes, step)
        aside = disk_of(nodes, "n2").with_name("aside")
        disk_of(nodes, "n2").rename(aside)
        world.capture(3)

        def is_on_the_others() -> bool:
            return all(3 in steps_on(nodes, node) for node in ("n1", "n3"))

        wait_for(is_on_the_others, "step 3 is on two disks", WAIT_S, nodes.tails)
        world.die()
        for daemon in nodes.daemons:
            daemon.kill()
        aside.rename(disk_of(nodes, "n2"))
        for daemon in nodes.daemons:
            assert daemon.wipe() > 0
        assert steps_on(nodes, "n2")[-2:] == [1, 2]
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w", "two")
        assert world.restore() == [2, 2, 2]
        world.close()


def test_a_job_of_a_name_that_was_removed_before_keeps_its_disk() -> None:
    """What the coordinator remembers of the removal does not hit the job that has the name now, on a node that lost
    its memory.
    """
    with nodes_with_disks(3, "2+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        world.capture(1)
        wait_kept(nodes, 1)
        world.die()
        nodes["n2"].asker.remove("w")
        wait_for(lambda: all(d.job("w") is None for d in nodes.running), "it is removed", WAIT_S, nodes.tails)
        world = FakeWorld(nodes.daemons, "w", "anew")
        world.capture(5)
        wait_kept(nodes, 5, 2)
        world.die()
        nodes["n3"].kill()
        assert nodes["n3"].wipe() > 0
        nodes["n3"].start()
        wait_for(lambda: nodes["n3"].events("disk.filled"), "its disk was read", WAIT_S, nodes.tails)
        wait_for(lambda: nodes["n3"].events("job.ended"), "it heard of the removal", WAIT_S, nodes.tails)
        assert steps_on(nodes, "n3") == [5]
        assert [event["step"] for event in nodes["n3"].events("shard.brought")] == [5]


def test_ranks_on_other_nodes_than_before() -> None:
    """After the power cut each rank runs elsewhere: its shard comes from the node that has it on its disk."""
    with nodes_with_disks(3, "2+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        world.capture(1)
        wait_kept(nodes, 1)
        world.die()
        power_cut(nodes)
        nodes.start()
        nodes.wait_settled()
        moved = [*nodes.daemons[1:], nodes.daemons[0]]
        world = FakeWorld(moved, "w", "two")
        assert world.restore() == [1, 1, 1]
        world.close()


def test_durable_means_on_all_disks() -> None:
    with nodes_with_disks(2, "1+1", SNAPD_TIER_NODE_EVERY="0") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        world.capture(1)
        replies = world.each("wait_durable", 1)
        assert [(reply.reached, reply.tier) for reply in replies] == [(True, "node")] * 2
        assert [steps_on(nodes, node) for node in nodes.nodes] == [[1], [1]]
        world.close()


def row_of(asked: Cluster, by: str, node: str) -> str:
    """What the daemon of `by` says is wrong with `node`."""
    rows = asked[by].asker.status(ask_peers=True).cluster.nodes
    return next(row.trouble for row in rows if row.node == node)


def test_what_is_wrong_with_a_disk_is_told_by_every_node() -> None:
    with nodes_with_disks(3, "2+1", SNAPD_TIER_NODE_SCRUB="0.5") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        for step in (1, 2):
            world.capture(step)
            wait_kept(nodes, step)
        world.die()
        power_cut(nodes)
        for path in (disk_of(nodes, "n2") / TierKeys("w").packs).glob("*.pack"):
            path.chmod(0o600)
            path.write_bytes(bytes(path.stat().st_size))  # all that this node had; memory has it no more
        nodes.start()
        nodes.wait_settled()

        def is_told() -> bool:
            said = row_of(nodes, "n1", "n2")
            return said.startswith("disk: job w: damaged: ") and "pack" in said

        wait_for(is_told, "n1 says what n2's disk has lost", WAIT_S, nodes.tails)
        assert "disk" not in row_of(nodes, "n1", "n3")
        aside = disk_of(nodes, "n3").with_name("aside")
        disk_of(nodes, "n3").rename(aside)
        world = FakeWorld(nodes.daemons, "w", "two")
        wait_for(
            lambda: "disk: job w: paused: " in row_of(nodes, "n1", "n3"),
            "and that n3's is away",
            WAIT_S,
            nodes.tails,
        )
        world.die()


def test_a_job_is_removed_while_the_disk_of_a_node_without_memory_is_away() -> None:
    with nodes_with_disks(3, "2+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        world.capture(1)
        wait_kept(nodes, 1)
        world.close()
        nodes["n3"].kill()
        assert nodes["n3"].wipe() > 0
        aside = disk_of(nodes, "n3").with_name("aside")
        disk_of(nodes, "n3").rename(aside)
        nodes["n3"].start()
        wait_for(lambda: nodes["n3"].events("disk.away"), "its disk is away", WAIT_S, nodes.tails)
        nodes.wait_settled()
        said = nodes["n1"].command("rm", "w", code=4)
        assert "n3 (" in said
        assert str(disk_of(nodes, "n3")) in said
        assert "--force" in said
        said = nodes["n1"].command("rm", "w", "--force")  # ends, and says what is left
        assert "n3 will drop what it has of it once it can: " in said
        assert [steps_on(nodes, node) for node in ("n1", "n2")] == [[], []]
        aside.rename(disk_of(nodes, "n3"))
        wait_for(lambda: not steps_on(nodes, "n3"), "it is gone from there, too", WAIT_S, nodes.tails)
        assert all(daemon.job("w") is None for daemon in nodes.running)


def test_a_job_that_is_closed_for_good_goes_from_all_disks() -> None:
    """As docs/tiers.md says: alone it stays there until `snapd rm`, in a cluster it goes as it goes from memory."""
    with nodes_with_disks(2, "1+1") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        world.capture(1)
        wait_kept(nodes, 1)
        world.close(is_final=True)
        wait_for(
            lambda: all(steps_on(nodes, node) == [] for node in nodes.nodes), "gone", WAIT_S, nodes.tails
        )
        power_cut(nodes)
        nodes.start()
        nodes.wait_settled()
        assert all(daemon.job("w") is None for daemon in nodes.running)


def test_with_two_slots_capture_goes_on_after_both_were_filled_from_the_disk() -> None:
    with nodes_with_disks(3, "2+1", SNAPD_ARENA_SLOTS="2") as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "w")
        for step in (1, 2, 3):
            world.capture(step)
            wait_kept(nodes, step)
        world.die()
        power_cut(nodes)
        nodes.start()
        nodes.wait_settled()
        wait_for(
            lambda: all(daemon.events("disk.filled") for daemon in nodes.running),
            "filled",
            WAIT_S,
            nodes.tails,
        )
        brought = [
            event["brought"] for daemon in nodes.running for event in daemon.events("disk.filled")[-1:]
        ]
        assert brought == [["1/3", "1/2"]] * 3
        world = FakeWorld(nodes.daemons, "w", "two")
        assert world.restore() == [3, 3, 3]
        for step in (4, 5, 6):
            world.capture(step)
            wait_kept(nodes, step, 2)
        world.close()
