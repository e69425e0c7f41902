"""A real etcd on a host of its own: started, killed, restarted, wiped, set back to an old copy."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from tests.cluster.harness.hosts import Host
from tests.support.waiting import wait_for

CLIENT_PORT, PEER_PORT = 2379, 2380
START_S = 20.0


def is_installed() -> bool:
    return shutil.which("etcd") is not None


class EtcdServer:
    """One member. `folder` keeps its data from one start to the next."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.data, self.log = folder / "etcd", folder / "etcd.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.host.address}:{CLIENT_PORT}"

    @property
    def coordinator(self) -> str:
        """As `cluster.coordinator` names it."""
        return f"etcd://{self.endpoint}"

    def start(self) -> None:
        """Return once it serves."""
        client, peer = f"http://{self.endpoint}", f"http://{self.host.address}:{PEER_PORT}"
        command = [
            "etcd", "--data-dir", str(self.data), "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
        ]  # fmt: skip
        self.process = self.host.start(command, env={}, log=self.log)
        wait_for(self.is_serving, "etcd serves", START_S, self.tail)

    def is_serving(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"etcd ended:\n{self.tail()}")
        return self._get("/health").get("health") in ("true", True)

    def _get(self, path: str) -> dict[str, object]:
        """Through a process on the host: an address of a namespace is reached from inside only."""
        url = f"http://{self.endpoint}{path}"
        if self.host.namespace:
            script = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=2).read().decode())"
            text = self.host.run("python3", "-c", script, check=False)
        else:
            try:
                text = urllib.request.urlopen(url, timeout=2).read().decode()
            except (urllib.error.URLError, OSError):
                text = ""
        found = json.loads(text) if text.strip() else {}
        return found if isinstance(found, dict) else {}

    def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        assert self.process is not None and self.process.poll() is None, "etcd was not running"
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def wipe(self) -> None:
        """Everything that it knew is gone; it must not be running."""
        assert self.process is None or self.process.poll() is not None
        assert self.data.exists(), "there was nothing to wipe"
        shutil.rmtree(self.data)

    def save(self, name: str) -> None:
        """Keep a copy of the data under a name (it must not be running: a copy of a living one may be torn)."""
        assert self.process is None or self.process.poll() is not None
        shutil.copytree(self.data, self.folder / f"etcd-{name}")

    def put_back(self, name: str) -> None:
        """Roll back to a copy."""
        self.wipe()
        shutil.copytree(self.folder / f"etcd-{name}", self.data)

    def tail(self, nbytes: int = 2000) -> str:
        return self.log.read_bytes()[-nbytes:].decode(errors="replace") if self.log.exists() else ""
