"""Odd places and moments around a tier: names, mounts, links, clocks, limits, what strangers leave there. Training goes
on, what one sees is one line that says what and where, and nothing torn or wrong is ever offered.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.core.tier_keys import TierKeys
from snapd.errors import CapacityError, UnavailableError
from snapd.store.faulty import Effect, Fault, FaultyStore
from snapd.tier.collecting import Collector
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_parts import Writers, contents_of, flush, shard
from tests.support.flush_scene import TierDaemon, capture_steps, intents, orphans, read_tier, tier_daemon
from tests.support.stores import directory_store
from tests.support.tier_audit import audit
from tests.support.waiting import wait_for

STATE = 6 << 16
KEYS = TierKeys("a")
QUICK = CollectRules(keep=KeepRules(last=1), round_s=0.2, intent_ttl_s=1.0, void_ttl_s=60.0)


def opened(scene: TierDaemon, job: str = "a", incarnation: str = "one") -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job=job, incarnation=incarnation, state_bytes_estimate=STATE)
    return trainer


def snapd(scene: TierDaemon, *arguments: str, **settings: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "snapd", *arguments]
    env = {**scene.daemon.env, **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


# names


@pytest.mark.parametrize("name", ["with space", "über-größe", "end/", "a//b", "d.o.t.s", "100%", "new\nline"])
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    text = f"{tmp_path}/{name}"
    with tier_daemon(tmp_path / name) as scene:
        scene.daemon.env["SNAPD_TIER_SHARED"] = text
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        assert scene.snapshots() == {SnapshotId(1, 2): [trainer.chunks(2, 1, 6)]}
        code, text = snapd(scene, "verify", "a", "--deep", "--from", text)
        assert code == 0, text


def test_the_longest_name_of_a_job_and_two_that_differ_in_case_only() -> None:
    longest = "J" * 128
    with tier_daemon() as scene:
        scene.daemon.start()
        trainers = {job: opened(scene, job) for job in (longest, longest.lower(), "a", "A")}
        for job, trainer in trainers.items():
            trainer.capture(1, ord(job[0]))
            trainer.capture(2, ord(job[0]))
        for job, trainer in trainers.items():
            scene.wait_durable(2, job)
            assert scene.snapshots(job) == {SnapshotId(1, 2): [trainer.chunks(2, ord(job[0]), 6)]}
        code, text = snapd(scene, "verify", longest, "--deep", "--from", str(scene.root))
        assert code == 0 and longest in text, text


# places that change under the daemon


def test_a_link_that_is_turned_to_another_folder(tmp_path: Path) -> None:
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "link"
    one.mkdir(), other.mkdir()
    link.symlink_to(one)
    with tier_daemon(one) as scene:
        scene.daemon.env["SNAPD_TIER_SHARED"] = str(link)
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        link.unlink()
        link.symlink_to(other)
        capture_steps(trainer, 3, 6)
        scene.wait_pause("bucket")
        assert "is not the one that it was" in scene.flush().reason and str(link) in scene.flush().reason
        assert list(other.iterdir()) == []
        link.unlink()
        link.symlink_to(one)
        scene.wait_durable(5)
        assert max(scene.snapshots()) >= SnapshotId(1, 5)


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_unmounted_under_the_daemon_and_another_in_its_place(tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    with tier_daemon(place) as scene:
        with mounted(place):
            scene.daemon.start()
            trainer = opened(scene)
            capture_steps(trainer, 1, 2)
            scene.wait_durable(2)
        capture_steps(trainer, 3, 6)
        scene.wait_pause("bucket")
        assert list(place.iterdir()) == [], "nothing is written below an empty mount point"
        with mounted(place):
            capture_steps(trainer, 7, 8)
            assert scene.flush().pause == "bucket" and list(place.iterdir()) == []
        assert [event["kind"] for event in scene.daemon.events("flush.paused")] == ["bucket"]


@pytest.mark.parametrize("what", ["removed", "a file"])
def test_the_folder_for_temporary_files(what: str) -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        shutil.rmtree(scene.root / ".tmp")
        if what == "removed":
            capture_steps(trainer, 3, 4)
            scene.wait_durable(4)
            return
        (scene.root / ".tmp").write_text("mine")
        capture_steps(trainer, 3, 4)
        wait_for(lambda: scene.flush().pause, "a pause")
        assert str(scene.root / ".tmp") in scene.flush().reason, scene.flush().reason
        (scene.root / ".tmp").unlink()
        scene.wait_durable(4)


def test_a_mark_that_was_removed() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        (scene.root / ".snapd-tier").unlink()
        capture_steps(trainer, 3, 4)
        scene.wait_pause("bucket")
        assert str(scene.root) in scene.flush().reason
        scene.daemon.restart()
        trainer.reconnect()
        scene.wait_durable(4)


# limits


def test_few_descriptors() -> None:
    with tier_daemon() as scene:
        scene.daemon.start(prefix=("prlimit", "--nofile=64"))
        trainers = [opened(scene, f"job-{number}") for number in range(6)]
        for step in range(1, 5):
            for trainer in trainers:
                trainer.capture(step, 1)
        for number in range(6):
            scene.wait_durable(4, f"job-{number}")
        assert not scene.daemon.events("flush.paused")


@pytest.mark.parametrize(
    "call,prefix", [("create", "jobs/a/snapshots"), ("create", "jobs/a/shards"), ("put", "jobs/a/intents")]
)
def test_a_disk_that_is_full_at_one_file(tmp_path: Path, call: str, prefix: str) -> None:
    store = directory_store(tmp_path / "tier")
    faulty = FaultyStore(store, [Fault(call, Effect.FILL, prefix=prefix)])
    writers = Writers()
    writer = writers.make(faulty)
    with pytest.raises(CapacityError) as error:
        flush(writer, [shard(contents_of(1))])
    assert error.value.kind == "store_full" and prefix in error.value.message
    assert read_tier(store, "a") == {}
    flush(writer, [shard(contents_of(1))])
    assert list(read_tier(store, "a")) == [SnapshotId(1, 1)]
    assert intents(store, "a") == [] and orphans(store, "a") == set()
    writers.close()


# clocks


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_that_jumps_in_mid_flush(tmp_path: Path, jump_s: float) -> None:
    """All that is there becomes so much older, or younger, than what is written next; a collector is at work."""
    root = tmp_path / "tier"
    store = directory_store(root)
    writers = Writers()
    for step in (1, 2):
        flush(writers.make(store), [shard(contents_of(step), step=step)])

    def jump() -> None:
        for path in root.rglob("*"):
            if path.is_file():
                at_s = path.stat().st_mtime - jump_s
                os.utime(path, (at_s, at_s))
        for _ in range(3):
            Collector(store, "a", QUICK, write_id="c" * 32).run()

    writers.at["daemon.flush.manifest.before"] = jump
    writer = writers.make(store, ttl_s=QUICK.intent_ttl_s, round_s=1000.0)
    built = [shard(contents_of(3), step=3)]
    try:
        flush(writer, built)
    except UnavailableError as error:
        assert error.kind == "tier_condemned" and jump_s > 0
        flush(writer, built)
    writers.close()
    assert "daemon.flush.manifest.before" not in writers.at, "the clock jumped"
    newest = audit(store, "a")[SnapshotId(1, 3)]
    assert newest == [[bytes(frame) for frame in built[0].memory.frames]]  # type: ignore[attr-defined]


# what strangers leave


def test_files_of_strangers_in_the_tier() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        for folder in ("packs", "shards", "snapshots", "intents", "condemned", "pins"):
            path = scene.root / "jobs" / "a" / folder
            path.mkdir(exist_ok=True)
            (path / ".DS_Store").write_bytes(b"x")
            (path / "Thumbs.db").write_bytes(b"x")
            (path / "README.md").write_text("keep out")
            (path / "with space").write_text("x")
            (path / "deeper").mkdir()
            (path / "deeper" / "x").write_text("x")
        (scene.root / "jobs" / "README").write_text("x")
        (scene.root / "jobs" / ".hidden").mkdir()
        capture_steps(trainer, 3, 4)
        wait_for(lambda: scene.flush().durable_step == 4 or scene.flush().pause, "durable")
        assert not scene.flush().pause, scene.flush().reason
        code, text = snapd(scene, "ls", "--from", str(scene.root))
        assert code == 0 and "a" in text, text
        code, text = snapd(scene, "gc", "--from", str(scene.root), "--dry-run")
        assert code == 0, text
        code, text = snapd(scene, "verify", "a", "--deep", "--from", str(scene.root))
        assert code == 0, text
        assert (scene.root / "jobs" / "a" / "packs" / "README.md").exists()


def test_a_commit_record_of_a_gigabyte_is_not_read() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        key = KEYS.snapshot(SnapshotId(1, 99), 0)
        with (scene.root / key).open("wb") as file:
            file.truncate(1 << 30)
        capture_steps(trainer, 3, 4)
        scene.wait_durable(4)
        code, text = snapd(scene, "verify", "a", "--from", str(scene.root))
        assert code == 3 and key in text, text
