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
        from node import Asker

        runtime, arena = Path(shmdir) / "run", Path(shmdir) / "arena"
        for folder in (runtime, arena):
            folder.mkdir(mode=0o700)
        with open(os.path.join(workdir, "daemon.log"), "wb") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "snapd", "serve"], env=dict(os.environ, **cls.env(workdir, shmdir)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        Asker(runtime).wait_until_served(daemon, timeout_s=30.0)
        return [daemon]

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


SYSTEMS = [Snapd]
