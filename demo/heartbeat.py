"""Where a rank is, told to whoever watches it: one small file per rank, mapped by both.

The demo kills at a random moment of a chosen step, so it must know, within milliseconds, where each rank is.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<QQQ")  # process id, step under way, phase
PHASES = ("starting", "data", "forward", "backward", "update", "snapshot", "ended")


@dataclass(frozen=True)
class Beat:
    pid: int
    step: int
    phase: str


class Heart:
    """The rank's side. `at` costs well under a microsecond and makes no system call."""

    def __init__(self, path: Path) -> None:
        with open(path, "wb") as file:
            file.write(_RECORD.pack(os.getpid(), 0, 0))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _RECORD.size)

    def at(self, step: int, phase: str) -> None:
        _RECORD.pack_into(self._map, 0, os.getpid(), step, PHASES.index(phase))


def read_beat(path: Path) -> Beat | None:
    """What the rank said last; None before it said anything."""
    try:
        pid, step, phase = _RECORD.unpack(path.read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Beat(pid, step, PHASES[phase])
