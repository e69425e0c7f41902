"""The node's own disk: kept up with the newest snapshots, through kills at every point, full, read-only and unmounted
disks; whose folder it is; and what becomes of it when a job ends.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from snapd_proto import admin_pb2, trainer_pb2

from snapd.core.ids import SnapshotId
from snapd.runtime.faultpoints import DISK_POINTS
from tests.support.daemon_process import daemon_folders
from tests.support.disk_scene import ON_DEMAND, SEED, DiskDaemon, capture_kept, disk_daemon
from tests.support.flush_scene import BY_STEPS
from tests.support.waiting import wait_for


def wait_killed(scene: DiskDaemon) -> None:
    process = scene.daemon.process
    assert process is not None
    wait_for(lambda: process.poll() is not None, "the daemon is killed")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", DISK_POINTS)
def test_a_kill_at_a_named_point_and_the_memory_is_lost(point: str) -> None:
    with disk_daemon() as scene:
        scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}:2=kill")
        trainer = scene.trainer()
        step = 0
        while scene.daemon.process is not None and scene.daemon.process.poll() is None:
            step += 1
            assert step < 20, f"{point} was never reached"
            try:
                trainer.capture(step, SEED)
                wait_for(
                    lambda at=step: scene.daemon.process.poll() is not None or at in scene.steps(),  # type: ignore[union-attr,misc]
                    f"step {step} is on the disk, or the daemon is dead",
                )
                wait_for(
                    lambda at=step: (
                        scene.daemon.process.poll() is not None  # type: ignore[union-attr,misc]
                        or (
                            scene.daemon.events("disk.kept")
                            and scene.daemon.events("disk.kept")[-1]["step"] >= at
                        )
                    ),
                    "the disk is tidy, or the daemon is dead",
                )
            except (OSError, RuntimeError, EOFError):
                break
        wait_killed(scene)
        trainer.disconnect()
        there = scene.steps()  # reads every manifest
        scene.reboot(SNAPD_FAULT_POINTS="")
        again = scene.trainer("two")
        assert again.restore(SEED) == (max(there) if there else -1)
        capture_kept(scene, again, 21, 22, generation=2)
        assert scene.steps() == [21, 22]
        assert scene.named_packs() == scene.packs()  # nothing of the killed attempt is left
        assert not list((scene.root / ".tmp").iterdir())


def test_a_kill_and_memory_lives() -> None:
    with disk_daemon() as scene:
        scene.daemon.start(SNAPD_FAULT_POINTS="daemon.disk.manifest.before:3=kill")
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.capture(3, SEED)
        wait_killed(scene)
        scene.daemon.start(SNAPD_FAULT_POINTS="")
        trainer.reconnect()
        scene.wait_kept(3)
        assert scene.steps() == [2, 3]
        assert scene.named_packs() == scene.packs()


def test_the_newest_two_stay_and_equal_chunks_are_written_once() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 5)
        assert scene.steps() == [4, 5]
        assert scene.named_packs() == scene.packs()
        last = scene.disk().last
        assert (last.step, last.reused_nbytes > 0) == (5, True)


def test_waiting_for_durable_means_the_disk_and_says_so() -> None:
    with disk_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        assert not scene.disk().has_durable
        reply = trainer.wait_durable(1)
        assert (reply.reached, reply.level, reply.tier) == (True, trainer_pb2.LEVEL_DURABLE, "node")
        last = trainer_pb2.LastRequest(session_id=trainer.session.session_id, level=trainer_pb2.LEVEL_DURABLE)
        answer = trainer.call("Last", last)
        assert (answer.step, answer.tier) == (1, "node")
        assert scene.steps() == [1]


def test_drain_and_sigterm_bring_the_newest_to_the_disk() -> None:
    with disk_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        reply = scene.daemon.admin("Flush", admin_pb2.FlushRequest(job="a", timeout_s=20))
        assert (reply.is_durable, reply.step) == (True, 1)
        trainer.capture(2, SEED)
        assert scene.steps() == [1]
        assert scene.daemon.stop() == 0
        assert scene.steps() == [1, 2]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_folder_that_goes_away_and_comes_back() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        trainer.capture(3, SEED)
        scene.wait_pause("bucket")
        scene.root.mkdir()  # another folder in its place is no better
        for step in range(4, 8):  # training goes on
            trainer.capture(step, SEED)
        assert scene.disk().pause == "bucket"
        scene.root.rmdir()
        aside.rename(scene.root)
        scene.wait_kept(7)
        assert not scene.disk().pause
        assert len(scene.daemon.events("disk.paused")) == 1
        assert len(scene.daemon.events("disk.goes_on")) == 1


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m") as disk, disk_daemon(disk / "d", SNAPD_TIER_NODE_KEEP="8") as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        step = 0
        while scene.disk().pause != "store_full":
            step += 1
            assert step < 40, "the disk was never full"
            trainer.capture(step, SEED)
            wait_for(
                lambda at=step: scene.disk().pause or scene.disk().durable_step >= at, "kept, or a pause"
            )
        for more in range(step + 1, step + 4):  # training goes on
            trainer.capture(more, SEED)
        remount(disk, "size=64m")
        scene.wait_kept(step + 3)
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("two").restore(SEED) == step + 3


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path, "64m") as disk, disk_daemon(disk / "d") as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        remount(disk, "ro")
        trainer.capture(3, SEED)
        scene.wait_pause("store_denied")
        trainer.capture(4, SEED)
        remount(disk, "rw")
        scene.wait_kept(4)


def refused(scene: DiskDaemon) -> str:
    """What a daemon that does not start says."""
    process = scene.daemon.start(is_waiting=False)
    assert process.wait(20) == 2
    return scene.daemon.log_file.read_text()


def test_a_second_daemon_is_refused() -> None:
    with disk_daemon() as scene, disk_daemon(scene.root) as second:
        scene.daemon.start()
        said = refused(second)
        assert str(scene.root) in said
        assert f"pid {scene.daemon.process.pid}" in said  # type: ignore[union-attr]
        assert "SNAPD_TIER_NODE" in said
        scene.daemon.kill()
        second.daemon.start()  # a lock dies with its daemon


def test_a_shared_tier_and_a_nodes_disk_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    both = {"SNAPD_TIER_SHARED": str(tmp_path / "one"), **BY_STEPS}
    with disk_daemon(tmp_path / "one", **both) as scene:
        assert "tier.node" in refused(scene)
    with daemon_folders(**both) as shared:
        shared.start()
        trainer = shared.trainer()
        trainer.open(job="a", state_bytes_estimate=6 << 16)
        trainer.capture(2, SEED)
        wait_for(lambda: shared.job("a").flush.has_durable, "it is used as a shared tier")
        trainer.disconnect()
    with disk_daemon(tmp_path / "one") as scene:
        assert "shared tier" in refused(scene)
    with disk_daemon() as scene:
        scene.daemon.start()
        with daemon_folders(SNAPD_TIER_SHARED=str(scene.root), **BY_STEPS) as shared:
            shared.start()
            trainer = shared.trainer()
            trainer.open(job="a", state_bytes_estimate=6 << 16)
            wait_for(lambda: shared.job("a").flush.pause == "disk_shared", "it is refused")
            trainer.disconnect()


def test_a_removed_job_leaves_nothing_on_the_disk() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.disconnect()
        scene.daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a", force=True))
        assert not list((scene.root / "jobs").rglob("*.*"))
        scene.reboot()
        assert not scene.daemon.status().jobs
        again = scene.trainer("two")
        assert again.restore(SEED) == -1  # there is none
        capture_kept(scene, again, 1, 1)


def test_a_job_that_ended_stays_on_the_disk_and_out_of_memory() -> None:
    with disk_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        trainer.capture(3, SEED)
        trainer.close(final=True)
        wait_for(lambda: not scene.daemon.status().jobs, "memory is free")
        wait_for(lambda: (scene.root / "jobs/a/ended").exists(), "it is noted")
        assert scene.steps() == [3]
        scene.reboot()
        assert not scene.daemon.status().jobs
        again = scene.trainer("two")
        assert again.session.generation == 2
        assert again.restore(SEED) == 3  # who asks for it has it
        again.capture(4, SEED)
        assert scene.daemon.stop() == 0
        assert not (scene.root / "jobs/a/ended").exists()
        scene.reboot()
        wait_for(lambda: scene.daemon.status().jobs, "it goes on, so it is brought")


def test_a_generation_that_left_no_snapshot_is_not_given_out_again() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 1)
        trainer.disconnect()
        second = scene.trainer("two")
        assert second.session.generation == 2
        wait_for(lambda: (scene.root / "jobs/a/generation").read_text().strip() == "2", "it is noted")
        second.disconnect()
        scene.reboot()
        third = scene.trainer("three")
        assert third.session.generation == 3
        assert SnapshotId(third.session.newest_generation, third.session.newest_step) == SnapshotId(1, 1)


def test_a_job_that_is_removed_while_the_disk_is_away_goes_when_it_is_back() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.disconnect()
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        reply = scene.daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a", force=True))
        assert str(scene.root) in reply.disk_waits
        assert len(scene.daemon.events("disk.not_tidied")) == 1
        aside.rename(scene.root)
        wait_for(lambda: not (scene.root / "jobs" / "a").exists(), "all of it is gone from the disk")
        assert len(scene.daemon.events("disk.not_tidied")) == 1


def test_removing_what_only_a_disk_that_was_never_seen_may_have_ends_with_one_line() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        trainer = scene.trainer()
        capture_kept(scene, trainer, 1, 2)
        trainer.disconnect()
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        scene.reboot()
        request = admin_pb2.RemoveJobRequest(job="a", force=True)
        with pytest.raises(grpc.RpcError) as caught:
            scene.daemon.admin("RemoveJob", request)
        assert f"may have job 'a', and cannot be asked: the folder {scene.root} is missing" in str(
            caught.value
        )
        aside.rename(scene.root)
        wait_for(lambda: scene.daemon.status().jobs, "the disk was found")
        assert scene.daemon.admin("RemoveJob", request).disk_waits == ""
        assert not list((scene.root / "jobs").rglob("*.*"))
