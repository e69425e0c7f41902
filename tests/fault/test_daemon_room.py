"""A shared memory that is too small, calls that are given up, files that break while they are served."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator

import grpc
import pytest
from snapd_proto import trainer_pb2

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import Refused
from tests.support.waiting import wait_for

MIB = 1 << 20
STATE = 6 << 16


@pytest.fixture
def small() -> Iterator[DaemonProcess]:
    """A daemon whose arena lies on a tmpfs of 32 MiB."""
    with daemon_folders() as daemon:
        target = daemon.arena.parent
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "snapd-test", str(target)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
        try:
            daemon.start()
            yield daemon
            assert daemon.stop() == 0, daemon.log_file.read_text()[-3000:]
        finally:
            daemon.close()
            subprocess.run(["umount", "-l", str(target)], check=True)


def test_a_shared_memory_that_is_too_small_is_refused_before_anything_is_copied(small: DaemonProcess) -> None:
    trainer = small.trainer()
    with pytest.raises(Refused) as refused:
        trainer.open(job="a", state_bytes_estimate=20 * MIB)
    assert refused.value.kind == "arena_full"
    assert "free space of" in refused.value.message
    assert "--shm-size" in refused.value.hint and "emptyDir.sizeLimit" in refused.value.hint
    assert list((small.arena / "jobs").iterdir()) == []
    assert trainer.open(job="a", state_bytes_estimate=STATE) == 1
    trainer.capture(1)
    trainer.disconnect()


def test_memory_that_others_took_meanwhile_costs_steps_not_the_daemon(small: DaemonProcess) -> None:
    trainer = small.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    filler = small.arena.parent / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        while True:
            os.write(descriptor, b"x" * 4096)
    os.close(descriptor)
    assert filler.stat().st_size > MIB
    for step in range(2, 40):
        trainer.open_lane(step)
        trainer.write(step)
        trainer.commit()
        wait_for(lambda: trainer.page.lane_state(trainer.lane) != 3, "the lane was taken up or refused")
    refused = [event["reason"] for event in small.events("lane.refused")]
    assert refused and all("index_full" in reason for reason in refused)
    assert small.job("a").complete_step >= 1
    filler.unlink()
    trainer.capture(50)
    trainer.wait_complete(50)
    small.restart()
    trainer.reconnect()
    trainer.capture(51)
    trainer.disconnect()


def test_an_open_that_is_given_up_can_be_asked_again() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        trainer = daemon.trainer()
        trainer.shake_hands()
        request = trainer_pb2.OpenSessionRequest(
            job="a", incarnation="one", world_size=1, local_world_size=1, state_bytes_estimate=256 * MIB
        )
        with pytest.raises(grpc.RpcError) as error:
            trainer.call("OpenSession", request, timeout_s=0.05)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        trainer.open(job="a", state_bytes_estimate=256 * MIB)
        assert trainer.session.arena_bytes == 512 * MIB
        assert len(list((daemon.arena / "jobs" / "a").glob("rank-0.seg-*"))) == 1
        trainer.capture(1)
        assert daemon.stop() == 0


def test_an_index_that_breaks_while_it_is_served_refuses_its_job_only() -> None:
    with daemon_folders() as daemon:
        daemon.start()
        first, second = daemon.trainer(), daemon.trainer()
        first.open(job="a", state_bytes_estimate=STATE)
        second.open(job="b", state_bytes_estimate=STATE)
        for step in (1, 2):
            first.capture(step)
            second.capture(step)
        with sqlite3.connect(daemon.arena / "jobs" / "a" / "index.db") as vandal:
            vandal.execute("DROP TABLE shards")
        vandal.close()
        first.capture(3, is_waiting=False)
        wait_for(lambda: daemon.job("a").problem, "the job is refused by name")
        assert "damaged" in daemon.job("a").problem
        second.capture(3)
        assert daemon.job("b").complete_step == 3
        for trainer in (first, second):
            trainer.disconnect()
        assert daemon.stop() == 0
