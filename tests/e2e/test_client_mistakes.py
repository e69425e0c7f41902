"""Mistakes in a training loop: each is told in words that name it, whatever is at the other end of the socket."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snapd_client import ConfigError, ProtocolError, SnapdError, Snapshotter, UnavailableError
from snapd_proto import trainer_pb2 as pb

from tests.support.daemon_process import DaemonProcess, daemon_folders


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with daemon_folders() as process:
        process.start()
        yield process


def state() -> dict[str, object]:
    model = torch.nn.Linear(4, 4)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def test_steps_that_begin_anew_are_told(daemon: DaemonProcess, caplog: pytest.LogCaptureFixture) -> None:
    with (
        Snapshotter(state(), job="epochs", runtime_dir=str(daemon.runtime)) as snap,
        caplog.at_level(logging.WARNING),
    ):
        snap.restore()
        for _epoch in range(2):
            for step in (1, 2, 3):
                snap.step(step, wait="captured")
        assert snap.last() == 3
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "step 1 comes after step 3: steps must grow" in text] == told[:1]


def test_a_second_restore_with_other_arguments(daemon: DaemonProcess) -> None:
    with Snapshotter(state(), job="twice", runtime_dir=str(daemon.runtime)) as snap:
        snap.restore()
        snap.step(1, wait="captured")
        with pytest.raises(ConfigError, match=r"restore\(\) was called before.*rollback"):
            snap.restore(step=1)
        assert snap.rollback(1) == 1


def test_what_is_called_after_the_end(daemon: DaemonProcess) -> None:
    snap = Snapshotter(state(), job="closed", runtime_dir=str(daemon.runtime))
    snap.close()
    for call in (snap.restore, snap.rollback, snap.wait, snap.last):
        with pytest.raises(ConfigError, match="this Snapshotter is closed"):
            call()
    assert snap.step(1) is None  # in the loop nothing is raised
    assert snap.health()["failures"] == 0


@pytest.mark.parametrize("step", ["5", 5.0, -1, None])
def test_what_is_no_step(daemon: DaemonProcess, step: object) -> None:
    with Snapshotter(state(), job="steps", runtime_dir=str(daemon.runtime)) as snap:
        with pytest.raises(ConfigError, match="step must be a whole number"):
            snap.step(step)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="no such level"):
            snap.step(1, wait="captred")


def test_what_is_no_step_ends_no_run_that_was_going(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Snapshotter(state(), job="late", runtime_dir=str(daemon.runtime)) as snap,
        caplog.at_level(logging.WARNING),
    ):
        snap.restore()
        snap.step(1, wait="captured")
        for _again in range(2):
            assert snap.step("2") is None  # type: ignore[arg-type]
            assert snap.step(2, wait="captred") is None
        assert snap.health()["failures"] == 4
        snap.step(2, wait="captured")
        assert snap.last() == 2
    told = [text for text in (record.getMessage() for record in caplog.records) if "training goes on" in text]
    assert len(told) == 1, told
    assert "step must be a whole number" in told[0]


def test_what_is_no_step_is_raised_for_who_wants_it(daemon: DaemonProcess) -> None:
    with Snapshotter(state(), job="strict", runtime_dir=str(daemon.runtime), strict=True) as snap:
        snap.restore()
        snap.step(1, wait="captured")
        with pytest.raises(ConfigError, match="step must be a whole number"):
            snap.step("2")  # type: ignore[arg-type]
        assert snap.last() == 1


REFUSAL = pb.HandshakeReply(
    refusal=pb.Refusal(
        kind="protocol_version", message="protocol 2 here, 1 there", hint="install the same snapd"
    )
).SerializeToString()


@pytest.mark.parametrize(
    ("answer", "cls", "text"),
    [
        (struct.pack("<I", len(REFUSAL)) + REFUSAL, SnapdError, r"2 here.*\[protocol_version\].*the same snapd"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "longer than any .*handshake.sock.*another program"),
        (b"\x05\x00\x00\x00\xff\xff\xff\xff\xff", ProtocolError, "no message of snapd's .*handshake.sock"),
        (b"", UnavailableError, "broke off .*handshake.sock"),
    ],
    ids=["another version", "another program", "garbage", "nothing"],
)  # fmt: skip
def test_what_answers_is_no_daemon(tmp_path: Path, answer: bytes, cls: type[SnapdError], text: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "handshake.sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(cls, match=text) as error:
            Snapshotter(state(), job="x", runtime_dir=str(folder))
        thread.join()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["/proc/nowhere/run", "/tmp/" + "x" * 120, "/etc/hostname"])
def test_folders_that_cannot_be(folder: str) -> None:
    with pytest.raises(ConfigError, match="folder") as error:
        Snapshotter(state(), job="x", runtime_dir=folder)
    assert folder in str(error.value)
