"""A whole daemon flushes to a real S3 server: killed at its points, the server killed, hung, credentials refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_scene import BY_STEPS, TierDaemon, capture_steps, intents, read_tier
from tests.support.s3_gate import gate_before
from tests.support.seaweed import BUCKET, READ_ONLY_KEY, READ_ONLY_SECRET, Seaweed, running
from tests.support.waiting import wait_for

STATE = 6 << 16
PATIENT = {"SNAPD_TIER_DEADLINE": "3s", "SNAPD_TIER_STALL": "1s", "SNAPD_TIER_CONNECT": "1s"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running(tmp_path_factory.mktemp("weed")) as made:
        yield made


class Scene(TierDaemon):
    """A daemon whose tier is a prefix of the bucket."""

    def __init__(self, daemon: DaemonProcess, server: Seaweed, prefix: str) -> None:
        super().__init__(daemon, Path())
        self.store = server.store(prefix)  # type: ignore[assignment]


@pytest.fixture
def scene(server: Seaweed, request: pytest.FixtureRequest) -> Iterator[Scene]:
    prefix = request.node.name.replace("[", "-").replace("]", "")
    settings = {
        **BY_STEPS,
        **PATIENT,
        "SNAPD_TIER_SHARED": f"s3://{BUCKET}/{prefix}",
        "SNAPD_TIER_ENDPOINT": server.endpoint,
    }
    with daemon_folders(**settings) as daemon:
        made = Scene(daemon, server, prefix)
        yield made
        made.store.close()


def opened(scene: Scene) -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    return trainer


def test_snapshots_go_to_the_bucket(scene: Scene) -> None:
    scene.daemon.start()
    trainer = opened(scene)
    for step in range(1, 5):
        trainer.capture(step, 1)
    scene.wait_durable(4)
    assert read_tier(scene.store, "a")[SnapshotId(1, 4)] == [trainer.chunks(4, 1, 6)]
    wait_for(lambda: intents(scene.store, "a") == [], "the intents are removed")
    assert list(scene.store.unfinished()) == []


@pytest.mark.parametrize("point", ["daemon.flush.pack.before", "daemon.flush.commit.after"])
def test_a_kill_at_a_named_point(scene: Scene, point: str) -> None:
    scene.daemon.start(SNAPD_FAULT_POINTS=f"{point}=kill")
    trainer = opened(scene)
    trainer.capture(2, 1)
    process = scene.daemon.process
    assert process is not None
    wait_for(lambda: process.poll() is not None, "the daemon is killed")
    assert process.returncode == -signal.SIGKILL
    scene.daemon.start(SNAPD_FAULT_POINTS="")
    trainer.reconnect()
    scene.wait_durable(2)
    assert read_tier(scene.store, "a") == {SnapshotId(1, 2): [trainer.chunks(2, 1, 6)]}


def test_a_server_that_hangs_pauses_the_level_only(scene: Scene, server: Seaweed) -> None:
    scene.daemon.start()
    trainer = opened(scene)
    capture_steps(trainer, 1, 2)
    scene.wait_durable(2)
    server.hang()
    try:
        capture_steps(trainer, 3, 8)  # training goes on
        wait_for(lambda: scene.flush().pause in ("store_slow", "store_unreachable"), "a pause")
    finally:
        server.go_on()
    scene.wait_durable(7)
    assert max(read_tier(scene.store, "a")) >= SnapshotId(1, 7)


def test_a_server_that_is_killed_and_comes_back(scene: Scene, server: Seaweed) -> None:
    scene.daemon.start()
    trainer = opened(scene)
    capture_steps(trainer, 1, 2)
    scene.wait_durable(2)
    server.kill()
    try:
        capture_steps(trainer, 3, 8)
        scene.wait_pause("store_unreachable")
    finally:
        server.start()
    scene.wait_durable(7)
    assert max(read_tier(scene.store, "a")) >= SnapshotId(1, 7)


def lasting(server: Seaweed) -> dict[str, tuple[str, dict[str, str]]]:
    """Settings of a daemon whose tier can never take anything -> the kind of what it says."""
    read_only = {"AWS_ACCESS_KEY_ID": READ_ONLY_KEY, "AWS_SECRET_ACCESS_KEY": READ_ONLY_SECRET}
    return {
        "rights": ("store_denied", read_only),
        "credentials": ("store_credentials", {"AWS_SECRET_ACCESS_KEY": "of somebody else"}),
        "bucket": ("bucket", {"SNAPD_TIER_SHARED": "s3://no-such-bucket/x"}),
        "tls": ("store_tls", {"SNAPD_TIER_ENDPOINT": server.endpoint.replace("http:", "https:")}),
    }


@pytest.mark.parametrize("what", ["rights", "credentials", "bucket", "tls"])
def test_what_waiting_cannot_mend_is_not_waited_for(scene: Scene, server: Seaweed, what: str) -> None:
    kind, settings = lasting(server)[what]
    scene.daemon.start(SNAPD_TIER_GRACE="60s", **settings)
    trainer = opened(scene)
    capture_steps(trainer, 1, 4)
    scene.wait_pause(kind)
    began_s = time.monotonic()
    reply = trainer.wait_durable(4, 60.0)
    assert reply.refused and not (reply.reached or reply.dropped) and "paused: " in reply.reason
    assert time.monotonic() - began_s < 30
    began_s = time.monotonic()
    assert scene.daemon.stop() == 0
    assert time.monotonic() - began_s < 10
    (left,) = scene.daemon.events("snapshot.not_durable")
    assert (left["job"], left["kind"], left["is_waited_for"]) == ("a", kind, False)
    assert left["snapshot"] == str(SnapshotId(1, 4)) and left["reason"].startswith("paused: ")


def test_what_may_pass_is_waited_for_at_the_end(scene: Scene, server: Seaweed) -> None:
    scene.daemon.start(SNAPD_TIER_GRACE="60s")
    trainer = opened(scene)
    capture_steps(trainer, 1, 2)
    scene.wait_durable(2)
    server.kill()
    try:
        capture_steps(trainer, 3, 4)
        scene.wait_pause("store_unreachable")
        began_s = time.monotonic()
        assert not trainer.wait_durable(4, 2.5).refused and time.monotonic() - began_s >= 2.5
        assert scene.daemon.process is not None
        scene.daemon.process.terminate()
        wait_for(lambda: scene.daemon.events("daemon.stopping"), "it was told to end")
    finally:
        server.start()
    assert scene.daemon.process.wait(60) == 0
    assert scene.daemon.events("snapshot.not_durable") == []
    assert max(read_tier(scene.store, "a")) == SnapshotId(1, 4)


def test_a_server_that_hangs_does_not_keep_the_daemon_from_ending(scene: Scene, server: Seaweed) -> None:
    patient = {"SNAPD_TIER_DEADLINE": "120s", "SNAPD_TIER_STALL": "60s", "SNAPD_TIER_GRACE": "1s"}
    scene.daemon.start(**patient)
    trainer = opened(scene)
    capture_steps(trainer, 1, 2)
    scene.wait_durable(2)
    server.hang()
    try:
        capture_steps(trainer, 3, 4)
        began_s = time.monotonic()
        assert scene.daemon.stop() == 0
        assert time.monotonic() - began_s < 15
    finally:
        server.go_on()
    left = scene.daemon.events("levels.finished")[-1]["not_durable_jobs"]
    assert left == ["a"]


# odd moments


def test_credentials_that_expire_in_the_middle_of_an_upload(scene: Scene, server: Seaweed) -> None:
    with gate_before(server.port) as gate:
        scene.daemon.start(SNAPD_TIER_ENDPOINT=gate.endpoint)
        trainer = opened(scene)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        for allowed in range(5):  # the intent, the pack, the manifest, the commit record: each in its turn
            gate.allowed = allowed
            capture_steps(trainer, 3 + 2 * allowed, 4 + 2 * allowed)
            scene.wait_pause("store_credentials")
            assert "ExpiredToken" in scene.flush().reason
            assert max(read_tier(scene.store, "a")).step <= 4 + 2 * allowed  # reads all of them
            gate.allowed = None  # somebody has put new ones in place
            scene.wait_durable(4 + 2 * allowed)
        assert len(gate.refused) >= 5
        newest = read_tier(scene.store, "a")[SnapshotId(1, 12)]
        assert newest == [trainer.chunks(12, 1, 6)]


def test_gc_and_other_commands_with_credentials_that_may_only_read(scene: Scene) -> None:
    scene.daemon.start()
    trainer = opened(scene)
    capture_steps(trainer, 1, 2)
    scene.wait_durable(2)
    capture_steps(trainer, 3, 4)
    scene.wait_durable(4)
    url = scene.daemon.env["SNAPD_TIER_SHARED"]
    refused = {"AWS_ACCESS_KEY_ID": READ_ONLY_KEY, "AWS_SECRET_ACCESS_KEY": READ_ONLY_SECRET}

    def snapd(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "snapd", *arguments, "--from", url]
        env = {**scene.daemon.env, **refused}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    for arguments in (
        ("ls",),
        ("verify", "a", "--deep"),
        ("gc", "--job", "a", "--dry-run", "--keep-last", "1"),
    ):
        code, text = snapd(*arguments)
        assert code == 0, text
    for arguments in (("gc", "--job", "a", "--keep-last", "1"), ("pin", "keep", "--job", "a", "--step", "4")):
        code, text = snapd(*arguments)
        assert code == 4 and len(text.splitlines()) <= 2, text
        assert "AccessDenied" in text and "store_denied" in text, text
    assert len(read_tier(scene.store, "a")) == 2
