"""How much more the arena may take: the file system, the cgroup, the machine, the configured size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snapd.core.capacity import Limit

_V1_UNLIMITED = 1 << 60
INDEX_RESERVE_BYTES = (
    16 << 20
)  # of the file system, for indexes and control pages: they must never find it full


def arena_limits(
    arena: Path, *, configured_bytes: int, backed_bytes: int, headroom_bytes: int
) -> list[Limit]:
    """Return every bound that applies now. `configured_bytes` 0: no bound of ours."""
    facts = os.statvfs(arena)
    limits = [
        Limit(
            f"free space of {arena}",
            facts.f_bavail * facts.f_frsize - INDEX_RESERVE_BYTES,
            "enlarge the shared memory: `--shm-size` of the container, `emptyDir.sizeLimit` of the pod",
        )
    ]
    if configured_bytes:
        limits.append(
            Limit("arena_bytes", configured_bytes - backed_bytes, "raise SNAPD_ARENA_BYTES (arena.bytes)")
        )
    available = _meminfo_available()
    if available is not None:
        limits.append(
            Limit("free memory of the machine", available - headroom_bytes, "use a machine with more memory")
        )
    group = _cgroup_available()
    if group is not None:
        limits.append(
            Limit(
                "memory limit of the cgroup",
                group - headroom_bytes,
                "raise the memory limit of the container",
            )
        )
    return limits


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def _cgroup_available() -> int | None:
    """The least that is left in our memory cgroup and those above it; None without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found.extend(_left_on_the_way(Path("/sys/fs/cgroup"), path, _left_v2))
        elif "memory" in controllers.split(","):
            found.extend(_left_on_the_way(Path("/sys/fs/cgroup/memory"), path, _left_v1))
    return min(found, default=None)


def _left_on_the_way(root: Path, path: str, left: Callable[[Path], int | None]) -> list[int]:
    folder = root / path.lstrip("/")
    if not folder.is_dir():
        folder = root  # inside a container the path is the host's
    found: list[int] = []
    while True:
        value = left(folder)
        if value is not None:
            found.append(value)
        if folder == root or root not in folder.parents:
            return found
        folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path, prefix: str) -> int:
    total = 0
    try:
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                total += int(value)
    except (OSError, ValueError):
        return total
    return total


def _left_v2(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    return None if limit is None or used is None else limit - used + _reclaimable(folder, "")


def _left_v1(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _V1_UNLIMITED:
        return None
    return limit - used + _reclaimable(folder, "total_")
