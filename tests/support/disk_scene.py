"""A daemon with a disk of its own (a folder), memory that is lost as by a reboot, and what the disk then has."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.tier.manifests import decode_shard
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer
from tests.support.waiting import wait_for

STATE = 6 << 16
SEED = 1
# as often and as fast as it goes
OFTEN = {"SNAPD_TIER_NODE_EVERY": "0.05", "SNAPD_TIER_NODE_RATE": "0"}
ON_DEMAND = {"SNAPD_TIER_NODE_EVERY": "0", "SNAPD_TIER_NODE_RATE": "0"}


class DiskDaemon:
    """The daemon is not started yet."""

    def __init__(self, daemon: DaemonProcess, root: Path) -> None:
        self.daemon, self.root = daemon, root

    def trainer(self, incarnation: str = "one", *, job: str = "a", **more: Any) -> FakeTrainer:
        trainer = self.daemon.trainer()
        trainer.open(job=job, incarnation=incarnation, state_bytes_estimate=STATE, **more)
        return trainer

    def disk(self, job: str = "a") -> Any:
        """The job's status on the disk."""
        return self.daemon.job(job).disk

    def wait_kept(self, step: int, job: str = "a", *, generation: int = 1, timeout_s: float = 20.0) -> None:
        def is_kept() -> bool:
            disk = self.disk(job)
            newest = (disk.durable_generation, disk.durable_step)
            return bool(disk.has_durable and newest >= (generation, step))

        wait_for(is_kept, f"step {step} is on the disk", timeout_s)

    def wait_pause(self, kind: str, job: str = "a") -> None:
        wait_for(lambda: self.disk(job).pause == kind, f"a pause for {kind}: {self.disk(job)}")

    def reboot(self, *, is_waiting: bool = True, **settings: str) -> None:
        """The machine loses its memory: daemon, arena and index, sockets. What is on the disk stays."""
        if self.daemon.process is not None and self.daemon.process.poll() is None:
            self.daemon.kill()
        shutil.rmtree(self.daemon.arena)
        shutil.rmtree(self.daemon.runtime, ignore_errors=True)
        self.daemon.log_file.write_text("")
        self.daemon.start(is_waiting=is_waiting, **settings)

    def shards(self, job: str = "a") -> dict[SnapshotId, dict[int, StoredShard]]:
        """Every manifest that lies there; raises what is wrong with any of them."""
        found: dict[SnapshotId, dict[int, StoredShard]] = {}
        keys = TierKeys(job)
        for path in sorted((self.root / keys.shards).rglob("*.shard")):
            key = str(path.relative_to(self.root))
            shard = decode_shard(path.read_bytes(), key=key, job=job)
            found.setdefault(shard.id, {})[shard.rank] = shard
        return found

    def steps(self, job: str = "a") -> list[int]:
        return [snapshot.step for snapshot in sorted(self.shards(job))]

    def packs(self, job: str = "a") -> set[str]:
        return {path.stem for path in (self.root / TierKeys(job).packs).glob("*.pack")}

    def named_packs(self, job: str = "a") -> set[str]:
        return {
            pack for shards in self.shards(job).values() for shard in shards.values() for pack in shard.packs
        }


@contextmanager
def disk_daemon(root: Path | None = None, **settings: str) -> Iterator[DiskDaemon]:
    """`root`: the folder of the disk; else one of its own."""
    own = Path(tempfile.mkdtemp(prefix="snapd-test-disk-"))
    root = root or own / "disk"
    root.mkdir(exist_ok=True)
    try:
        with daemon_folders(SNAPD_TIER_NODE=str(root), **{**OFTEN, **settings}) as daemon:
            yield DiskDaemon(daemon, root)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def capture_kept(scene: DiskDaemon, trainer: FakeTrainer, first: int, last: int, generation: int = 1) -> None:
    """Each step is on the disk before the next one begins."""
    for step in range(first, last + 1):
        trainer.capture(step, SEED)
        scene.wait_kept(step, generation=generation)


def changed(path: Path, change: Callable[[bytearray], bytes]) -> None:
    path.chmod(0o600)
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(offset: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        data[offset] ^= 0x10
        return bytes(data)

    return change
