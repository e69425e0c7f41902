"""A job for ckpt-chaos: this process is the daemon, watched by it; a fake trainer in a child, which is not.

    python tests/chaos/job.py OUT

OUT/tier is the shared tier. Memory is emptied first: what is resumed from can only be the tier. Before the daemon
starts, every snapshot that the tier offers is read to its last byte, and the trainer must resume from the newest of
them; anything else ends with 1. At the end the newest snapshot is that of STEPS. SNAPD_CHAOS_BUG=1 plants a bug:
commit records come before packs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from snapd.config import load
from snapd.core.ids import SnapshotId
from snapd.daemon import run_daemon
from snapd.store.base import Buffer, Created
from snapd.store.directory import DirectoryStore, DirectoryUpload
from tests.support.fake_trainer import FakeTrainer, content
from tests.support.stores import directory_store
from tests.support.tier_audit import audit

JOB, SEED, STEPS, CHUNKS = "chaos", 3, 4, 8
PAUSE_S = 1.3  # longer than a round, so that the collector has something to delete
_PR_SET_PDEATHSIG = 1
SETTINGS = {
    "SNAPD_TIER_EVERY_STEPS": "1",
    "SNAPD_TIER_EVERY": "0",
    "SNAPD_TIER_RATE": "0",
    "SNAPD_TIER_COMPRESSION": "off",
    "SNAPD_TIER_KEEP_LAST": "1",
    "SNAPD_TIER_GC_EVERY": "1s",
    "SNAPD_TIER_INTENT_TTL": "4s",
    "SNAPD_TIER_GRACE": "3s",
    "SNAPD_CAPTURE_POLL_INTERVAL": "0.1",
}


def newest_whole(out: Path) -> int:
    """The step of the newest snapshot that the tier offers, after all of them were read; 0: none."""
    found = audit(directory_store(out / "tier"), JOB)
    for snapshot, ranks in found.items():
        _check(snapshot, ranks)
    return max(found).step if found else 0


def _check(snapshot: SnapshotId, ranks: list[list[bytes]]) -> None:
    for chunks in ranks:
        for index in range(2, CHUNKS - 1):
            if chunks[index] != content(len(chunks[index]), JOB, 0, snapshot.step, SEED, index):
                raise AssertionError(f"{snapshot} has other bytes than were captured")


def train(runtime: Path, expected_step: int) -> int:
    """The child: resume, then one step after the other, each durable before the next; ends the daemon."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer = _opened(runtime)
    resumed = trainer.restore(SEED, CHUNKS) if expected_step else 0
    print(f"resumed from step {resumed}", flush=True)
    if resumed != expected_step:
        print(f"the tier offered step {expected_step}", flush=True)
        return 1
    for step in range(resumed + 1, STEPS + 1):
        trainer.capture(step, SEED, CHUNKS)
        time.sleep(PAUSE_S)
    time.sleep(2 * PAUSE_S)
    return 0


def _opened(runtime: Path) -> FakeTrainer:
    until_s = time.monotonic() + 20
    while True:
        try:
            trainer = FakeTrainer(runtime)
            trainer.open(job=JOB, incarnation=f"run-{os.getpid()}", state_bytes_estimate=1 << 20)
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
        else:
            return trainer


def plant_bug() -> Callable[[], None]:
    """Packs get their names after the commit record has its own: with the next one. Returns what names the last."""
    waiting: list[DirectoryUpload] = []
    publish, create = DirectoryUpload.commit, DirectoryStore.create

    def later(self: DirectoryUpload) -> int:
        waiting.append(self)
        return 1

    def first(self: DirectoryStore, key: str, data: Buffer, *, deadline_s: float | None = None) -> Created:
        before = list(waiting)
        created = create(self, key, data, deadline_s=deadline_s)
        if key.endswith(".snapshot"):
            for upload in before[:-1]:
                waiting.remove(upload)
                publish(upload)
        return created

    def rest() -> None:
        while waiting:
            publish(waiting.pop(0))

    DirectoryUpload.commit = later  # type: ignore[method-assign]
    DirectoryStore.create = first  # type: ignore[method-assign]
    return rest


def main() -> int:
    if sys.argv[1] == "--train":
        code = train(Path(sys.argv[2]), int(sys.argv[3]))
        os.kill(os.getppid(), signal.SIGTERM)
        return code
    if sys.argv[1] == "--result":
        print(f"step {newest_whole(Path(sys.argv[2]))}")
        return 0
    out = Path(sys.argv[1]).absolute()
    (out / "tier").mkdir(parents=True, exist_ok=True)
    expected = newest_whole(out)
    name = f"snapd-chaos-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"
    runtime, arena = Path("/tmp") / name, Path("/dev/shm") / name
    for folder in (runtime, arena):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
    environment = {
        "SNAPD_RUNTIME_DIR": str(runtime / "run"),
        "SNAPD_ARENA_DIR": str(arena / "arena"),
        "SNAPD_TIER_SHARED": str(out / "tier"),
        **SETTINGS,
    }
    os.environ.update(environment)
    end = plant_bug() if os.environ.get("SNAPD_CHAOS_BUG") else None
    arguments = [sys.executable, __file__, "--train", str(runtime / "run"), str(expected)]
    with (runtime / "daemon.log").open("wb") as log:
        os.dup2(log.fileno(), 2)  # the daemon's log
    trainer = subprocess.Popen(
        arguments, env={**os.environ, "CKPT_CHAOS_ARMED": "1"}, stderr=subprocess.STDOUT
    )
    try:
        code = run_daemon(load().config)
    finally:
        trainer.wait(20)
    if end is not None:
        end()
    for folder in (runtime, arena):
        shutil.rmtree(folder, ignore_errors=True)
    return code or trainer.returncode


if __name__ == "__main__":
    sys.exit(main())
