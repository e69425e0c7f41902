"""Bytes that rot on the node's own disk while the daemon runs: found, told, never used again, and written again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys
from tests.support.disk_scene import ON_DEMAND, SEED, DiskDaemon, capture_kept, changed, disk_daemon, flip
from tests.support.waiting import wait_for

KEYS = TierKeys("a")
SCRUB = {"SNAPD_TIER_NODE_SCRUB": "0.4"}


def chunk_of(scene: DiskDaemon, step: int, index: int) -> StoredChunk:
    return scene.shards()[SnapshotId(1, step)][0].chunks[index]


def rot(scene: DiskDaemon, chunk: StoredChunk) -> None:
    changed(scene.root / KEYS.pack(chunk.pack), flip(chunk.offset + 11))


@contextmanager
def bad_sectors(path: Path) -> Iterator[None]:
    """Every read of the file is answered with EIO: another one lies over it, that of a process's memory, from 0 on."""
    if subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", path], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with path.open("rb") as file, pytest.raises(OSError, match="Input/output error"):
            file.read(64)
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def wait_event(scene: DiskDaemon, event: str) -> dict[str, object]:
    wait_for(lambda: scene.daemon.events(event), event)
    found: dict[str, object] = scene.daemon.events(event)[0]
    return found


def test_a_frozen_chunk_that_rots_is_named_and_all_that_share_it_are_mended() -> None:
    with disk_daemon(**SCRUB) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 3)
        frozen = chunk_of(scene, 2, 5)
        assert frozen == chunk_of(scene, 3, 5)  # a byte that would be named by every snapshot to come
        rot(scene, frozen)
        told = wait_event(scene, "disk.rotten")
        assert (told["job"], told["object"], told["chunks"]) == ("a", KEYS.pack(frozen.pack), 1)
        assert told["snapshots"] == ["1/2", "1/3"]
        assert str(frozen.offset) in str(told["reason"])
        assert wait_event(scene, "disk.mended")["left"] == 0
        assert frozen not in (chunk_of(scene, 2, 5), chunk_of(scene, 3, 5))
        wait_for(lambda: not scene.disk().bad_count, "nothing is bad any more")
        capture_kept(scene, trainer, 4, 5)
        assert frozen != chunk_of(scene, 5, 5)
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("two").restore(SEED) == 5  # compares every byte


