"""The daemon collects the garbage of a tier in the background, and is killed at every named point of it."""

from __future__ import annotations

import signal

import pytest

from snapd.core.ids import SnapshotId
from snapd.runtime.faultpoints import COLLECT_POINTS
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_scene import TierDaemon, tier_daemon
from tests.support.tier_audit import audit, unnamed
from tests.support.waiting import wait_for

STATE = 6 << 16
QUICK = {
    "SNAPD_TIER_KEEP_LAST": "2",
    "SNAPD_TIER_GC_EVERY": "1s",
    "SNAPD_TIER_INTENT_TTL": "4s",
    "SNAPD_TIER_EVERY_STEPS": "1",
}


def opened(scene: TierDaemon) -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    return trainer


def capture_durably(scene: TierDaemon, trainer: FakeTrainer, step: int) -> None:
    trainer.capture(step, 1)
    scene.wait_durable(step)


def steps_of(scene: TierDaemon) -> set[int]:
    return {snapshot.step for snapshot in audit(scene.store, "a")}


def test_old_snapshots_go_by_themselves() -> None:
    with tier_daemon(**QUICK) as scene:
        scene.daemon.start()
        trainer = opened(scene)
        for step in range(1, 6):
            capture_durably(scene, trainer, step)
        wait_for(lambda: steps_of(scene) == {4, 5}, "old snapshots are gone", 30)
        wait_for(lambda: not unnamed(scene.store, "a"), "nothing unnamed is left", 60)
        passes = scene.daemon.events("gc.pass")
        assert sum(each["deleted"] for each in passes) >= 9 and all(each["requests"] for each in passes)
        assert audit(scene.store, "a")[SnapshotId(1, 5)] == [trainer.chunks(5, 1, 6)]
        assert scene.daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("point", COLLECT_POINTS)
def test_a_kill_at_a_named_point(point: str) -> None:
    with tier_daemon(**QUICK) as scene:
        scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}=kill")
        process = scene.daemon.process
        assert process is not None
        trainer = opened(scene)
        for step in range(1, 40):
            if process.poll() is not None:
                break
            try:
                trainer.capture(step, 1)
                wait_for(lambda: process.poll() is not None, "the daemon is killed", 1.0)
            except (TimeoutError, RuntimeError, OSError):
                continue
        process.wait(10)
        assert process.returncode == -signal.SIGKILL
        before = steps_of(scene)  # whatever is offered is whole: `audit` has read it
        scene.daemon.start(SNAPD_FAULT_POINTS="")
        trainer = scene.daemon.trainer()
        trainer.open(job="a", incarnation="two", state_bytes_estimate=STATE)
        for step in (100, 101):
            trainer.capture(step, 1)
            scene.wait_durable(step, generation=2)
        wait_for(lambda: steps_of(scene) == {100, 101}, "old snapshots are gone", 60)
        wait_for(lambda: not unnamed(scene.store, "a"), "nothing unnamed is left", 90)
        assert before


def test_a_store_that_is_away_is_told_and_collecting_goes_on() -> None:
    with tier_daemon(**QUICK) as scene:
        scene.daemon.start()
        trainer = opened(scene)
        for step in (1, 2, 3):
            capture_durably(scene, trainer, step)
        away = scene.root.with_name("away")
        scene.root.rename(away)
        wait_for(lambda: scene.daemon.events("gc.paused"), "collecting says why it does not go on", 30)
        trainer.capture(4, 1)  # training does not wait
        away.rename(scene.root)
        wait_for(lambda: scene.daemon.events("gc.goes_on"), "it goes on", 90)
        scene.wait_durable(4, timeout_s=60)
        wait_for(lambda: steps_of(scene) == {3, 4}, "old snapshots are gone", 60)
