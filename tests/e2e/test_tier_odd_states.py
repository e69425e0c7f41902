"""States of odd shapes through a tier and back: nothing but the tier is left, and all of it comes back, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.support.flush_scene import TierDaemon, tier_daemon

FIRST, LAST = 3, 5  # steps that the two runs end with
TRAINER = """
import json, sys, torch
from snapd_client import Snapshotter

first, last = int(sys.argv[1]), int(sys.argv[2])
COUNT = 20_000

def tiny(shift):
    return {f"t{i}": torch.full((3,), float(i)) + shift for i in range(COUNT)}

def expected(kind, step):
    if kind == "tiny":
        return {"tensors": tiny(step)}
    if kind == "scalars":
        return {"tensors": {f"s{i}": torch.tensor(float(i)) + step for i in range(100)}}
    if kind == "none":
        return {"count": step, "name": "nothing", "list": [None, step], "deep": {"a": {"b": {"c": (step, {})}}}}
    if kind == "empty":
        return {"a": torch.empty(0), "b": torch.empty(0, 7, dtype=torch.int64), "c": torch.empty(2, 0, 3)}
    return {}

def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other

said = {}
for kind in sys.argv[3:]:
    state = expected(kind, 0)
    snap = Snapshotter(state, job=kind)
    start = snap.restore()
    assert start == first, (kind, start, first)
    assert same(state, expected(kind, first)), (kind, "came back otherwise")
    for step in range(first + 1, last + 1):
        for tensor in state.get("tensors", {}).values():
            tensor += 1
        if kind == "none":
            state.update(expected(kind, step))
        snap.step(step, wait="captured")
    said[kind] = snap.wait(level="durable", timeout=60)
    snap.close()
print(json.dumps(said))
"""


def train(scene: TierDaemon, first: int, last: int, *kinds: str) -> dict[str, str]:
    """Go on from `first`, which must have come back as it was; returns the level of each job's newest snapshot."""
    command = [sys.executable, "-c", TRAINER, str(first), str(last), *kinds]
    done = subprocess.run(command, env=scene.daemon.env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr + done.stdout
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_twenty_thousand_tiny_tensors_and_states_without_any() -> None:
    kinds = ("tiny", "scalars", "none", "empty", "nothing")
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="0") as scene:
        scene.daemon.start()
        assert train(scene, 0, FIRST, *kinds) == dict.fromkeys(kinds, "durable")
        scene.daemon.kill()
        shutil.rmtree(scene.daemon.arena)
        scene.daemon.start()
        assert train(scene, FIRST, LAST, *kinds) == dict.fromkeys(kinds, "durable")
