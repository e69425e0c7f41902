"""A daemon of one's own, for demos, benchmarks and tests: folders, start, questions, kill, clean-up.

It is used from outside, as an operator would: `python -m snapd serve`, the handshake socket, the Admin
service.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from snapd_proto import admin_pb2, admin_pb2_grpc, trainer_pb2

_MESSAGE_BYTES_MAX = 64 << 20


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def sweep(prefix: str) -> None:
    """Remove arenas named PREFIX-PID-N of processes that are gone (a demo that was itself killed)."""
    for folder in Path("/dev/shm").glob(f"{prefix}-*"):
        owner = folder.name.removeprefix(f"{prefix}-").split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _new_arena(prefix: str) -> Path:
    for number in range(10_000):
        arena = Path(f"/dev/shm/{prefix}-{os.getpid()}-{number}")
        try:
            arena.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return arena
    raise FileExistsError(f"no free name for an arena: {prefix}")


class Asker:
    """Questions to the daemon that serves `runtime`, as the command line asks them. Not thread-safe."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self._channel: grpc.Channel | None = None
        self._token = ""
        self._greeting: socket.socket | None = None  # open as long as the token is used

    def _handshake(self, timeout_s: float) -> str:
        request = trainer_pb2.HandshakeRequest(
            hello=trainer_pb2.Hello(
                protocol_version=1, software_version="0", role=trainer_pb2.PEER_ROLE_ADMIN
            )
        ).SerializeToString()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._greeting = sock
        sock.settimeout(timeout_s)
        sock.connect(str(self.runtime / "handshake.sock"))
        sock.sendall(struct.pack("<I", len(request)) + request)
        (length,) = struct.unpack("<I", _exactly(sock, 4))
        reply = trainer_pb2.HandshakeReply.FromString(_exactly(sock, length))
        if reply.HasField("refusal"):
            raise ConnectionRefusedError(f"{reply.refusal.kind}: {reply.refusal.message}")
        return reply.welcome.token

    def admin(self, timeout_s: float) -> admin_pb2_grpc.AdminStub:
        if self._channel is None:
            self._token = self._handshake(timeout_s)
            self._channel = grpc.insecure_channel(
                f"unix:{self.runtime}/snapd.sock",
                options=[
                    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
                    ("grpc.use_local_subchannel_pool", 1),
                ],
            )
        return admin_pb2_grpc.AdminStub(self._channel)

    def forget(self) -> None:
        """Drop the connection: the next question goes to whoever serves then."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._greeting is not None:
            self._greeting.close()
            self._greeting = None

    def status(self, job: str = "", *, timeout_s: float = 5.0) -> admin_pb2.StatusReply:
        try:
            return self.admin(timeout_s).Status(
                admin_pb2.StatusRequest(job=job), timeout=timeout_s, metadata=[("snapd-token", self._token)]
            )
        except (OSError, grpc.RpcError):
            self.forget()
            raise

    def wait_until_served(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Return once the daemon answers; RuntimeError if it ends or the time runs out."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and process.poll() is None:
            try:
                if self.status(timeout_s=1.0).pid == process.pid:
                    return
            except (OSError, grpc.RpcError):
                time.sleep(0.02)
        raise RuntimeError(f"the daemon does not answer (exit status {process.poll()})")

    def remove(self, job: str, *, timeout_s: float = 30.0) -> int:
        """Drop a job and its snapshots, attached trainers or not; returns the bytes that came free."""
        reply = self.admin(timeout_s).RemoveJob(
            admin_pb2.RemoveJobRequest(job=job, force=True),
            timeout=timeout_s,
            metadata=[("snapd-token", self._token)],
        )
        return reply.arena_bytes_freed

    def newest(self, job: str) -> tuple[int, int] | None:
        """(generation, step) of the newest snapshot that is complete on all ranks, as `status` reports it."""
        for found in self.status().jobs:
            if found.job == job and found.has_complete:
                return found.complete_generation, found.complete_step
        return None


class Node(Asker):
    """One daemon with a runtime folder and an arena of its own.

    `env()` is what trainers need to find it. Leaving the context stops the daemon and removes both folders.
    """

    def __init__(
        self, prefix: str, *, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        sweep(prefix)
        # short: a socket's path has at most 107 bytes
        super().__init__(Path(tempfile.mkdtemp(prefix=f"{prefix}-")))
        self.arena = _new_arena(prefix)
        self.options = list(options)
        self.extra_env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def log(self) -> Path:
        return self.runtime / "serve.log"

    def env(self) -> dict[str, str]:
        folders = {"SNAPD_RUNTIME_DIR": str(self.runtime), "SNAPD_ARENA_DIR": str(self.arena)}
        return folders | {"SNAPD_AUTOSTART": "0"}  # this daemon is ours to start

    def start(self, *, env: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> None:
        """Start the daemon and return once it answers. RuntimeError with the end of its log if not."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snapd", "serve", *self.options],
                env={**os.environ, **self.env(), **self.extra_env, **(env or {})},
                cwd=self.runtime, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_until_served(self.process, timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}:\n{self.tail()}") from None

    def tail(self, nbytes: int = 3000) -> str:
        return self.log.read_bytes()[-nbytes:].decode(errors="replace") if self.log.exists() else ""

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError("the daemon was not started")
        return self.process.pid

    def status_of_process(self) -> int | None:
        """The daemon's exit status, -9 after SIGKILL; None while it runs."""
        return None if self.process is None else self.process.poll()

    # ---- ends

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL and wait until it is gone."""
        self.forget()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout_s: float = 15.0) -> int | None:
        """SIGTERM, then SIGKILL; returns the exit status."""
        self.forget()
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def close(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.arena, ignore_errors=True)
            shutil.rmtree(self.runtime, ignore_errors=True)


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    if nbytes > 1 << 20:
        raise ConnectionError(f"a message of {nbytes} bytes")
    data = bytearray()
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionError("the handshake socket was closed")
        data += piece
    return bytes(data)
