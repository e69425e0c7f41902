"""A tier that is away, full, read-only or another's never reaches training: the level pauses with a named reason, and
catches up.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from snapd_proto import admin_pb2

from snapd.cli.ls import format_state
from snapd.cli.output import rendered
from snapd.cli.status import status_json, status_tables
from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_scene import ON_DEMAND, TierDaemon, capture_steps, orphans, tier_daemon, unfinished
from tests.support.waiting import wait_for

STATE = 6 << 16


def opened(scene: TierDaemon, *, job: str = "a", incarnation: str = "one") -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job=job, incarnation=incarnation, state_bytes_estimate=STATE)
    return trainer


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
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        capture_steps(trainer, 3, 6)
        scene.wait_pause("bucket")
        capture_steps(trainer, 7, 12)  # training goes on
        assert "missing" in scene.flush().reason
        aside.rename(scene.root)
        scene.wait_durable(11)
        assert max(scene.snapshots()) >= SnapshotId(1, 11)
        assert not scene.flush().pause
        assert [event["kind"] for event in scene.daemon.events("flush.paused")] == ["bucket"]
        assert len(scene.daemon.events("flush.goes_on")) == 1


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m") as disk, tier_daemon(disk / "tier", SNAPD_TIER_EVERY_STEPS="1") as scene:
        scene.daemon.start()
        trainer = opened(scene)
        step = 0
        while scene.flush().pause != "store_full":
            step += 1
            assert step < 40, "the disk was never full"
            trainer.capture(step, 1)
            wait_for(
                lambda at=step: scene.flush().pause or scene.flush().durable_step >= at, "durable, or a pause"
            )
        last_good = max(scene.snapshots())  # reads all of them
        capture_steps(trainer, step + 1, step + 4)  # training goes on
        remount(disk, "size=64m")
        scene.wait_durable(step + 4)
        assert max(scene.snapshots()) > last_good
        assert unfinished(scene.store) == []


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path, "64m") as disk, tier_daemon(disk / "tier") as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        remount(disk, "ro")
        capture_steps(trainer, 3, 4)
        scene.wait_pause("store_denied")
        capture_steps(trainer, 5, 8)
        remount(disk, "rw")
        scene.wait_durable(7)
        assert max(scene.snapshots()) >= SnapshotId(1, 7)


def test_a_tier_that_is_away_when_the_job_begins_and_turns_out_to_have_its_generation() -> None:
    with tier_daemon() as former:
        former.daemon.start()
        capture_steps(opened(former), 1, 2)
        former.wait_durable(2)
        former.daemon.close()
        aside = former.root.with_name("aside")
        former.root.rename(aside)
        former.root.mkdir()  # only so that the next scene has it; taken away at once
        with tier_daemon(former.root) as scene:
            former.root.rmdir()
            scene.daemon.start()
            trainer = opened(scene)
            assert trainer.session.generation == 1  # nobody could know
            capture_steps(trainer, 1, 2)
            scene.wait_pause("bucket")
            aside.rename(scene.root)
            scene.wait_pause("tier_generation")
            capture_steps(trainer, 3, 4)
            before = scene.snapshots()
            assert set(before) == {SnapshotId(1, 2)}  # of the former run, untouched
            again = opened(scene, incarnation="two")
            assert again.session.generation == 2
            again.restore(1)
            capture_steps(again, 5, 6)
            scene.wait_durable(6, generation=2)
            found = scene.snapshots()
            assert found[SnapshotId(1, 2)] == before[SnapshotId(1, 2)]
            assert found[SnapshotId(2, 6)] == [again.chunks(6, 1, 6)]


def test_two_jobs_flush_beside_one_another() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        one, other = opened(scene), opened(scene, job="b")
        for step in range(1, 7):
            one.capture(step, 1)
            other.capture(step, 2)
        scene.wait_durable(6)
        scene.wait_durable(6, "b")
        assert scene.snapshots("a")[SnapshotId(1, 6)] == [one.chunks(6, 1, 6)]
        assert scene.snapshots("b")[SnapshotId(1, 6)] == [other.chunks(6, 2, 6)]


def test_a_job_of_the_same_name_that_writes_the_same_snapshot_is_refused_and_both_are_named() -> None:
    with tier_daemon(**ON_DEMAND) as scene, tier_daemon() as other:
        scene.daemon.start()
        trainer = opened(scene)
        wait_for(lambda: scene.daemon.events("tier.learnt"), "the tier is known")
        other.daemon.start()
        stranger = opened(other)
        capture_steps(stranger, 1, 2, seed=9)
        other.wait_durable(2)
        keys = TierKeys("a")
        manifest = keys.shard(SnapshotId(1, 2), 0)
        target = scene.root / manifest
        target.parent.mkdir(parents=True)
        shutil.copy(other.root / manifest, target)
        capture_steps(trainer, 1, 2)
        scene.daemon.admin("Flush", scene.flush_request(2.0))
        scene.wait_pause("tier_conflict")
        reason = scene.flush().reason
        assert manifest in reason and "two jobs of one name" in reason
        assert scene.snapshots() == {}


def test_of_two_machines_with_one_job_s_name_the_one_that_began_later_goes_on_and_the_other_is_told() -> None:
    """Each snapshot of its own step: nothing meets at one key."""
    with tier_daemon() as scene:
        scene.daemon.start()
        former = opened(scene)
        capture_steps(former, 1, 2)
        scene.wait_durable(2)
        with tier_daemon(scene.root) as other:
            other.daemon.start()
            later = opened(other)
            assert (former.session.generation, later.session.generation) == (1, 2)
            capture_steps(later, 1, 4)
            other.wait_durable(4, generation=2)
            capture_steps(former, 3, 8)  # it trains on
            scene.wait_pause("tier_conflict")
            assert "2/4" in scene.flush().reason and "another machine" in scene.flush().reason
            capture_steps(later, 5, 6)
            other.wait_durable(6, generation=2)
            assert {each for each in scene.snapshots() if each.generation == 1} == {SnapshotId(1, 2)}
        again = opened(scene, incarnation="two")  # started anew, it is the later one
        assert again.session.generation == 3
        capture_steps(again, 1, 2)
        scene.wait_durable(2, generation=3)


def test_two_machines_that_begin_at_the_same_time() -> None:
    with tier_daemon() as scene, tier_daemon(scene.root) as other:
        scene.daemon.start()
        other.daemon.start()
        one, two = opened(scene), opened(other)
        assert one.session.generation == two.session.generation == 1
        capture_steps(one, 1, 2)
        scene.wait_durable(2)
        two.capture(4, 1)
        other.wait_pause("tier_conflict")
        capture_steps(one, 3, 6)
        scene.wait_durable(6)
        assert SnapshotId(1, 4) not in scene.snapshots() or scene.flush().durable_step == 6


def test_a_bad_byte_in_memory_never_reaches_the_tier() -> None:
    with tier_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        record = scene.record(2)
        place = record.chunks[3]
        segment = trainer.segments[place.segment]
        view = segment.view(place.frame * record.chunk_bytes, 1)
        view[0] ^= 1
        scene.daemon.admin("Flush", scene.flush_request(1.0))
        wait_for(lambda: scene.daemon.events("snapshot.unusable"), "the snapshot is found bad")
        assert scene.snapshots() == {}
        assert unfinished(scene.store) == []
        trainer.capture(3, 1)
        reply = scene.daemon.admin("Flush", scene.flush_request(20.0))
        assert (reply.is_durable, reply.step) == (True, 3)
        assert scene.snapshots() == {SnapshotId(1, 3): [trainer.chunks(3, 1, 6)]}


def test_only_what_changed_is_written_and_nothing_is_left_over() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 4)
        scene.wait_durable(4)
        events = scene.daemon.events("snapshot.durable")
        newest = events[-1]
        if len(events) > 1:  # the last chunk of a fake trainer is the same at every step
            assert newest["reused_nbytes"] >= 1 << 16
        assert orphans(scene.store, "a") == set()
        assert newest["requests"] > 0 and newest["requests_per_gb"] > 0
        told = status_json(scene.daemon.status())
        (job,) = told["jobs"]
        flush = job["flush"]
        assert flush["durable"] == {"generation": 1, "step": 4}
        assert (flush["pause"], flush["last"]["step"], flush["last"]["packs"]) == (None, 4, 1)
        assert sum(flush["last"]["requests"].values()) == newest["requests"]
        assert told["tier"]["url"] == str(scene.root) and told["tier"]["requests"]["put"] > 0
        shown = [(each.step, format_state(each)) for each in scene.daemon.snapshots("a")]
        assert (4, "durable") in shown
        text = "\n".join(map(rendered, status_tables(scene.daemon.status())))
        assert "step 4 (generation 1)" in text and str(scene.root) in text
        assert flush["reason"] == "the newest complete snapshot is durable"


def drained(scene: TierDaemon, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "snapd", "drain", *arguments]
    done = subprocess.run(command, env=scene.daemon.env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_drain_of_a_job_on_the_command_line() -> None:
    with tier_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        capture_steps(opened(scene), 1, 3)
        assert drained(scene, "--job", "a") == (0, "step 3 (generation 1) of a is durable\n")
        code, text = drained(scene, "--job", "a", "--json")
        assert code == 0 and json.loads(text)["is_durable"]
        assert drained(scene, "--job", "other")[0] == 1
        code, text = drained(scene)
        assert code == 2 and "--node" in text
        assert SnapshotId(1, 3) in scene.snapshots()


def test_drain_does_not_wait_for_what_waiting_cannot_mend() -> None:
    with tier_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 3)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        began_s = time.monotonic()
        code, text = drained(scene, "--job", "a")
        assert code == 4 and "step 3 (generation 1) of a does not become durable: paused: " in text, text
        assert str(scene.root) in text and time.monotonic() - began_s < 60  # it was ready to wait 600
        code, text = drained(scene, "--job", "a", "--json")
        told = json.loads(text)
        assert (code, told["is_durable"], told["is_refused"], told["pause"]) == (4, False, True, "bucket")
        reply = trainer.wait_durable(3, 60.0)
        assert reply.refused and not (reply.reached or reply.dropped)
        assert time.monotonic() - began_s < 60
        aside.rename(scene.root)  # after six failures the daemon's own next try is 16 s away
        began_s = time.monotonic()
        assert drained(scene, "--job", "a") == (0, "step 3 (generation 1) of a is durable\n")
        assert time.monotonic() - began_s < 14


def test_a_job_that_ends_leaves_memory_when_its_last_snapshot_is_durable() -> None:
    with tier_daemon(**ON_DEMAND) as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 3)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        trainer.close(final=True)
        trainer.disconnect()
        wait_for(lambda: scene.daemon.events("job.kept"), "the job is kept")
        assert [job.job for job in scene.daemon.status().jobs] == ["a"]
        aside.rename(scene.root)
        wait_for(lambda: not scene.daemon.status().jobs, "the job is released")
        assert scene.snapshots() == {SnapshotId(1, 3): [trainer.chunks(3, 1, 6)]}


def test_a_job_that_is_removed_while_its_tier_is_away_can_begin_again() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        capture_steps(trainer, 3, 4)
        scene.wait_pause("bucket")
        scene.daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a", force=True))
        assert not scene.daemon.status().jobs
        aside.rename(scene.root)
        again = opened(scene, incarnation="two")
        assert again.session.generation == 2, "above all that the tier has"
        capture_steps(again, 1, 2)
        scene.wait_durable(2, generation=2)
        assert SnapshotId(1, 2) in scene.snapshots()
        assert not scene.daemon.events("daemon.failed")
