"""A daemon that runs out of descriptors: who is connected is served, nothing is taken for damaged, and all goes on when
there are some again.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer, Refused
from tests.support.waiting import wait_for

STATE = 6 << 16


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with daemon_folders() as made:
        made.start()
        yield made


def opened(daemon: DaemonProcess, job: str) -> FakeTrainer:
    trainer = daemon.trainer()
    trainer.open(job=job, state_bytes_estimate=STATE)
    return trainer


def pid_of(daemon: DaemonProcess) -> int:
    assert daemon.process is not None and daemon.process.poll() is None, "the daemon lives"
    return daemon.process.pid


def allow(daemon: DaemonProcess, more: int) -> None:
    """So many descriptors more than it has now."""
    pid = pid_of(daemon)
    there = len(os.listdir(f"/proc/{pid}/fd"))
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (there + more, hard))


def test_it_takes_as_many_as_it_may_have(daemon: DaemonProcess) -> None:
    soft, hard = resource.prlimit(pid_of(daemon), resource.RLIMIT_NOFILE)
    assert soft == hard


def test_nobody_can_connect_for_a_while(daemon: DaemonProcess) -> None:
    trainer = opened(daemon, "a")
    trainer.capture(1)
    allow(daemon, -2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late:
        late.connect(str(daemon.runtime / "handshake.sock"))
        (event,) = wait_for(lambda: daemon.events("handshake.accept_failed"), "the shortage is told")
    assert "Too many open files" in event["reason"]
    trainer.capture(2)  # who is connected is served
    allow(daemon, 500)
    assert [one.step for one in daemon.snapshots("a")] == [2]
    assert pid_of(daemon)


def test_a_new_job_is_refused_for_what_is_lacking_and_let_in_later(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.shake_hands()
    allow(daemon, 3)  # for the folder, and not for the index
    with pytest.raises(Refused) as error:
        trainer.open(job="b", state_bytes_estimate=STATE)
    assert error.value.kind == "files" and "ulimit -n" in error.value.hint
    assert "damaged" not in error.value.message
    allow(daemon, 500)
    trainer.open(job="b", state_bytes_estimate=STATE)
    trainer.capture(1)


def test_a_daemon_that_cannot_take_up_its_jobs_does_not_start_and_damages_nothing(
    daemon: DaemonProcess,
) -> None:
    jobs = [f"job-{number}" for number in range(12)]
    for job in jobs:
        opened(daemon, job).capture(1)
    daemon.kill()
    process = daemon.start(prefix=("prlimit", "--nofile=50"), is_waiting=False)
    assert process.wait(20) == 2
    said = daemon.log_file.read_text().splitlines()[-1]
    assert said.startswith("snapd: job 'job-") and "ulimit -n" in said and "damaged" not in said, said
    daemon.start()
    assert {job: [one.step for one in daemon.snapshots(job)] for job in jobs} == {job: [1] for job in jobs}
