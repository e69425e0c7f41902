"""The daemon is killed at every named point, and restarted; nothing that was captured is lost, nothing wrong
comes back.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

import grpc
import pytest

from snapd.runtime.faultpoints import MACHINE_POINTS
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer, Refused
from tests.support.waiting import wait_for

STATE = 6 << 16
T = TypeVar("T")
# the arrival at which the point strikes: late enough that there is something to lose
ARRIVALS = {
    "daemon.grant.before": 3,
    "daemon.grant.after": 3,
    "daemon.hash.before": 2,
    "daemon.hash.after": 2,
    "daemon.record.before": 2,
    "daemon.record.after": 2,
    "daemon.captured.after": 2,
    "daemon.lane_freed.after": 2,
    "daemon.complete.after": 2,
}


class Story:
    """A trainer that captures, is followed by a second one that restores and goes on, while the daemon may
    die once.
    """

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.deaths = 0
        self.newest_reported = 0

    def check(self) -> None:
        assert self.daemon.process is not None
        if self.daemon.process.poll() is not None:
            raise ConnectionError("the daemon is dead")

    def surviving(
        self, trainer: FakeTrainer, work: Callable[[], T], again: Callable[[], T] | None = None
    ) -> T:
        """Do `work`; if the daemon dies in it, restart the daemon, come back, and do it (or `again`) once
        more.
        """
        try:
            return work()
        except (grpc.RpcError, OSError) as error:
            assert self.daemon.process is not None
            code = wait_for(lambda: self.daemon.process.poll(), f"the daemon died, not only {error!r}")
            assert code == -signal.SIGKILL
        self.deaths += 1
        self.daemon.start(SNAPD_FAULT_POINTS="")
        if trainer.session.session_id:
            trainer.reconnect()
        else:
            trainer.shake_hands()
        return (again or work)()

    def trainer(self) -> FakeTrainer:
        trainer = self.daemon.trainer()
        trainer.check = self.check
        return trainer

    def open(self, trainer: FakeTrainer, incarnation: str) -> None:
        self.surviving(
            trainer, lambda: trainer.open(job="a", incarnation=incarnation, state_bytes_estimate=STATE)
        )

    def capture(self, trainer: FakeTrainer, step: int, seed: int) -> None:
        self.surviving(trainer, lambda: trainer.open_lane(step, seed))
        trainer.write(step, seed)
        assert trainer.commit()
        self.surviving(trainer, lambda: trainer.wait_captured(step))
        self.surviving(trainer, lambda: trainer.wait_complete(step))
        self.newest_reported = step

    def restore(self, trainer: FakeTrainer, seed: int) -> None:
        def once() -> int:
            return trainer.restore(seed)

        step = self.surviving(trainer, once)
        assert step == self.newest_reported


@pytest.mark.parametrize("point", MACHINE_POINTS)
def test_daemon_killed_at(point: str) -> None:
    with daemon_folders() as daemon:
        daemon.start(SNAPD_FAULT_POINTS=f"{point}:{ARRIVALS.get(point, 1)}=kill")
        story = Story(daemon)
        first = story.trainer()
        story.open(first, "one")
        for step in range(1, 4):
            story.capture(first, step, seed=1)
        second = story.trainer()
        story.open(second, "two")
        story.restore(second, seed=1)
        for step in range(4, 6):
            story.capture(second, step, seed=1)
        third = story.trainer()
        story.open(third, "three")
        story.restore(third, seed=1)
        assert story.deaths == 1, f"{point} was never reached"
        status = daemon.job("a")
        assert not status.problem
        assert (status.complete_step, len(daemon.snapshots("a"))) == (5, 1)
        assert daemon.stop() == 0


def test_a_daemon_killed_at_any_moment_of_a_busy_time_finds_every_snapshot_again() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainers = [daemon.trainer() for _ in range(2)]
        for rank, trainer in enumerate(trainers):
            trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        for step in range(1, 9):
            for trainer in trainers:
                trainer.open_lane(step)
                trainer.write(step)
                trainer.commit()
            if step % 2 == 0:
                daemon.restart()
                for trainer in trainers:
                    trainer.reconnect()
            for trainer in trainers:
                trainer.wait_complete(step)
        assert len(daemon.events("daemon.started")) == 5
        again = [daemon.trainer() for _ in range(2)]
        for rank, trainer in enumerate(again):
            trainer.open(job="a", rank=rank, world_size=2, incarnation="two", state_bytes_estimate=STATE)
        plans = [trainer.plan() for trainer in again]
        assert {plan.step for plan in plans} == {8}
        for trainer, plan in zip(again, plans, strict=True):
            assert trainer.read(plan.shards[0])[1] == []


def test_trainer_and_daemon_killed_together_lose_nothing_that_was_complete() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = daemon.trainer_process()
        trainer.do("open", job="a", state_bytes_estimate=STATE)
        trainer.do("capture", step=1)
        trainer.do("wait_complete", step=1)
        daemon.process.send_signal(signal.SIGSTOP)
        trainer.do("open_lane", step=2)
        trainer.do("write", step=2)
        trainer.do("commit")
        trainer.kill()
        daemon.restart()
        second = daemon.trainer()
        second.open(job="a", incarnation="two", state_bytes_estimate=STATE)
        assert second.restore() == 2
        assert daemon.job("a").arena_bytes == 2 * STATE


def test_a_stopped_daemon_takes_up_where_it_was() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=STATE)
        trainer.capture(1)
        daemon.process.send_signal(signal.SIGSTOP)
        trainer.capture(2, is_waiting=False)
        with pytest.raises(TimeoutError):
            trainer.wait_captured(2, timeout_s=0.3)
        daemon.process.send_signal(signal.SIGCONT)
        trainer.wait_complete(2)
        assert daemon.stop() == 0


def test_a_session_comes_back_with_its_secret_only() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=STATE)
        daemon.restart()
        secret = trainer.session.session_secret
        trainer.session.session_secret = b"x" * 16
        with pytest.raises(Refused) as refused:
            trainer.reconnect()
        assert refused.value.kind == "auth"
        trainer.session.session_secret = secret
        trainer.reconnect()
        trainer.capture(1)


def test_the_first_sigterm_ends_it_cleanly_and_the_arena_stays() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=STATE)
        trainer.capture(1)
        assert daemon.stop() == 0
        assert not (daemon.runtime / "snapd.sock").exists()
        daemon.start()
        trainer.reconnect()
        trainer.capture(2)
        assert daemon.stop() == 0
