"""kill -9 at every point of protection and of bringing a shard: nothing recorded is lost, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.runtime.faultpoints import CLUSTER_POINTS
from tests.support.cluster_nodes import CHUNK, chunk_bytes, network_of, protect, sources_now
from tests.support.protecting_child import CHUNKS, GROUP, NODES

ROOT = Path(__file__).resolve().parents[2]
SPECS = [
    *(point for point in CLUSTER_POINTS if not point.startswith("daemon.repair.")),  # test_cluster_repair.py
    "daemon.protect.records.after:3",
    "daemon.protect.fragment.before:20",
    "daemon.protect.fragment.after:33",
    "daemon.protect.done.after:4",
    "daemon.protect.drop.after:2",
]


def killed(folder: Path, spec: str) -> list[str]:
    """Run the child until the point kills it; what it had reached."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.protecting_child", str(folder), f"{spec}=kill"],
        cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, f"{spec} was never reached"
    return child.stdout.split()


@pytest.mark.parametrize("spec", SPECS)
def test_a_kill_loses_nothing_recorded_and_leaks_nothing(folder: Path, spec: str) -> None:
    reached = killed(folder, spec)
    assert "captured" in reached

    async def run() -> None:
        async with network_of(folder, NODES) as network:
            for node in network.nodes.values():
                node.take_up()
                job = node.jobs["a"]
                job.parity.check()
                planned = {(row.id, j) for plan in job.parity.plans() for row, j in plan.given_to(node.name)}
                assert job.parity.used_bytes <= len(planned) * CHUNK
                files = {path.name for path in job.folder.path.glob("parity.seg-*")}
                assert files == {segment.path.name for segment in job.parity.segments}
            if "protected" in reached and "dropped" not in reached and "drop" not in spec:
                for (
                    node
                ) in network.nodes.values():  # what was protected is, still: every fragment is here and whole
                    plan = node.jobs["a"].parity.plan(SnapshotId(1, 5), 1)
                    for row, number in plan.given_to(node.name):
                        with node.jobs["a"].parity.read(row.id, number) as (view, _):
                            assert view.nbytes == CHUNK
            await protect(network, "a", 6, GROUP)
            await network.lose("n1")
            fresh = network.add("fresh")
            await fresh.bring("a", 6, 1, sources_now(network, "a", 6, GROUP))
            expected = [chunk_bytes("a", 1, i, 6, nbytes=CHUNK) for i in range(CHUNKS)]
            assert fresh.shard("a", 6, 1) == expected

    asyncio.run(run())
