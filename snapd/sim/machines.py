"""Machines: a disk that outlives a daemon, a daemon that comes and goes, and the machine that takes both with it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from snapd.core.cluster import Member
from snapd.sim.daemon import SimDaemon
from snapd.sim.disk import Disk
from snapd.sim.life import Life, LifeEnded

if TYPE_CHECKING:
    from snapd.sim.simulation import Simulation


class Machine:
    """`is_up`: it has power. A machine that was lost comes back empty, under the same name."""

    def __init__(self, sim: Simulation, name: str, domain: str) -> None:
        self._sim = sim
        self.name = name
        self.domain = domain
        self.is_up = True
        self.disk = Disk(sim.random_id())
        self.daemon: SimDaemon | None = None
        self.lives = 0
        self._wants_daemon = True

    @property
    def is_serving(self) -> bool:
        return self.is_up and self.daemon is not None and self.daemon.life.is_alive

    def member(self) -> Member:
        """How a daemon on this machine announces itself."""
        return Member(
            node=self.name,
            host=self.name,
            domain=self.domain,
            address=f"{self.name}:7000",
            bulk_address=f"{self.name}:7001",
            arena_id=self.disk.arena_id,
            version="sim",
        )

    def start_daemon(self) -> None:
        if not self.is_up or self.is_serving:
            return
        self.lives += 1
        life = Life(f"{self.name}#{self.lives}", self._sim.loop, self._crashed)
        self.daemon = SimDaemon(self._sim, self, life)
        self._sim.arenas[self.daemon.instance] = self.disk.arena_id
        self._sim.note(self.name, f"daemon {self.lives} starts, {len(self.disk.shards)} shards here")
        with contextlib.suppress(LifeEnded):  # killed while it starts
            self.daemon.start()

    def crash_daemon(self, after: int, *, restart_after_s: float) -> None:
        """Kill it before its `after`th next effect, and have it started again."""
        self._restart_after_s = restart_after_s
        if self.is_serving and self.daemon is not None:
            if after:
                self.daemon.life.crash_after = after
            else:
                self.daemon.life.end("now")

    def _crashed(self, where: str) -> None:
        self._sim.note(self.name, f"daemon is killed {where}")
        if self.is_up and self._wants_daemon:
            self._sim.loop.call_later(self._restart_after_s, self.start_daemon)

    _restart_after_s = 1.0

    def lose(self) -> None:
        """The machine is gone with all that it held."""
        if not self.is_up:
            return
        self.is_up = False
        self._sim.note(self.name, f"is lost, with {len(self.disk.shards)} shards")
        if self.daemon is not None:
            self.daemon.life.end("with its machine")
        for row in self.disk.sessions:
            row.is_gone = True
        self.disk = Disk(self._sim.random_id())
        self._sim.network.down.add(self.name)
        self._sim.truth.lost(self.name)

    def come_back(self) -> None:
        if not self.is_up:
            self.is_up = True
            self._sim.network.down.discard(self.name)
            self._sim.note(self.name, "comes back, empty")
            self.start_daemon()
