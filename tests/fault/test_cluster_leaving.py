"""A daemon that is told to stop finishes what is under way: the last step is captured and protected when it is gone."""

from __future__ import annotations

import json
import time

from tests.cluster.harness.cluster import cluster
from tests.support.cluster_jobs import FakeWorld, wait_protected

SLOW = {"SNAPD_CLUSTER_RATE": "128KiB", "SNAPD_RUNTIME_STOP_GRACE": "20s"}


def test_what_was_captured_is_protected_before_the_daemon_is_gone() -> None:
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=SLOW) as nodes:
        nodes.start()
        nodes.wait_settled()
        world = FakeWorld(nodes.daemons, "notice")
        world.capture(1)
        leaving = nodes["n3"]
        assert not leaving.job("notice").has_protected, "there is nothing left to finish"
        assert leaving.stop(30.0) == 0
        finished = leaving.events("levels.finished")[-1]
        assert finished["is_captured"] and finished["unprotected_jobs"] == []
        told = leaving.events("daemon.stopping")[-1]["time"]
        done = [part["time"] for part in leaving.events("protect.part_done") if part["job"] == "notice"]
        assert done and max(done) > told, "it did not have to wait"
        wait_protected(nodes.daemons[:2], "notice", 1)
        rows = {row.node: row.state for row in nodes["n1"].status().cluster.nodes}
        assert rows["n3"] == "absent", "its lease was let go of"
        listed = json.loads(nodes["n1"].command("ls", "notice", "--json"))
        assert [(each["level"], each["ranks_captured"]) for each in listed] == [("protected", [0])]
        assert nodes["n1"].command("ls", "notice").split("\n")[1].split()[3] == "protected"
        world.die()


def test_a_daemon_with_nothing_to_finish_ends_at_once() -> None:
    with cluster(2, "1+1", is_tls=False, is_etcd=False, is_namespaced=False, settings=SLOW) as nodes:
        nodes.start()
        nodes.wait_settled()
        began_s = time.monotonic()
        assert nodes["n2"].stop(20.0) == 0
        assert time.monotonic() - began_s < 10.0
