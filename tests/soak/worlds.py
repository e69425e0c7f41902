"""Starting worlds of small trainers, watching them, and killing them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PHASES = ("starting", "restoring", "computing", "updating", "handing over", "ending")
_BEAT = struct.Struct("<QQ")


class Hang(AssertionError):
    """Something did not happen in time."""


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, *tails: Callable[[], str]) -> None:
    """Return once it is so; Hang says what was waited for, with what the `tails` (logs) say then."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise Hang("\n".join([f"not within {timeout_s:.0f} s: {what}", *(tail() for tail in tails)]))
        time.sleep(0.004)


@dataclass
class Rank:
    """One trainer process."""

    rank: int
    pid: int
    folder: Path
    status: int | None = None  # exit status, -9 for SIGKILL; None while it lives

    def beat(self) -> tuple[int, str]:
        """Step under way and phase."""
        try:
            step, phase = _BEAT.unpack((self.folder / f"beat-{self.rank}").read_bytes())
        except (FileNotFoundError, struct.error):
            return 0, PHASES[0]
        return step, PHASES[phase]

    def events(self, what: str = "") -> list[dict[str, Any]]:
        path = self.folder / f"log-{self.rank}"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the kill came inside this line
                event = json.loads(line)
                if event["pid"] == self.pid and what in ("", event["what"]):
                    found.append(event)
        return found

    def signal(self, number: int) -> None:
        """To the process if it is still there."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class World:
    """One start of all ranks."""

    ranks: list[Rank]
    job: str
    folder: Path
    stopped: set[int] = field(default_factory=set)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)

    @property
    def is_alive(self) -> bool:
        return any(rank.status is None for rank in self.ranks)

    @property
    def is_whole(self) -> bool:
        return all(rank.status is None for rank in self.ranks)

    def step(self) -> int:
        return max(rank.beat()[0] for rank in self.ranks)

    def wait_gone(self, timeout_s: float = 30.0) -> None:
        wait_until(
            lambda: not self.is_alive,
            timeout_s,
            f"the end of {[r.pid for r in self.ranks if r.status is None]}",
        )

    def failures(self) -> list[str]:
        return [event["error"] for rank in self.ranks for event in rank.events("failed")]

    def tail(self) -> str:
        texts = []
        for rank in self.ranks:
            out = self.folder / f"out-{rank.rank}"
            texts.append(f"--- rank {rank.rank}, status {rank.status}, {rank.beat()}\n")
            texts.append(out.read_text()[-2500:] if out.exists() else "")
        return "".join(texts)


class Nursery:
    """The process that forks trainers. Leaving the context ends it and all trainers."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="snapd-soak-")
        self._worlds = 0
        self._orders = 0
        self._began: queue.Queue[int] = queue.Queue()
        self._ranks: dict[int, Rank] = {}
        self._early_ends: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TORCH_CPP_LOG_LEVEL="FATAL")
        env.pop("SNAPD_FAULT_POINTS", None)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trainer.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="nursery")
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        for rank in self._ranks.values():
            rank.signal(signal.SIGKILL)
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "began" in message:
                self._began.put(message["pid"])
            elif "status" in message:
                with self._lock:
                    rank = self._ranks.get(message["pid"])
                    if rank is None:
                        self._early_ends[message["pid"]] = message["status"]
                    else:
                        rank.status = message["status"]

    def start(
        self,
        job: str,
        *,
        ranks: int = 1,
        steps: int,
        env: Mapping[str, str],
        points: Mapping[int, str] | None = None,
        is_hurried: bool = False,
        rollback_every: int = 0,
    ) -> World:
        """Start all ranks. An empty job: the reference run.

        Args:
            points: rank -> SNAPD_FAULT_POINTS.
            is_hurried: fence right after each hand-over, while the copy is under way.
            rollback_every: spoil the state and roll it back in place every so many steps; 0: never.
        """
        habits = {"is_hurried": is_hurried, "rollback_every": rollback_every}
        self._worlds += 1
        folder = Path(self._folder.name) / str(self._worlds)
        folder.mkdir()
        world = World([], job, folder)
        for rank in range(ranks):
            numbers = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "GROUP_RANK": 0,
            }
            rank_env = {**env, **{name: str(value) for name, value in numbers.items()}}
            if points and rank in points:
                rank_env["SNAPD_FAULT_POINTS"] = points[rank]
            world.ranks.append(self._fork(folder, rank, rank_env, job, steps, habits))
        return world

    def _fork(
        self, folder: Path, rank: int, env: dict[str, str], job: str, steps: int, habits: dict[str, int]
    ) -> Rank:
        assert self._process.stdin is not None
        self._orders += 1
        order = {
            "id": self._orders, "env": env, "job": job, "steps": steps, **habits,
            "beat": str(folder / f"beat-{rank}"), "log": str(folder / f"log-{rank}"),
            "out": str(folder / f"out-{rank}"), "store": str(folder / "store"),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = self._began.get(timeout=60)
        child = Rank(rank, pid, folder)
        with self._lock:
            child.status = self._early_ends.pop(pid, None)
            self._ranks[pid] = child
        return child

    def reference(self, *, ranks: int, steps: int) -> list[list[str]]:
        """Digests of an uninterrupted run: [rank][step], step 0 is the state before the first update."""
        world = self.start("", ranks=ranks, steps=steps, env={})
        world.wait_gone(timeout_s=60 + steps * 0.1)
        digests = []
        for rank in world.ranks:
            events = [e for e in rank.events() if "digest" in e]
            if rank.status != 0 or [e["step"] for e in events] != list(range(steps + 1)):
                raise AssertionError(f"the reference run failed:\n{world.tail()}")
            digests.append([e["digest"] for e in events])
        return digests
