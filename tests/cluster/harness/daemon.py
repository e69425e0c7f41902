"""A real `snapd serve` on a host, as a member of a cluster, in folders of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from snapd_proto import admin_pb2

from tests.cluster.harness.asking import Asker
from tests.cluster.harness.hosts import Host
from tests.support.fake_trainer import Refused
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]
PORT, BULK_PORT = 7421, 7422
START_S = 30.0
PYTHON_PATH = os.pathsep.join(
    [str(ROOT), str(ROOT / "client"), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
)


class ClusterDaemon:
    """The daemon of one host. `node` is its name in the cluster, which a replacement may change."""

    def __init__(self, host: Host, folder: Path, arena: Path, settings: Mapping[str, str]) -> None:
        self.host, self.node = host, host.name
        self.runtime, self.arena, self.log = (
            folder / f"{host.name}.run",
            arena / host.name,
            folder / f"{host.name}.log",
        )
        self.settings = dict(settings)
        self.asker = Asker(self.runtime)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.host.address}:{PORT}"

    def env(self) -> dict[str, str]:
        """What the daemon and the commands are started with."""
        return {
            "PYTHONPATH": PYTHON_PATH,
            "SNAPD_RUNTIME_DIR": str(self.runtime),
            "SNAPD_ARENA_DIR": str(self.arena),
            "SNAPD_CLUSTER_NODE": self.node,
            "SNAPD_CLUSTER_HOST": self.host.name,
            "SNAPD_CLUSTER_LISTEN": self.address,
            "SNAPD_CLUSTER_BULK_PORT": str(BULK_PORT),
            **self.settings,
        }

    def trainer_env(self) -> dict[str, str]:
        """What a trainer on this host needs to find the daemon."""
        return {
            "PYTHONPATH": PYTHON_PATH,
            "SNAPD_RUNTIME_DIR": str(self.runtime),
            "SNAPD_ARENA_DIR": str(self.arena),
            "SNAPD_AUTOSTART": "0",
        }

    # life

    def start(self, *, is_waiting: bool = True, **settings: str) -> None:
        """`settings` hold for this start only."""
        assert not self.is_running, f"{self.node} runs already"
        command = [sys.executable, "-m", "snapd", "serve"]
        self.process = self.host.start(command, env=self.env() | settings, log=self.log)
        if is_waiting:
            self.wait_answering()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_answering(self) -> None:
        wait_for(self.is_answering, f"the daemon of {self.node} answers", START_S, self.tail)

    def is_answering(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(
                f"the daemon of {self.node} ended with {self.process.returncode}:\n{self.tail()}"
            )
        try:
            return self.status(timeout_s=1.0).pid == self.process.pid
        except (OSError, grpc.RpcError, Refused):
            return False

    def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        assert self.process is not None and self.is_running, f"the daemon of {self.node} was not running"
        self.process.kill()
        self.process.wait()
        self.asker.forget()

    def wait_ended(self, timeout_s: float = 10.0) -> int:
        """The exit code of a daemon that something else ends."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        self.asker.forget()
        return code

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.wait_ended(timeout_s)

    def freeze(self) -> None:
        """SIGSTOP: it holds its connections and says nothing."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(self.pid) == "T", f"{self.node} is stopped", 5.0)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wipe(self) -> int:
        """Arena, index and sockets are gone, as with the machine's memory. Returns the bytes that there were."""
        assert not self.is_running
        nbytes = sum(path.stat().st_blocks * 512 for path in self.arena.rglob("*") if path.is_file())
        shutil.rmtree(self.arena)
        shutil.rmtree(self.runtime, ignore_errors=True)
        return nbytes

    # what it says

    def status(
        self, job: str = "", *, ask_peers: bool = False, timeout_s: float = 5.0
    ) -> admin_pb2.StatusReply:
        return self.asker.status(job, ask_peers=ask_peers, timeout_s=timeout_s)

    def job(self, name: str) -> admin_pb2.JobStatus | None:
        return next((job for job in self.status().jobs if job.job == name), None)

    def status_json(self) -> dict[str, Any]:
        """What `snapd status --json` prints on this host."""
        text = self.command("status", "--json")
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def command(self, *arguments: str, code: int = 0) -> str:
        """A command of the command line on this host; AssertionError unless it ends with `code`."""
        done = subprocess.run(
            self.host.command(sys.executable, "-m", "snapd", *arguments),
            env={**os.environ, **self.env()},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"snapd {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if code else "")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The log's lines, of every start."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines() if self.log.exists() else []:
            if line.startswith("{"):
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a kill tore it
                if name in ("", event.get("event")):
                    found.append(event)
        return found

    def tail(self, nbytes: int = 2500) -> str:
        text = self.log.read_bytes()[-nbytes:].decode(errors="replace") if self.log.exists() else "(no log)"
        return f"--- daemon of {self.node}\n{text}"


def process_state(pid: int) -> str:
    """As in /proc/PID/stat: R, S, D, T, Z."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2]
