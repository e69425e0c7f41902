"""Where the daemon is, and how a per-user one is started when none answers.

The daemon is executed with posix_spawn, in a session of its own (torchrun kills its workers' process group), never
forked: no page of the trainer, no lock and no CUDA context is shared with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, UnavailableError

START_TIMEOUT_S = 30.0
SOCKET_PATH_BYTES_MAX = 107  # sun_path holds 108 bytes, the last of them 0


@dataclass(frozen=True, kw_only=True)
class Sockets:
    """The two sockets of a daemon."""

    folder: Path
    is_configured: bool  # the user named it: it is not started by us
    is_one_machine: bool = True  # the world does not span machines

    @property
    def handshake(self) -> Path:
        return self.folder / "handshake.sock"

    @property
    def grpc(self) -> Path:
        return self.folder / "snapd.sock"


def find_sockets(runtime_dir: str | None = None, *, is_one_machine: bool = True) -> Sockets:
    """The folder of the daemon's sockets: argument, `SNAPD_RUNTIME_DIR`, `XDG_RUNTIME_DIR`, `/tmp`.

    `SNAPD_AUTOSTART=0`, a folder that another user owns, or a world that spans machines (its daemons need
    coordination) means that the daemon is somebody else's to start.
    """
    autostart = os.environ.get("SNAPD_AUTOSTART", "1") != "0" and is_one_machine
    named = runtime_dir or os.environ.get("SNAPD_RUNTIME_DIR")
    if named:
        folder = Path(named)
    elif os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(os.environ["XDG_RUNTIME_DIR"]) / "snapd-train"
    else:
        folder = Path(f"/tmp/snapd-train-{os.getuid()}")
    return Sockets(folder=folder, is_configured=not autostart, is_one_machine=is_one_machine)


def connect(sockets: Sockets, timeout_s: float) -> socket.socket:
    """A connection to the handshake socket.

    Raises:
        UnavailableError: nobody listens there.
        ConfigError: the folder is not safe (another owner, or open to others).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout_s)
    try:
        _check_folder(sockets.folder)
        connection.connect(str(sockets.handshake))
    except OSError as error:
        connection.close()
        raise UnavailableError(
            "no snapd daemon answers",
            hint="start one with `snapd serve`",
            socket=sockets.handshake,
            cause=error.strerror or error,
        ) from error
    except ConfigError:
        connection.close()
        raise
    return connection


def _check_folder(folder: Path) -> None:
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            "the runtime folder must be a folder of yours that others cannot open (mode 0700)",
            folder=folder,
            owner=facts.st_uid,
            mode=oct(stat.S_IMODE(facts.st_mode)),
            hint="remove it, or set SNAPD_RUNTIME_DIR",
        )


def _make_folder(folder: Path) -> None:
    """
    Raises:
        ConfigError: it cannot be made, is not ours alone, or its path is too long for a socket.
    """
    if len(os.fsencode(folder / "handshake.sock")) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            "the path of the runtime folder is too long for a socket",
            hint="set SNAPD_RUNTIME_DIR to a shorter one",
            folder=folder,
        )
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        _check_folder(folder)
    except OSError as error:
        raise ConfigError(
            "the runtime folder cannot be made",
            hint="set SNAPD_RUNTIME_DIR to a folder that you may make",
            folder=folder,
            cause=error.strerror,
        ) from error


def connect_or_start(sockets: Sockets, timeout_s: float = START_TIMEOUT_S) -> socket.socket:
    """A connection; if nobody answers and the daemon is ours to start, start it (one starter at a time)."""
    try:
        return connect(sockets, timeout_s)
    except UnavailableError:
        if not sockets.is_one_machine:
            return _await_cluster(sockets, timeout_s)
        if sockets.is_configured:
            raise
    _make_folder(sockets.folder)
    with _lock(sockets.folder / "start.lock"):
        with contextlib.suppress(UnavailableError):
            return connect(sockets, timeout_s)  # another rank was first
        pid = _spawn(sockets)
        return _await(sockets, pid, timeout_s)


def _await_cluster(sockets: Sockets, timeout_s: float) -> socket.socket:
    """The daemon is not ours to start, and may just be starting: after a machine's restart both do, job and daemon."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return connect(sockets, timeout_s)
        except UnavailableError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "no snapd daemon answers, and a world that spans machines cannot start one",
                    hint="start `snapd serve` with a coordinator on each machine",
                    socket=sockets.handshake,
                    waited_s=timeout_s,
                ) from error
        time.sleep(0.1)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _spawn(sockets: Sockets) -> int:
    log = str(sockets.folder / "daemon.log")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAPD_FAULT")}
    environment["SNAPD_RUNTIME_DIR"] = str(sockets.folder)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    command = [sys.executable, "-m", "snapd", "serve", "--embedded"]
    return os.posix_spawn(sys.executable, command, environment, file_actions=actions, setsid=True)


def _await(sockets: Sockets, pid: int, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return connect(sockets, timeout_s)
        except UnavailableError:
            ended = _has_ended(pid)
            if ended or time.monotonic() > deadline:
                raise UnavailableError(
                    "the daemon that was started for this user "
                    + ("ended at once" if ended else "does not answer"),
                    log=sockets.folder / "daemon.log",
                    last_line=_last_line(sockets.folder / "daemon.log"),
                ) from None
        time.sleep(0.02)


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except OSError as error:
        return error.errno == errno.ECHILD


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
