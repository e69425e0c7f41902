"""A job that is killed and goes on with another number of ranks, and on other meshes, from a real daemon's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.node import Node

ROOT = Path(__file__).parents[2]


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(prefix="snapd-test-elastic") as node:
        yield node


def start(node: Node, count: int, kind: str, folder: Path, how: str = "") -> tuple[list[dict[str, Any]], str]:
    """What each rank said when it had restored (in order of rank), and all that was printed."""
    for path in folder.glob("said-*"):
        path.unlink()
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **node.env(), "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [
        str(ROOT / "tests/support/elastic_trainer.py"),
        kind,
        str(folder),
        "2",
        *([how] if how else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    said = [json.loads(path.read_text()) for path in folder.glob("said-*")]
    return sorted(said, key=lambda one: int(one["rank"])), done.stdout + done.stderr[-6000:]


@pytest.mark.timeout(900)
def test_two_three_one_four_ranks_and_other_meshes(node: Node, tmp_path: Path) -> None:
    step = 0
    for count, kind in [(2, "fsdp"), (3, "fsdp"), (1, "fsdp"), (4, "tp"), (2, "ddp"), (2, "fsdp")]:
        said, output = start(node, count, kind, tmp_path)
        assert [one["step"] for one in said] == [step] * count, output
        assert "Signal 9" in output or "SIGKILL" in output, output
        step += 2


@pytest.mark.timeout(600)
def test_a_lost_machine_and_other_numbers_of_ranks_from_a_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the tier is left each time: memory, daemon and all are another machine's."""
    (tmp_path / "tier").mkdir()
    monkeypatch.setenv("SNAPD_TIER_SHARED", str(tmp_path / "tier"))
    monkeypatch.setenv("SNAPD_TIER_EVERY_STEPS", "1")
    monkeypatch.setenv("ELASTIC_LEVEL", "durable")
    step = 0
    for count, kind in [(2, "fsdp"), (3, "fsdp"), (1, "plain"), (2, "ddp")]:
        with Node(prefix="snapd-test-elastic-tier") as node:
            said, output = start(node, count, kind, tmp_path)
            assert [one["step"] for one in said] == [step] * count, output
            step += 2


@pytest.mark.timeout(600)
def test_a_place_in_the_data_is_kept_only_as_asked(node: Node, tmp_path: Path) -> None:
    start(node, 2, "fsdp", tmp_path, "keep")
    said, output = start(node, 1, "fsdp", tmp_path, "refused")
    assert not said and "data" in output and "reshard" in output, output
    said, output = start(node, 1, "fsdp", tmp_path, "keep")
    assert [one["step"] for one in said] == [2], output
    said, output = start(node, 2, "fsdp", tmp_path, "function")
    assert [one["step"] for one in said] == [4, 4], output
    assert said[0]["draw"] != said[1]["draw"], output  # rank 1 was not there: its numbers are its own
