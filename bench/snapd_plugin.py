"""snapd's plug-in for a peer benchmark: a harness that runs many systems under one interface.

The harness loads this file from the path in BENCH_SNAPD and reads `SYSTEMS`. Its interface,
`systems.base.System`, is on the path when that happens. What counts as stall: the call of `save`, and
`before_update`, where this plug-in fences explicitly, so that a copy which was not over by then is paid
for where the harness looks. `durable` is the level *captured*: the snapshot lies hashed and recorded with
the daemon and outlives the trainer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from systems.base import System

JOB = "bench"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))


def serve(env: dict[str, str], log_path: str) -> subprocess.Popen[bytes]:
    """A daemon that answers."""
    from node import Asker

    runtime = Path(env["SNAPD_RUNTIME_DIR"])
    for folder in (runtime, Path(env["SNAPD_ARENA_DIR"])):
        folder.mkdir(mode=0o700)
    with open(log_path, "wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "snapd", "serve"], env=dict(os.environ, **env),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    Asker(runtime).wait_until_served(daemon, timeout_s=30.0)
    return daemon


class Snapd(System):  # type: ignore[misc]  # the harness is untyped
    name = "snapd"
    family = "async+memory"
    modes = ("single", "fsdp2")
    tiers = ("memory",)
    fsyncs = "no (memory)"
    note = "level captured: hashed and recorded in the daemon's shared memory; nothing on disk"

    @classmethod
    def env(cls, workdir: str, shmdir: str) -> dict[str, str]:
        return {
            "SNAPD_RUNTIME_DIR": os.path.join(shmdir, "run"),  # a short path, for the sockets
            "SNAPD_ARENA_DIR": os.path.join(shmdir, "arena"),
            "SNAPD_AUTOSTART": "0",
        }

    @classmethod
    def start_agent(cls, workdir: str, shmdir: str, world: int) -> list[subprocess.Popen[bytes]]:
        return [serve(cls.env(workdir, shmdir), os.path.join(workdir, "daemon.log"))]

    def setup(self, ctx: Any) -> None:
        super().setup(ctx)
        from snapd_client import Snapshotter

        self.snap = Snapshotter(
            {"model": ctx.model, "optimizer": ctx.optimizer}, job=JOB, interval=1, strict=True
        )
        self._step = -1

    def save(self, step: int) -> bool:
        handle = self.snap.step(step)
        handed_over = handle is not None and handle.is_handed_over
        if handed_over:
            self._step = step
        return handed_over

    def before_update(self, step: int) -> None:
        self.snap.fence()

    def durable(self) -> bool:
        return int(str(self.snap.health().get("complete_step", -1))) >= self._step

    def finish(self) -> None:
        if self._step >= 0:
            self.snap.wait("captured", timeout=60.0)

    def restore(self, ctx: Any, source: str) -> int | None:
        self.setup(ctx)
        return self.snap.restore() or None

    def teardown(self) -> None:
        self.snap.close()


class SnapdDirectory(Snapd):
    """Every snapshot goes on to a directory. It is restored by a second daemon, whose memory has none of it."""

    name = "snapd directory"
    family = "async+memory+disk"
    tiers = ("disk",)
    fsyncs = "yes"
    note = "level durable: a commit record in the directory, everything flushed to the disk before it"

    @classmethod
    def env(cls, workdir: str, shmdir: str) -> dict[str, str]:
        return super().env(workdir, shmdir) | {
            "SNAPD_TIER_SHARED": os.path.join(workdir, "tier"),
            "SNAPD_TIER_EVERY_STEPS": "1",
            "SNAPD_TIER_EVERY": "0",
            "SNAPD_TIER_RATE": "0",
        }

    @classmethod
    def other_machine(cls, shmdir: str) -> dict[str, str]:
        return {
            "SNAPD_RUNTIME_DIR": os.path.join(shmdir, "run2"),
            "SNAPD_ARENA_DIR": os.path.join(shmdir, "arena2"),
        }

    @classmethod
    def start_agent(cls, workdir: str, shmdir: str, world: int) -> list[subprocess.Popen[bytes]]:
        os.mkdir(os.path.join(workdir, "tier"))
        other = cls.env(workdir, shmdir) | cls.other_machine(shmdir)
        return [
            *super().start_agent(workdir, shmdir, world),
            serve(other, os.path.join(workdir, "daemon2.log")),
        ]

    def durable(self) -> bool:
        health = self.snap.health()
        step = health["durable_step"]
        return health["durable_tier"] == "shared" and isinstance(step, int) and step >= self._step

    def finish(self) -> None:
        if self._step >= 0:
            self.snap.wait("durable", timeout=60.0)

    def restore(self, ctx: Any, source: str) -> int | None:
        os.environ.update(self.other_machine(ctx.shmdir))
        return super().restore(ctx, source)


SYSTEMS = [Snapd, SnapdDirectory]
