"""Worlds of light trainers, one per node, that step as training does: each step is handed over, and timed."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.harness.daemon import ClusterDaemon

PROGRAM = Path(__file__).with_name("light_trainer.py")
CHUNK_BYTES = 64 << 10
STEP_S = 0.25
START_S = 30.0


class LightRank:
    """A light trainer in a process of its own, beside its node's daemon."""

    def __init__(self, daemon: ClusterDaemon, rank: int) -> None:
        self.daemon, self.rank = daemon, rank
        self.log = daemon.log.with_name(f"light-{daemon.host.name}.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(daemon.runtime)],
                env=daemon.trainer_env() | {"PATH": "/usr/bin"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """RuntimeError with what the trainer said went wrong."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the trainer of rank {self.rank} is gone: {self.log.read_text()[-1500:]}")
        answer = json.loads(line)
        if not answer["ok"]:
            raise RuntimeError(f"rank {self.rank}: {answer['kind']}: {answer['message']}")
        return answer["result"]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Step:
    """A step: when it began, the longest that a rank was held by it, and whether all ranks handed it over."""

    number: int
    t: float
    held_s: float
    is_handed: bool


class LightWorld:
    """Rank i beside daemons[i]. As a context it steps in the background, `step_s` apart, until it is left."""

    def __init__(
        self,
        daemons: Sequence[ClusterDaemon],
        job: str,
        *,
        chunk_count: int = 12,
        state_bytes: int = 0,
        chunk_bytes: int = 0,
        step_s: float = STEP_S,
    ) -> None:
        """`state_bytes` per rank (0: `chunk_count` chunks), in chunks of `chunk_bytes` (0: as the daemons choose)."""
        self.job, self.step_s = job, step_s
        self.chunk_count, self.state_bytes = chunk_count, state_bytes
        self.asked_chunk_bytes, self.chunk_bytes = chunk_bytes, chunk_bytes or CHUNK_BYTES
        self.ranks = [LightRank(daemon, rank) for rank, daemon in enumerate(daemons)]
        self.steps: list[Step] = []
        self.generation = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def all(self, do: str, **arguments: Any) -> list[Any]:
        """The same command to every rank at once; their answers."""
        for rank in self.ranks:
            rank.send(do, **arguments)
        return [rank.answer() for rank in self.ranks]

    def open(self) -> int:
        """Sessions of one new incarnation; returns its generation."""
        incarnation = secrets.token_hex(8)
        for rank in self.ranks:
            rank.send(
                "open_alone",
                job=self.job,
                rank=rank.rank,
                world_size=len(self.ranks),
                incarnation=incarnation,
                state_bytes=self.state_bytes or self.chunk_count * CHUNK_BYTES,
                chunk_bytes=self.asked_chunk_bytes,
            )
        answers = [rank.answer() for rank in self.ranks]
        assert len({tuple(answer) for answer in answers}) == 1, f"ranks of one start differ: {answers}"
        self.generation, self.chunk_bytes = answers[0]
        if self.state_bytes:
            self.chunk_count = max(4, self.state_bytes // self.chunk_bytes)
        return self.generation

    def restore(self) -> int:
        """The step that all ranks restored, bytes compared; -1: there is none. RuntimeError: why not."""
        found = self.all("restore_to_end", chunk_count=self.chunk_count)
        steps = {step for step, _ in found}
        assert len(steps) == 1, f"ranks went on from different steps: {found}"
        self.rounds = max(rounds for _, rounds in found)
        step = steps.pop()
        self.last = max(0, step)
        return step

    rounds = 0  # that the last restore took
    last = 0  # the newest step, taken or restored

    def capture(self, step: int) -> float:
        """Hand one step over on all ranks; returns the longest that one was held, in seconds."""
        began = time.monotonic()
        answers = self.all("timed_capture", step=step, chunk_count=self.chunk_count)
        held_s = max(held_ms for held_ms, _ in answers) / 1000
        self.last = step
        self.steps.append(Step(step, began, held_s, all(is_handed for _, is_handed in answers)))
        return held_s

    # stepping in the background

    def __enter__(self) -> LightWorld:
        self._thread = threading.Thread(target=self._run, args=(self.last + 1,), name=f"light {self.job}")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pause()
        if self.failure is not None and kind is None:
            raise self.failure

    def pause(self) -> None:
        """No more steps; the trainers stay."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._stop = threading.Event()

    def _run(self, first: int) -> None:
        number = first
        try:
            while not self._stop.wait(self.step_s):
                self.capture(number)
                number += 1
        except RuntimeError as error:
            self.failure = error

    def held_since(self, t: float) -> list[Step]:
        """The steps that began after a moment."""
        if self.failure is not None:
            raise self.failure
        return [step for step in self.steps if step.t >= t]

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        self.pause()
        for rank in self.ranks:
            rank.kill()
