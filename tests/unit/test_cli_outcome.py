"""Exit codes and error lines; settings from flags; the greeting of what is no daemon."""

from __future__ import annotations

import os
import socket
import threading
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from snapd import errors
from snapd.cli.main import app
from snapd.cli.outcome import ExitCode, error_json, error_line, exit_code_of, reports_errors
from snapd.cli.settings import flag_name, load_settings
from snapd.rpc.local_client import LocalClient


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFoundError, ExitCode.FOUND_NOTHING),
        (errors.ConfigError, ExitCode.USAGE),
        (errors.ConflictError, ExitCode.USAGE),
        (errors.IntegrityError, ExitCode.UNUSABLE),
        (errors.JobUnusable, ExitCode.UNUSABLE),
        (errors.NotRestorable, ExitCode.UNUSABLE),
        (errors.CapacityError, ExitCode.UNUSABLE),
        (errors.UnavailableError, ExitCode.UNREACHABLE),
        (errors.DeadlineExceeded, ExitCode.UNREACHABLE),
        (errors.AuthError, ExitCode.UNREACHABLE),
        (errors.RemoteProtocolError, ExitCode.UNREACHABLE),
    ],
)
def test_exit_codes_are_stable(error: type[errors.SnapdError], code: int) -> None:
    assert exit_code_of(error("x")) == code


def test_every_error_of_the_tree_has_an_exit_code_above_0() -> None:
    assert all(exit_code_of(cls("x")) > 0 for cls in errors.all_error_classes())


def test_an_error_is_one_line_with_what_where_and_what_to_do() -> None:
    error = errors.CapacityError("the arena is\nfull", hint="raise it", job="j", needed_bytes=7)
    assert error_line(error) == "snapd: the arena is full [capacity] job=j needed_bytes=7 (raise it)"
    assert error_json(error) == {
        "error": {
            "kind": "capacity",
            "message": "the arena is\nfull",
            "hint": "raise it",
            "context": {"job": "j", "needed_bytes": 7},
            "exit_code": 3,
        }
    }


def test_a_reader_that_goes_away_is_no_error() -> None:
    def command() -> int:
        raise BrokenPipeError

    with pytest.raises(typer.Exit) as ended:
        reports_errors(command)()
    assert ended.value.exit_code == 0


def test_an_interrupt_ends_as_shells_expect() -> None:
    def command() -> int:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        reports_errors(command)()
    assert ended.value.exit_code == 130


# --- settings ---------------------------------------------------------------------------------------------------
def test_every_setting_is_a_flag_of_serve() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    assert flag_name("arena.chunk_bytes") == "--arena-chunk-bytes"
    for name in ("--arena-dir", "--runtime-dir", "--capture-hash-threads", "--log-file", "--metrics-port"):
        assert name in text
    assert "--fault-points" not in text


def test_config_show_is_a_settings_file_that_gives_the_same(tmp_path: Path) -> None:
    environment = {
        "SNAPD_ARENA_SLOTS": "3",
        "SNAPD_RESTORE_SETTLE": "1.5m",
        "SNAPD_RUNTIME_DIR": '/tmp/a "b"',
    }
    text = CliRunner().invoke(app, ["config", "show"], env=environment).stdout
    assert "slots = 3  # from SNAPD_ARENA_SLOTS" in text
    assert tomllib.loads(text)["restore"]["settle"] == "90s"
    file = tmp_path / "settings.toml"
    file.write_text(text)
    again = load_settings(file).config
    assert (again.arena.slots, again.restore.settle, again.runtime.dir) == (3, 90.0, '/tmp/a "b"')


def test_config_explain_says_who_won(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[arena]\nslots = 4\nheadroom = '1GiB'\n")
    environment = {"SNAPD_CONFIG": str(file), "SNAPD_ARENA_SLOTS": "3", "COLUMNS": "250"}
    lines = CliRunner().invoke(app, ["config", "explain"], env=environment).stdout.splitlines()
    slots = next(line for line in lines if line.startswith("arena.slots"))
    headroom = next(line for line in lines if line.startswith("arena.headroom"))
    assert slots == "arena.slots = 3  (from SNAPD_ARENA_SLOTS; 0 .. 8; default 0)"
    assert headroom.startswith(f"arena.headroom = 1 GiB  (from {file};")


def test_a_wrong_settings_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[arena]\nslot = 4\n")
    result = CliRunner().invoke(app, ["config", "show", "--config", str(file)])
    assert result.exit_code == 2 and "arena.slot: no such setting" in result.stderr


# --- who answers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it snapd's"),
        (b"\x05\x00\x00\x00\xff\xff\xff\xff\xff", "no message of snapd's"),
        (b"\x02\x00\x00\x00\x22\x00", "did not answer the greeting"),
        (b"", "broke off"),
    ],
)
def test_what_is_no_daemon_is_told_apart(tmp_path: Path, answer: bytes, text: str) -> None:
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "handshake.sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(errors.SnapdError, match=text) as caught, LocalClient(tmp_path, timeout_s=5.0):
            pass
        thread.join()
    assert exit_code_of(caught.value) is ExitCode.UNREACHABLE


def test_a_daemon_that_hangs_is_given_up(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "handshake.sock"))
        listener.listen()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(errors.UnavailableError, match="timed out"), LocalClient(tmp_path, timeout_s=0.05):
            pass
        assert len(os.listdir("/proc/self/fd")) == before
