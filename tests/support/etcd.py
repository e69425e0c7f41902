"""A real etcd on loopback ports of its own: killed, stopped, wiped, set back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

BINARY = shutil.which("etcd")
STARTED_WITHIN_S = 20.0


def require_etcd() -> None:
    """Skip where etcd is not installed; fail there if SNAPD_REQUIRE_ETCD says that it must be."""
    if BINARY is None:
        if os.environ.get("SNAPD_REQUIRE_ETCD") == "1":
            pytest.fail("etcd is not installed, and SNAPD_REQUIRE_ETCD=1 says that it must be")
        pytest.skip("etcd is not installed (Debian: apt-get install etcd-server)")


class EtcdServer:
    """One server. Its data lie in `folder/data`; ports are free ones of the moment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.data = folder / "data"
        self._client_port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        assert BINARY is not None and self._process is None
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    BINARY, "--data-dir", str(self.data), "--unsafe-no-fsync", "--logger", "zap",
                    "--listen-client-urls", client, "--advertise-client-urls", client,
                    "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                    "--initial-cluster", f"default={peer}", "--heartbeat-interval", "50", "--election-timeout", "500",
                ],
                stdout=log, stderr=log, env={**os.environ, "ETCD_UNSUPPORTED_ARCH": ""},
            )  # fmt: skip
        self._wait_ready()

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Returns when it has stopped: until then it may still answer."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        while any(
            (task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()
        ):
            time.sleep(0.01)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Begin again with nothing."""
        self.kill()
        shutil.rmtree(self.data)
        self.start()

    def copy_data(self) -> Path:
        """A copy of the data as they are now, taken while the server is down."""
        self.kill()
        copy = self._folder / "copy"
        shutil.copytree(self.data, copy, dirs_exist_ok=False)
        self.start()
        return copy

    def set_back(self, copy: Path) -> None:
        """Begin again from a copy."""
        self.kill()
        shutil.rmtree(self.data)
        shutil.copytree(copy, self.data)
        self.start()

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + STARTED_WITHIN_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "etcd.log").read_text()[-2000:]
            try:
                with socket.create_connection(("127.0.0.1", self._client_port), timeout=1) as connection:
                    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                    if b'"health":"true"' in connection.recv(4096) + connection.recv(4096):
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("etcd did not start: " + (self._folder / "etcd.log").read_text()[-2000:])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