def test_what_memory_lacks_is_named_in_the_status_and_the_newest_takes_its_place() -> None:
    with disk_daemon(**SCRUB, **ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        assert trainer.wait_durable(1).reached
        for step in range(2, 7):  # memory lets go of step 1
            trainer.capture(step, SEED)
        wait_for(lambda: 1 not in [s.step for s in scene.daemon.snapshots("a")], "step 1 has left memory")
        rot(scene, chunk_of(scene, 1, 3))
        lost = wait_event(scene, "disk.behind_again")
        assert (lost["lost"], lost["whole"]) == ("1/1", "none")
        scene.wait_kept(6)  # although nobody asked for it
        wait_for(lambda: scene.steps() == [6], "what was bad is gone")
        assert not scene.disk().bad_count
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("two").restore(SEED) == 6


def test_what_cannot_be_mended_stays_in_sight() -> None:
    with disk_daemon(**SCRUB) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.close(final=True)
        wait_for(lambda: not scene.daemon.status().jobs, "memory is free")
        chunk = chunk_of(scene, 2, 5)
        rot(scene, chunk)
        wait_event(scene, "disk.rotten")
        assert scene.daemon.status().disk.scrub.bad_count == 1


def test_a_place_that_the_disk_cannot_read_is_found_and_what_lay_there_is_written_again() -> None:
    with disk_daemon(**SCRUB, **ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        assert trainer.wait_durable(1).reached
        bad = chunk_of(scene, 1, 5)
        with bad_sectors(scene.root / KEYS.pack(bad.pack)):
            assert "Input/output error" in str(wait_event(scene, "disk.rotten")["reason"])
            assert wait_event(scene, "disk.mended")["left"] == 0
        assert bad.pack not in scene.named_packs()
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("two").restore(SEED) == 1


@pytest.mark.parametrize("what", ["pack", "manifest"])
def test_a_snapshot_that_the_disk_cannot_read_is_given_up_for_an_older_one_at_a_restore(what: str) -> None:
    """A bad sector answers for ever that it cannot be read: nobody waits for it as for a disk that is away."""
    with disk_daemon(SNAPD_TIER_NODE_SCRUB="0") as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 3)
        trainer.disconnect()
        others = {chunk.pack for chunk in scene.shards()[SnapshotId(1, 2)][0].chunks}
        own = next(c.pack for c in scene.shards()[SnapshotId(1, 3)][0].chunks if c.pack not in others)
        key = KEYS.pack(own) if what == "pack" else KEYS.shard(SnapshotId(1, 3), 0)
        scene.daemon.kill()
        with bad_sectors(scene.root / key):
            scene.reboot()
            plan = scene.trainer("two").plan()
            assert plan.step == 2
            newer = next(candidate for candidate in plan.candidates if candidate.step == 3)
            assert newer.verdict == "unusable"
            assert "Input/output error" in newer.reason
            assert key.rpartition("/")[2] in newer.reason
            assert "Input/output error" in scene.disk().bad_reason


def test_a_pack_that_somebody_deleted_is_written_again() -> None:
    with disk_daemon(**SCRUB) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        pack = chunk_of(scene, 2, 5).pack
        (scene.root / KEYS.pack(pack)).unlink()
        wait_event(scene, "disk.rotten")
        wait_event(scene, "disk.mended")
        assert pack not in {chunk.pack for chunk in scene.shards()[SnapshotId(1, 2)][0].chunks}
        assert "is not there" in scene.disk().bad_reason  # step 1 had chunks of its own in it
        capture_kept(scene, trainer, 3, 4)
        wait_for(lambda: not scene.disk().bad_count, "step 1 is gone")
        assert scene.named_packs() == scene.packs()
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("two").restore(SEED) == 4


def test_a_manifest_that_rots_is_written_again() -> None:
    with disk_daemon(**SCRUB) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        key = KEYS.shard(SnapshotId(1, 2), 0)
        changed(scene.root / key, flip(80))
        assert key in str(wait_event(scene, "disk.manifest_mended")["reason"])
        assert scene.steps() == [1, 2]  # reads every manifest
        trainer.disconnect()


def test_the_disk_comes_back_with_a_bad_chunk_and_later_snapshots_do_not_use_it() -> None:
    """What a restore from the disk proved bad is not built upon, also without any scrub."""
    with disk_daemon(SNAPD_TIER_NODE_SCRUB="0") as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.disconnect()
        frozen = chunk_of(scene, 2, 5)
        rot(scene, frozen)
        scene.reboot()
        again = scene.trainer("two")
        again.capture(3, SEED)
        scene.wait_kept(3, generation=2)
        shards = scene.shards()[SnapshotId(2, 3)]
        assert frozen not in shards[0].chunks
        again.disconnect()
        scene.reboot()
        assert scene.trainer("three").restore(SEED) == 3


def test_the_whole_disk_is_read_and_that_is_told() -> None:
    with disk_daemon(**SCRUB, **ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        assert trainer.wait_durable(1).reached
        told = wait_event(scene, "disk.scrubbed")
        assert (told["rotten"], told["nbytes"]) == (
            0,
            sum(c.nbytes for c in scene.shards()[SnapshotId(1, 1)][0].chunks),
        )
        scrub = scene.daemon.status().disk.scrub
        assert scrub.has_oldest
        assert scrub.fresh_nbytes == scrub.nbytes > 0
        assert (scrub.period_s, scrub.bad_count) == (0.4, 0)
