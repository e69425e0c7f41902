"""A world that spans nodes goes on with fewer ranks after a node is lost: from the memory of the others, and parity."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.cluster import cluster
from tests.cluster.harness.daemon import ClusterDaemon

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(
    daemons: Sequence[ClusterDaemon], kind: str, folder: Path, level: str = "protected"
) -> tuple[list[dict[str, Any]], str]:
    """A rank on each node, each under a torchrun of its own; what they said when they had restored, and all output."""
    for path in folder.glob("said-*"):
        path.unlink()
    port, agents = free_port(), []
    for number, daemon in enumerate(daemons):
        environment = {
            **os.environ, **daemon.trainer_env(), "OMP_NUM_THREADS": "1", "ELASTIC_LEVEL": level,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(daemons)}", f"--node-rank={number}",
            "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}",
            str(ROOT / "tests/support/elastic_trainer.py"), kind, str(folder), "2",
        ]  # fmt: skip
        agents.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    output = "".join(agent.communicate(timeout=240)[0].decode() for agent in agents)
    said = [json.loads(path.read_text()) for path in folder.glob("said-*")]
    return sorted(said, key=lambda one: int(one["rank"])), output[-8000:]


@pytest.mark.timeout(600)
def test_three_nodes_two_after_a_loss_and_three_again(tmp_path: Path) -> None:
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False) as nodes:
        nodes.start()
        nodes.wait_settled()
        said, output = train(nodes.daemons, "fsdp", tmp_path)
        assert [one["step"] for one in said] == [0, 0, 0], output
        lost = nodes.daemons[-1]
        lost.kill()
        lost.wipe()
        said, output = train(nodes.daemons[:2], "fsdp", tmp_path)  # what it held, whole, is compared there
        assert [one["step"] for one in said] == [2, 2], output
        lost.start()
        said, output = train(nodes.daemons, "fsdp", tmp_path)
        assert [one["step"] for one in said] == [4, 4, 4], output


@pytest.mark.timeout(600)
def test_a_lost_cluster_and_a_smaller_one_from_the_tier(tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    tier = {"SNAPD_TIER_SHARED": str(tmp_path / "tier"), "SNAPD_TIER_EVERY_STEPS": "1"}
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False) as nodes:
        for daemon in nodes.daemons:
            daemon.settings.update(tier)
        nodes.start()
        nodes.wait_settled()
        said, output = train(nodes.daemons, "fsdp", tmp_path, "durable")
        assert [one["step"] for one in said] == [0, 0, 0], output
    with cluster(
        2, "1+1", is_tls=False, is_etcd=False, is_namespaced=False
    ) as nodes:  # nothing of the first is left
        for daemon in nodes.daemons:
            daemon.settings.update(tier)
        nodes.start()
        nodes.wait_settled()
        said, output = train(nodes.daemons, "fsdp", tmp_path, "durable")
        assert [one["step"] for one in said] == [2, 2], output
