"""Is a trainer alive? A pidfd says so reliably; without one (pid 0 across containers) the handshake
connection's end does.
"""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import dataclass, field


def process_start(pid: int) -> int:
    """The start time of a process in clock ticks since boot, 0 if it is not there: tells a pid's re-use."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return 0
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[19])


@dataclass(slots=True, eq=False)
class Process:
    """A trainer's process. `pidfd` -1: it cannot be watched, and only its connection's end counts."""

    pid: int
    start: int
    pidfd: int
    session_ids: set[int] = field(default_factory=set)
    is_dead: bool = False

    @classmethod
    def watch(cls, pid: int) -> Process:
        """Open a pidfd for the peer of a connection that is still open."""
        if pid <= 0:
            return cls(0, 0, -1)
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return cls(pid, 0, -1)
        return cls(pid, process_start(pid), descriptor)

    @classmethod
    def find(cls, pid: int, start: int) -> Process | None:
        """After a restart: the process that a session belonged to; None when it is gone.

        A pid of 0 cannot be looked up: such a process counts as alive until its client's connection comes and
        ends.
        """
        if pid <= 0 or start <= 0:
            return cls(pid, 0, -1)
        found = cls.watch(pid)
        if found.pidfd < 0 or found.start != start or found.has_ended():
            found.close()
            return None
        return found

    def has_ended(self) -> bool:
        """True when the pidfd says that all of its threads are gone (a zombie process counts as ended)."""
        if self.pidfd < 0:
            return self.is_dead
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.pidfd)
            self.pidfd = -1


@dataclass(slots=True, eq=False)
class Peer:
    """One handshake connection: who is at the other end, and its token."""

    token: str
    is_admin: bool
    process: Process
    is_connected: bool = True
    session_ids: set[int] = field(default_factory=set)
