"""A machine loses all its memory, as by a reboot or a power cut: a real job goes on from the node's own disk, bit for
bit, without a bucket and without other machines.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import daemon_folders
from tests.support.tier_job import CUT, END, check_resumed, train


@pytest.mark.timeout(600)
def test_it_goes_on_from_its_own_disk(undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = {"SNAPD_TIER_NODE": str(disk), "SNAPD_TIER_NODE_EVERY": "0.05", "OMP_NUM_THREADS": "1"}
    with daemon_folders(**settings) as node:
        node.start()
        train(node, 0, CUT, tmp_path / "before")
        node.kill()
        shutil.rmtree(node.arena)
        shutil.rmtree(node.runtime)
        node.start()
        resumed = train(node, CUT, END, tmp_path / "after")
        assert {(event["step"], event["rank"]) for event in node.events("shard.brought")} == {
            (CUT, 0),
            (CUT, 1),
        }
    check_resumed(resumed, undisturbed, CUT)
