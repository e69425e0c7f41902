"""The daemon is killed at every named point of a flush, and restarted: the snapshot becomes durable all the same, and
nothing torn is ever listed.
"""

from __future__ import annotations

import random
import signal
import time

import pytest
from snapd_proto import trainer_pb2

from snapd.core.ids import SnapshotId
from snapd.runtime.faultpoints import FLUSH_POINTS
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_scene import TierDaemon, capture_steps, intents, orphans, tier_daemon
from tests.support.waiting import wait_for

STATE = 6 << 16


def expected(trainer: FakeTrainer, step: int) -> list[bytes]:
    return trainer.chunks(step, 1, 6)


def opened(scene: TierDaemon) -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    return trainer


def wait_killed(scene: TierDaemon) -> None:
    process = scene.daemon.process
    assert process is not None
    wait_for(lambda: process.poll() is not None, "the daemon is killed")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", FLUSH_POINTS)
def test_a_kill_at_a_named_point(point: str) -> None:
    with tier_daemon() as scene:
        # a first snapshot goes well, so that the second builds on it
        scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}:2=kill")
        trainer = opened(scene)
        trainer.capture(2, 1)
        scene.wait_durable(2)
        trainer.capture(4, 1)
        wait_killed(scene)
        for chunks in scene.snapshots().values():
            assert len(chunks) == 1  # whatever is listed is whole: `snapshots` has read it
        assert SnapshotId(1, 2) in scene.snapshots()
        scene.daemon.start(SNAPD_FAULT_POINTS="")
        trainer.reconnect()
        scene.wait_durable(4)
        found = scene.snapshots()
        assert found[SnapshotId(1, 2)] == [expected(trainer, 2)]
        assert found[SnapshotId(1, 4)] == [expected(trainer, 4)]
        trainer.capture(6, 1)
        scene.wait_durable(6)
        assert scene.daemon.stop() == 0
        # what the killed daemon had written was used, or is named; nothing waits for a collector
        assert (intents(scene.store, "a"), orphans(scene.store, "a")) == ([], set())


def test_what_was_done_before_a_kill_is_not_done_again() -> None:
    with tier_daemon() as scene:
        scene.daemon.start(SNAPD_FAULT_POINTS="daemon.flush.commit.before=kill")
        trainer = opened(scene)
        trainer.capture(2, 1)
        wait_killed(scene)
        assert scene.snapshots() == {}
        packs = {info.key for info in scene.store.list("jobs/a/packs/")}
        assert packs
        scene.daemon.start(SNAPD_FAULT_POINTS="")
        trainer.reconnect()
        scene.wait_durable(2)
        assert {info.key for info in scene.store.list("jobs/a/packs/")} == packs
        assert scene.daemon.events("snapshot.durable")[-1]["shards_resumed"] == 1


def test_a_generation_that_comes_after_a_lost_machine_is_above_all_that_the_tier_has() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        with tier_daemon(scene.root) as other:
            other.daemon.start()
            second = opened(other)
            assert second.session.generation == 2
            capture_steps(second, 1, 2)
            other.wait_durable(2, generation=2)
            assert set(other.snapshots()) == {SnapshotId(1, 2), SnapshotId(2, 2)}
            assert other.daemon.job("a").flush.durable_generation == 2


def test_sigterm_makes_the_newest_snapshot_durable_within_the_grace_time() -> None:
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="1000") as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 3)
        assert scene.snapshots() == {}
        assert scene.daemon.stop() == 0
        assert scene.snapshots() == {SnapshotId(1, 3): [expected(trainer, 3)]}
        assert scene.daemon.events("levels.finished")[-1]["not_durable_jobs"] == []
        assert intents(scene.store, "a") == []


def test_a_terminal_that_is_closed_ends_the_daemon_as_sigterm_does() -> None:
    """And both together, as login managers send them, are no second signal that ends at once."""
    heeding = ("env", "--default-signal=HUP")  # the tests may run under nohup themselves
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="1000") as scene:
        process = scene.daemon.start(prefix=heeding)
        opened(scene).capture(3, 1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
        assert list(scene.snapshots()) == [SnapshotId(1, 3)]
        process = scene.daemon.start(prefix=heeding)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
        assert scene.daemon.events("daemon.stopping")[-1]["reason"] == "SIGHUP"


def test_a_daemon_that_is_told_to_ignore_hangups_does() -> None:
    with tier_daemon() as scene:
        process = scene.daemon.start(prefix=("nohup",))
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert scene.daemon.is_answering() and scene.daemon.stop() == 0


def test_waiting_for_durable_asks_for_it() -> None:
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="0") as scene:
        scene.daemon.start()
        trainer = opened(scene)
        capture_steps(trainer, 1, 3)
        request = trainer_pb2.WaitLevelRequest(
            session_id=trainer.session.session_id, step=3, level=trainer_pb2.LEVEL_DURABLE, timeout_s=20
        )
        reply = trainer.call("WaitLevel", request)
        assert reply.reached
        assert SnapshotId(1, 3) in scene.snapshots()


def test_a_machine_that_comes_back_begins_above_what_another_has_written_meanwhile() -> None:
    with tier_daemon() as scene:
        scene.daemon.start()
        first = opened(scene)
        capture_steps(first, 1, 2)
        scene.wait_durable(2)
        with tier_daemon(scene.root) as other:
            other.daemon.start()
            capture_steps(opened(other), 1, 4)
            other.wait_durable(4, generation=2)
        scene.daemon.restart()  # so that it has not looked just now
        again = scene.daemon.trainer()
        again.open(job="a", incarnation="two", state_bytes_estimate=STATE)
        assert again.session.generation == 3
        again.restore(1)
        capture_steps(again, 3, 4)
        scene.wait_durable(4, generation=3)
        assert {SnapshotId(2, 4), SnapshotId(3, 4)} <= set(scene.snapshots())


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_moment_never_tear_a_snapshot(seed: int) -> None:
    draw = random.Random(seed)
    with tier_daemon(SNAPD_TIER_EVERY_STEPS="1") as scene:
        scene.daemon.start()
        trainer = opened(scene)
        step, newest = 0, SnapshotId(0, 0)
        for _ in range(5):
            for _ in range(draw.randrange(1, 4)):
                step += 1
                trainer.capture(step, 1)
            time.sleep(draw.uniform(0.0, 0.2))  # into the flush of what was captured
            scene.daemon.kill()
            found = scene.snapshots()  # reads every byte of what is listed
            for snapshot, shards in found.items():
                assert shards == [expected(trainer, snapshot.step)]
            assert max(found, default=newest) >= newest, "what was durable stays"
            newest = max(found, default=newest)
            scene.daemon.start()
            trainer.reconnect()
        step += 1
        trainer.capture(step, 1)
        scene.wait_durable(step)
        assert scene.snapshots()[SnapshotId(1, step)] == [expected(trainer, step)]
        assert len(scene.daemon.events("daemon.started")) == 6
        assert scene.daemon.stop() == 0
        assert intents(scene.store, "a") == []
