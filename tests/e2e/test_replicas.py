"""Replicas of one node share out what they hold alike: half the bytes, every bit back, and a difference is found.

Real daemon, two ranks under torchrun; all ways (`support/replica_trainer.py`) in one pair of worlds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.replica_trainer import CUT, DISTURBED_AT, END, SPOILT

ROOT = Path(__file__).parents[2]
RANKS = range(2)
HALVED_WAYS = ("replicas-ddp", "replicas-hsdp")
EQUAL_WAYS = (*HALVED_WAYS, "replicas-frozen")


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with daemon_folders() as daemon:
        daemon.start()
        yield daemon


def _run(daemon: DaemonProcess, *arguments: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    env = {**daemon.env, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _world(daemon: DaemonProcess, mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tests/support/replica_trainer.py")
    return _run(
        daemon, "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, mode, str(folder)
    )


@pytest.fixture(scope="module")
def folder(daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the killed world and its successor left what they saw; what an export gave lies there too."""
    folder = tmp_path_factory.mktemp("replicas")
    killed = _world(daemon, "before", folder)
    assert "SIGKILL" in killed.stderr or "Signal 9" in killed.stderr, killed.stderr[-3000:]
    for way in EQUAL_WAYS:
        (folder / f"{way}.show.json").write_text(_run(daemon, "snapd", "show", way, "--json").stdout)
        exported = _run(daemon, "snapd", "restore", "--job", way, "--to", str(folder / f"{way}.export"))
        assert exported.returncode == 0, exported.stderr
        verified = _run(daemon, "snapd", "verify", way)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    resumed = _world(daemon, "after", folder)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return folder


def _read(folder: Path, way: str, what: str, rank: int) -> Any:
    return json.loads((folder / f"{way}.{what}.rank{rank}.json").read_text())


@pytest.mark.timeout(450)
@pytest.mark.parametrize("way", HALVED_WAYS)
def test_each_rank_copies_about_half(folder: Path, way: str) -> None:
    for rank in RANKS:
        seen = {entry["step"]: entry for entry in _read(folder, way, "seen", rank)}
        full = [entry["bytes"] for entry in seen.values() if entry["replicas"] == "full"]
        shared = [entry["bytes"] for entry in seen.values() if entry["replicas"] == "shared out"]
        assert seen[1]["replicas"] == "full" and seen[32]["replicas"] == "full", (
            "the replicas are not compared"
        )
        assert len(shared) > 20 and seen[CUT]["replicas"] == "shared out"
        assert max(shared) < 0.65 * min(full)
    show = json.loads((folder / f"{way}.show.json").read_text())
    assert show["step"] == CUT and len(show["shards"]) == len(RANKS)
    held = [
        {tensor["name"] for tensor in shard["tensors"] if tensor["held_by_rank"] == shard["rank"]}
        for shard in show["shards"]
    ]
    elsewhere = [
        {tensor["name"] for tensor in shard["tensors"] if tensor["held_by_rank"] != shard["rank"]}
        for shard in show["shards"]
    ]
    assert elsewhere[0] and elsewhere[0] <= held[1] and elsewhere[1] and elsewhere[1] <= held[0]


@pytest.mark.timeout(450)
@pytest.mark.parametrize("way", EQUAL_WAYS)
def test_a_killed_world_goes_on_bit_for_bit(folder: Path, way: str) -> None:
    for rank in RANKS:
        after = _read(folder, way, "after", rank)
        assert (after["start"], after["cut"], after["end"]) == (CUT, [], [])
        assert after["last"] == "shared out", "the last snapshot was a full one: the rollback shows little"
        assert (after["rolled_back_to"], after["rolled_back"]) == (END, [])


@pytest.mark.timeout(450)
@pytest.mark.parametrize("way", EQUAL_WAYS)
def test_an_export_has_every_tensor_of_every_rank(folder: Path, way: str) -> None:
    for rank in RANKS:
        exported = load_file(folder / f"{way}.export" / f"rank-{rank:05d}.safetensors")
        expected = torch.load(folder / f"{way}.rank{rank}.pt")
        assert exported.keys() >= expected.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


@pytest.mark.timeout(450)
def test_a_replica_that_was_changed_by_hand_is_found_and_ends_the_sharing(
    daemon: DaemonProcess, folder: Path
) -> None:
    way = "replicas-spoilt"
    for rank in RANKS:
        seen = {entry["step"]: entry["replicas"] for entry in _read(folder, way, "seen", rank)}
        assert seen[DISTURBED_AT] == "shared out", (
            "it was changed before anything was shared out: the test is void"
        )
        assert seen[CUT] == "differ"
        assert SPOILT in _read(folder, way, "difference", rank)
        after = _read(folder, way, "after", rank)
        assert (after["start"], after["cut"]) == (CUT, []), "a rank did not get its own bytes back"
    spoilt = [torch.load(folder / f"{way}.rank{rank}.pt")[SPOILT] for rank in RANKS]
    assert not torch.equal(*spoilt), "the ranks hold the same: the test is void"
    events = [event for event in daemon.events("replicas.differ") if event["job"] == way]
    assert [(e["tensor"], e["ranks"], e["step"]) for e in events if e["generation"] == 1] == [
        (SPOILT, [0, 1], 32)
    ]
