"""The training loop of the README with a shared tier: `wait("durable")` means the tier, and training does not wait."""

from __future__ import annotations

import json
import subprocess
import sys

from snapd.core.ids import SnapshotId
from tests.support.flush_scene import tier_daemon

TRAINER = """
import json, torch
from snapd_client import Snapshotter

torch.manual_seed(1)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
snap = Snapshotter({"model": model, "optimizer": optimizer}, job="a")
start = snap.restore()
for step in range(start, 6):
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    snap.step(step + 1)
level = snap.wait(level="durable", timeout=30)
facts = {"level": level, "last": snap.last("durable"), "health": snap.health()["durable_step"]}
print(json.dumps(facts))
snap.close()
"""


def test_waiting_for_durable_in_a_training_loop() -> None:
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="0") as scene:
        scene.daemon.start()
        done = subprocess.run(
            [sys.executable, "-c", TRAINER], env=scene.daemon.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"level": "durable", "last": 6, "health": 6}
        assert SnapshotId(1, 6) in scene.snapshots()
