"""Named points at which a test may kill or stop the trainer.

`SNAPD_FAULT_POINTS="client.commit.before:3=kill,client.open.after=stop"` sends SIGKILL (SIGSTOP) to this process when
the point is reached for the third (first) time. Unset, a point costs one lookup in an empty dict.
"""

from __future__ import annotations

import os
import signal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def parse(text: str) -> dict[str, tuple[int, signal.Signals]]:
    """`name[:count]=kill|stop`, separated by commas, as point -> (occurrence counted from 1, signal).

    Raises:
        ValueError: names the part that is not of this form.
    """
    points: dict[str, tuple[int, signal.Signals]] = {}
    for part in filter(None, text.split(",")):
        left, _, action = part.partition("=")
        name, _, count = left.partition(":")
        if action not in _SIGNALS or (count and not count.isdigit()):
            raise ValueError(f"SNAPD_FAULT_POINTS: {part!r} is not name[:count]=kill|stop")
        points[name] = (int(count or 1), _SIGNALS[action])
    return points


_points = parse(os.environ.get("SNAPD_FAULT_POINTS", ""))
_counts: dict[str, int] = {}


def point(name: str) -> None:
    """Die or stop here if the environment asks for it."""
    if not _points:
        return
    if name in _points:
        _counts[name] = _counts.get(name, 0) + 1
        occurrence, what = _points[name]
        if _counts[name] == occurrence:
            os.kill(os.getpid(), what)
