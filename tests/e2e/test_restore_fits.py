"""A restore needs no more memory than training does: what it brings lies in a slot of the job's own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess
from tests.support.flush_scene import TierDaemon, capture_steps, tier_daemon

TRAINER = """
import json, sys, torch
from snapd_client import Snapshotter

torch.manual_seed(1)
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
optimizer = torch.optim.AdamW(model.parameters())
snap = Snapshotter({"model": model, "optimizer": optimizer}, job="a")
start = snap.restore()
for step in range(start, int(sys.argv[1])):
    torch.manual_seed(step)
    model(torch.randn(8, 512)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    snap.step(step + 1, wait="captured")
snap.wait("durable", timeout=30)
print(json.dumps({"start": start, "failures": snap.health()["failures"]}))
snap.close()
"""
EVERY_STEP = {"SNAPD_TIER_EVERY_STEPS": "1"}


def train(daemon: DaemonProcess, until: int) -> dict[str, Any]:
    command = [sys.executable, "-c", TRAINER, str(until)]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr + daemon.log_file.read_text()
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["failures"] == 0
    return facts


def arena_bytes(scene: TierDaemon) -> int:
    return int(scene.daemon.job("a").arena_bytes)


@pytest.mark.parametrize("slots", ["2", "3"])
def test_into_memory_that_has_nothing(slots: str) -> None:
    settings = EVERY_STEP | {"SNAPD_ARENA_SLOTS": slots}
    with tier_daemon(**settings) as one:
        one.daemon.start()
        train(one.daemon, 4)
        most = arena_bytes(one)
        with tier_daemon(one.root, **settings, SNAPD_ARENA_BYTES=str(most)) as other:
            other.daemon.start()
            assert train(other.daemon, 8)["start"] == 4  # and there is room to go on
            assert other.daemon.events("shard.brought")
            assert arena_bytes(other) <= most


def test_beside_older_snapshots() -> None:
    with tier_daemon(**EVERY_STEP, SNAPD_ARENA_SLOTS="3") as one:
        one.daemon.start()
        train(one.daemon, 2)
        most = arena_bytes(one)
        one.daemon.kill()
        with tier_daemon(one.root, **EVERY_STEP) as other:
            other.daemon.start()
            train(other.daemon, 6)
        one.daemon.env["SNAPD_ARENA_BYTES"] = str(most)
        one.daemon.start()
        assert train(one.daemon, 8)["start"] == 6
        assert one.daemon.events("shard.brought")
        assert arena_bytes(one) <= most


def test_older_snapshots_and_new_memory_together_are_room_enough() -> None:
    """A larger state than before: neither what older snapshots give back is enough, nor what may still be backed."""
    with tier_daemon(**EVERY_STEP, SNAPD_ARENA_SLOTS="3") as one:
        one.daemon.start()
        trainer = one.daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=6 << 16)
        capture_steps(trainer, 1, 4)
        one.wait_durable(4)
        trainer.disconnect()
        before = {snapshot.step for snapshot in one.daemon.snapshots("a")}
        room = arena_bytes(one) + (12 << 16)
        one.daemon.kill()
        with tier_daemon(one.root, **EVERY_STEP) as other:
            other.daemon.start()
            trainer = other.daemon.trainer()
            trainer.open(job="a", incarnation="two", state_bytes_estimate=20 << 16)
            trainer.capture(9, 1, chunk_count=18)
            assert trainer.wait_durable(9).reached
            trainer.disconnect()
        one.daemon.env["SNAPD_ARENA_BYTES"] = str(room)
        one.daemon.start()
        trainer = one.daemon.trainer()
        trainer.open(job="a", incarnation="three")
        assert trainer.restore(1, chunk_count=18) == 9
        assert len(before) > 1 and {snapshot.step for snapshot in one.daemon.snapshots("a")} == {4, 9}
        assert arena_bytes(one) <= room
        trainer.disconnect()
