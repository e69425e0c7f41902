"""A daemon in a process of its own, in folders of its own; and fake trainers in processes of theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from snapd_proto import admin_pb2, admin_pb2_grpc, trainer_pb2

from tests.support.fake_trainer import FakeTrainer, Handshake
from tests.support.waiting import TIMEOUT_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
_RUN = "from snapd.config import load; from snapd.daemon import run_daemon; raise SystemExit(run_daemon(load().config))"


class TrainerProcess:
    """A fake trainer that can be killed, stopped and continued."""

    def __init__(self, runtime: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/fake_trainer.py"), str(runtime)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the trainer is gone")
        return json.loads(line)

    def do(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        answer = self.answer()
        if not answer["ok"]:
            raise RuntimeError(f"{answer['kind']}: {answer['message']}")
        return answer["result"]

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class DaemonProcess:
    """`log` lines are JSON objects; read them with `events`."""

    def __init__(self, folder: Path, arena: Path, **settings: str) -> None:
        self.runtime, self.arena, self.log_file = folder / "run", arena / "arena", folder / "log"
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "client"), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
            ),
            "SNAPD_RUNTIME_DIR": str(self.runtime),
            "SNAPD_ARENA_DIR": str(self.arena),
            "SNAPD_CAPTURE_POLL_INTERVAL": "0.1",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.trainers: list[TrainerProcess] = []
        self.has_other_settings = False

    def start(
        self, *, is_waiting: bool = True, prefix: Sequence[str] = (), **settings: str
    ) -> subprocess.Popen[bytes]:
        self.has_other_settings = bool(settings or prefix)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", _RUN], env={**self.env, **settings}, stderr=log, stdout=log
            )
        if is_waiting:
            wait_for(self.is_answering, "the daemon answers")
        return self.process

    def is_answering(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(
                f"the daemon ended with {self.process.returncode}: {self.log_file.read_text()[-2000:]}"
            )
        try:
            Handshake(self.runtime / "handshake.sock", trainer_pb2.PEER_ROLE_ADMIN).connect().close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self, **settings: str) -> None:
        """kill -9, then a new one."""
        self.kill()
        self.start(**settings)

    def clear(self) -> None:
        """Between tests that share a daemon: no trainers, no jobs, an empty log, the settings that it began with."""
        assert self.process is not None
        for trainer in self.trainers:
            trainer.kill()
        self.trainers.clear()
        if self.process.poll() is not None or self.has_other_settings:
            if self.process.poll() is None:
                self.kill()
            self.start()
        for job in self.status().jobs:
            self.admin("RemoveJob", admin_pb2.RemoveJobRequest(job=job.job, force=True))
        os.truncate(self.log_file, 0)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)

    def events(self, name: str = "") -> list[dict[str, Any]]:
        found = []
        for line in self.log_file.read_text().splitlines():
            if line.startswith("{"):
                event = json.loads(line)
                if not name or event["event"] == name:
                    found.append(event)
        return found

    def trainer(self) -> FakeTrainer:
        """One in this process."""
        return FakeTrainer(self.runtime)

    def trainer_process(self) -> TrainerProcess:
        trainer = TrainerProcess(self.runtime, self.env)
        self.trainers.append(trainer)
        return trainer

    def admin(self, method: str, request: Any) -> Any:
        """One call of the Admin service."""
        handshake = Handshake(self.runtime / "handshake.sock", trainer_pb2.PEER_ROLE_ADMIN).connect()
        with grpc.insecure_channel(f"unix:{self.runtime / 'snapd.sock'}") as channel:
            call = getattr(admin_pb2_grpc.AdminStub(channel), method)
            answer = call(request, timeout=TIMEOUT_S, metadata=(("snapd-token", handshake.welcome.token),))
            if method in ("Verify", "FillArena"):
                answer = list(answer)
        handshake.close()
        return answer

    def status(self, job: str = "") -> admin_pb2.StatusReply:
        return self.admin("Status", admin_pb2.StatusRequest(job=job))

    def job(self, name: str) -> admin_pb2.JobStatus:
        return self.status(name).jobs[0]

    def snapshots(self, job: str) -> list[admin_pb2.SnapshotSummary]:
        return list(self.admin("ListSnapshots", admin_pb2.ListSnapshotsRequest(job=job)).snapshots)

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.kill()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def daemon_folders(**settings: str) -> Iterator[DaemonProcess]:
    """A daemon that is not started yet; its folders are removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="snapd-test-"))
    arena = Path(tempfile.mkdtemp(prefix="snapd-test-", dir="/dev/shm"))
    daemon = DaemonProcess(folder, arena, **settings)
    try:
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(arena, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
