"""Starting torchrun, watching it, killing its ranks, and reading what they wrote."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from heartbeat import Beat, read_beat
from node import Node

HERE = Path(__file__).resolve().parent


class RunFailed(Exception):
    """A training run did not do what it was started for."""


@dataclass
class Kill:
    """What was true at the moment of the kill. Times are CLOCK_MONOTONIC seconds."""

    t: float
    beats: list[Beat]
    newest_reported: tuple[int, int] | None  # (generation, step) that `status` had shown as complete before

    @property
    def step(self) -> int:
        return max(beat.step for beat in self.beats)


@dataclass
class RunLog:
    """All events of all ranks of a run, in order of time."""

    events: list[dict[str, Any]]
    ranks: int
    start: int = 0  # the step that the second start went on from
    restarted_t: float = 0.0  # when torchrun was started again

    def of(self, what: str, rank: int | None = None) -> list[dict[str, Any]]:
        return [e for e in self.events if e["what"] == what and rank in (None, e["rank"])]

    def step_seconds(self) -> float:
        steps = self.of("step")[self.ranks :]  # without the first, which pays for everything that is lazy
        return statistics.median(e["ended"] - e["began"] for e in steps)


def read_run(out: Path, ranks: int) -> RunLog:
    events = []
    for rank in range(ranks):
        for line in (out / f"rank-{rank}.jsonl").read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the kill came in the middle of this line: the step it would tell of was not noted
    return RunLog(sorted(events, key=lambda e: e["t"]), ranks)


class Launch:
    """One torchrun. Leaving the context ends all of its processes, whatever happened."""

    def __init__(
        self, out: Path, *, steps: int, seed: int, ranks: int, job: str = "", node: Node | None = None
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            (out / f"heartbeat-{rank}").unlink(missing_ok=True)
        self.out, self.ranks = out, ranks
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks),
            "--monitor-interval", "0.2", str(HERE / "train.py"), "--out", str(out), "--steps", str(steps),
            "--seed", str(seed), "--job", job,
        ]  # fmt: skip
        self.scratch = tempfile.mkdtemp(
            prefix="snapd-demo-tmp-"
        )  # killed processes leave their temporary files here
        env = dict(
            os.environ,
            TMPDIR=self.scratch,
            OMP_NUM_THREADS="1",
            PYTHONWARNINGS="ignore",
            TORCH_CPP_LOG_LEVEL="ERROR",
        )
        if node is not None:
            env |= node.env()
        self.log = out / "torchrun.log"
        self.started_t = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # the agent then ends its workers
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for beat in self.beats():
            if beat is not None:
                _kill_group(beat.pid)  # a rank leads a session of its own; its loader's workers are in it
        shutil.rmtree(self.scratch, ignore_errors=True)

    def beats(self) -> list[Beat | None]:
        return [read_beat(self.out / f"heartbeat-{rank}") for rank in range(self.ranks)]

    def wait_for_step(self, step: int, timeout_s: float) -> None:
        """Return within milliseconds of the first rank's beginning `step`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if any(beat is not None and beat.step >= step for beat in self.beats()):
                return
            if self.process.poll() is not None:
                raise RunFailed(
                    f"torchrun ended with {self.process.returncode} before step {step}:\n{self.tail()}"
                )
            time.sleep(0.004)
        raise RunFailed(f"step {step} was not reached within {timeout_s:.0f} s:\n{self.tail()}")

    def wait_end(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"torchrun did not end within {timeout_s:.0f} s:\n{self.tail()}") from None

    def wait(self, timeout_s: float) -> None:
        status = self.wait_end(timeout_s)
        if status != 0:
            raise RunFailed(f"torchrun ended with {status}:\n{self.tail()}")

    def tail(self, nbytes: int = 3000) -> str:
        return self.log.read_bytes()[-nbytes:].decode(errors="replace")


def _kill_group(pid: int) -> None:
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # the leader is gone, its workers may not be


def kill_ranks(launch: Launch, newest_reported: tuple[int, int] | None) -> Kill:
    """SIGKILL to every rank, one right after the other."""
    pids = [beat.pid for beat in launch.beats() if beat is not None]
    if len(pids) != launch.ranks:
        raise RunFailed(f"only {len(pids)} ranks had begun")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    kill = Kill(time.monotonic(), [beat for beat in launch.beats() if beat is not None], newest_reported)
    if any(beat.phase == "ended" for beat in kill.beats):
        raise RunFailed("the kill came too late: a rank had ended")
    return kill


class Watch:
    """A third party that asks the daemon for its status over and over and remembers the answers."""

    def __init__(self, node: Node, job: str, *, every_s: float = 0.05) -> None:
        self.newest: tuple[int, int] | None = None
        self.captures: list[tuple[float, int, int]] = []  # (time, generation, step), newly seen complete
        self.windows: dict[
            tuple[int, int, int], float
        ] = {}  # (rank, generation, step) -> seconds until captured
        self._node, self._job, self._every_s = node, job, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                reply = self._node.status()
            except (OSError, grpc.RpcError):
                continue
            for job in reply.jobs:
                if job.job == self._job:
                    self._note(job)

    def _note(self, job: Any) -> None:
        for session in job.sessions:
            if session.has_captured and session.last_window_s > 0:
                key = (session.rank, session.generation, session.newest_captured_step)
                self.windows.setdefault(key, session.last_window_s)
        if job.has_complete and (job.complete_generation, job.complete_step) != self.newest:
            self.newest = (job.complete_generation, job.complete_step)
            self.captures.append((time.monotonic(), *self.newest))
