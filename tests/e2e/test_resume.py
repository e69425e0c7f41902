"""A trainer is killed with SIGKILL; another goes on; every bit is that of a run that was never stopped.

Real daemon, real processes. All single-process scenarios share one pair of processes (importing torch is what
costs), the distributed ones one pair of torchrun worlds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.node import Node

ROOT = Path(__file__).parents[2]
RUNNER = [str(ROOT / "tests" / "support" / "resume_runner.py")]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(prefix="snapd-test-resume") as node:
        yield node


def environment(node: Node) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **node.env(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(node: Node, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(node),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.timeout(600)
def test_killed_runs_go_on_bit_for_bit(node: Node, tmp_path: Path) -> None:
    killed = run(node, [sys.executable, *RUNNER, "before", str(tmp_path)], 280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    resumed = run(node, [sys.executable, *RUNNER, "after", str(tmp_path)], 280)
    failures = json.loads((tmp_path / "failures.rank0.json").read_text())
    assert failures == {}, resumed.stderr[-3000:]
    assert resumed.returncode == 0


@pytest.mark.timeout(600)
def test_killed_worlds_go_on_bit_for_bit(node: Node, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *RUNNER]
    killed = run(node, [*torchrun, "before", str(tmp_path)], 280)
    assert "SIGKILL" in killed.stderr or "Signal 9" in killed.stderr, killed.stderr[-3000:]
    resumed = run(node, [*torchrun, "after", str(tmp_path)], 280)
    for rank in range(2):
        failures = json.loads((tmp_path / f"failures.rank{rank}.json").read_text())
        assert failures == {}, resumed.stderr[-3000:]
    assert resumed.returncode == 0
