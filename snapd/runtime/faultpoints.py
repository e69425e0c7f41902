"""Named points at which a test can kill or stop the daemon; free when nothing is armed.

SNAPD_FAULT_POINTS="daemon.record.before:3=kill,daemon.grant.after=stop" arms the third arrival at the first
point and the first at the second; a point fires once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from snapd.errors import ConfigError

MACHINE_POINTS = (
    "daemon.generation.after",
    "daemon.session.before",
    "daemon.session.after",
    "daemon.segment.before",
    "daemon.segment.after",
    "daemon.grant.before",
    "daemon.grant.after",
    "daemon.hash.before",
    "daemon.hash.after",
    "daemon.record.before",
    "daemon.record.after",
    "daemon.captured.after",
    "daemon.lane_freed.after",
    "daemon.drop.before",
    "daemon.drop.after",
    "daemon.complete.after",
    "daemon.fence.before",
    "daemon.fence.after",
    "daemon.plan.before",
    "daemon.plan.after",
    "daemon.parent.before",
    "daemon.parent.after",
    "daemon.finish.after",
)
# passed only where worlds span nodes
CLUSTER_POINTS = (
    "daemon.protect.records.before",
    "daemon.protect.records.after",
    "daemon.protect.segment.before",
    "daemon.protect.segment.after",
    "daemon.protect.fragment.before",
    "daemon.protect.fragment.after",
    "daemon.protect.push.before",
    "daemon.protect.push.after",
    "daemon.protect.done.after",
    "daemon.protect.drop.before",
    "daemon.protect.drop.after",
    "daemon.bring.record.before",
    "daemon.bring.record.after",
    "daemon.repair.before",
    "daemon.repair.after",
)
# passed only where there is a shared tier
FLUSH_POINTS = (
    "daemon.flush.intent.after",
    "daemon.flush.pack.before",
    "daemon.flush.pack.after",
    "daemon.flush.manifest.before",
    "daemon.flush.manifest.after",
    "daemon.flush.commit.before",
    "daemon.flush.commit.after",
    "daemon.flush.done.after",
)
# passed only where the node keeps snapshots on a disk of its own
DISK_POINTS = (
    "daemon.disk.pack.before",
    "daemon.disk.pack.after",
    "daemon.disk.manifest.before",
    "daemon.disk.manifest.after",
    "daemon.disk.drop.before",
    "daemon.disk.pack_drop.before",
    "daemon.disk.done.after",
)
# passed only where this node collects what is garbage in the tier
COLLECT_POINTS = (
    "daemon.gc.look.after",
    "daemon.gc.void.after",
    "daemon.gc.record.before",
    "daemon.gc.manifest.before",
    "daemon.gc.pack.before",
    "daemon.gc.list.before",
    "daemon.gc.list.after",
    "daemon.gc.rewrite.before",
)
POINTS = (*MACHINE_POINTS, *CLUSTER_POINTS, *FLUSH_POINTS, *DISK_POINTS, *COLLECT_POINTS)
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(slots=True)
class _Armed:
    arrivals_left: int
    signal: signal.Signals


_armed: dict[str, _Armed] = {}


def arm(spec: str) -> None:
    """Arm the points that `spec` names; an empty one disarms all. Called once, by main.

    Raises:
        ConfigError: kind `fault_points`: an unknown point or action.
    """
    _armed.clear()
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, _, action = item.partition("=")
        name, _, count = name.partition(":")
        if name not in POINTS or action not in _SIGNALS or (count and not count.isdigit()):
            raise ConfigError(
                f"bad fault point {item!r}", kind="fault_points", hint=f"points: {', '.join(POINTS)}"
            )
        _armed[name] = _Armed(int(count or 1), _SIGNALS[action])


def point(name: str, strike: Callable[[int, int], None] = os.kill) -> None:
    """Say that execution has come to `name`."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    armed.arrivals_left -= 1
    if armed.arrivals_left <= 0:
        del _armed[name]
        strike(os.getpid(), armed.signal)
