"""A restore from a real S3 server that stalls, refuses, or lost a pack."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from snapd_proto import trainer_pb2

from tests.support import seaweed
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer
from tests.support.waiting import wait_for

pytest.importorskip("boto3")
SEED, STATE = 1, 6 << 16
FOUND, UNREACHABLE = trainer_pb2.PlanRestoreReply.FOUND, trainer_pb2.PlanRestoreReply.UNREACHABLE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[seaweed.Seaweed]:
    with seaweed.running(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def daemon(server: seaweed.Seaweed, request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """Step 2 of job `a` is in the bucket, and nowhere else; the daemon does not run."""
    settings = {
        **server.environment(),
        "SNAPD_TIER_SHARED": f"s3://{seaweed.BUCKET}/{request.node.name}",
        "SNAPD_TIER_ENDPOINT": server.endpoint,
        "SNAPD_TIER_EVERY_STEPS": "2",
        "SNAPD_TIER_EVERY": "0",
        "SNAPD_TIER_RESTORE_WAIT": "3",
        "SNAPD_TIER_DEADLINE": "2",
        "SNAPD_TIER_STALL": "1",
        "SNAPD_TIER_CONNECT": "1",
    }
    with daemon_folders(**settings) as made:
        made.start()
        trainer = opened(made, "one")
        for step in (1, 2):
            trainer.capture(step, SEED)
        wait_for(lambda: made.job("a").flush.durable_step == 2, "step 2 is durable", 30.0)
        trainer.disconnect()
        made.kill()
        shutil.rmtree(made.arena)
        yield made


def opened(daemon: DaemonProcess, incarnation: str) -> FakeTrainer:
    trainer = daemon.trainer()
    trainer.open(job="a", incarnation=incarnation, state_bytes_estimate=STATE)
    return trainer


def test_a_server_that_stalls_is_named_and_asked_again(
    server: seaweed.Seaweed, daemon: DaemonProcess
) -> None:
    daemon.start()
    server.hang()
    try:
        trainer = opened(daemon, "two")
        plan = trainer.plan()
        assert plan.outcome == UNREACHABLE
        assert f"s3://{seaweed.BUCKET}" in plan.reason
        trainer.disconnect()
    finally:
        server.go_on()
    assert daemon.events("restore.tier_away")
    assert opened(daemon, "three").restore(SEED) == 2


def test_credentials_that_may_only_read_are_enough(server: seaweed.Seaweed, daemon: DaemonProcess) -> None:
    daemon.start(AWS_ACCESS_KEY_ID=seaweed.READ_ONLY_KEY, AWS_SECRET_ACCESS_KEY=seaweed.READ_ONLY_SECRET)
    assert opened(daemon, "two").restore(SEED) == 2
    assert Path(daemon.arena).exists()


def test_wrong_credentials_are_unreachable_not_absent(server: seaweed.Seaweed, daemon: DaemonProcess) -> None:
    daemon.start(AWS_SECRET_ACCESS_KEY="wrong")
    plan = opened(daemon, "two").plan()
    assert plan.outcome == UNREACHABLE
    assert "cannot be asked" in plan.reason
