"""The checks of `snapd doctor`.

Facts are read from the system in small functions; judging them is pure, so that every verdict has a unit
test.
"""

from __future__ import annotations

import enum
import os
import resource
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snapd.cli.lifetime import check_lifetime
from snapd.config import Paths, unknown_variables
from snapd.errors import SnapdError
from snapd.rpc.local_client import LocalClient
from snapd.units import MIB, format_size

SOCKET_PATH_BYTES_MAX = 107  # sun_path holds 108 bytes, the last of them 0
OPEN_FILES_MIN = 1024


class Verdict(enum.Enum):
    """What a check says."""

    GOOD = "ok"
    WARNING = "warn"
    BAD = "BAD"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's answer; the hint says what to do about it. `kind`: stable, as of errors; only checks of tiers have
    one, where something is wrong.
    """

    check: str
    verdict: Verdict
    found: str
    hint: str = ""
    kind: str = ""


def run_checks(paths: Paths, *, needed_bytes: int) -> list[Finding]:
    """All checks, in the order in which they are shown. `needed_bytes` 0: unknown."""
    group = read_cgroup_limit()
    mount = nearest_existing(paths.arena)
    facts = os.statvfs(mount)
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    hard_memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        judge_shared_memory(mount, size, free, filesystem_type(mount), needed_bytes),
        judge_memory_limit(*group, needed_bytes),
        judge_memlock(hard_memlock, has_gpu=Path("/dev/nvidiactl").exists()),
        judge_open_files(hard_files),
        check_folder("runtime folder", paths.runtime),
        check_folder("arena folder", paths.arena),
        judge_socket_path(paths.runtime / "handshake.sock"),
        check_daemon(paths.runtime),
        check_native(),
        *judge_variables(unknown_variables(os.environ)),
        *(
            Finding(
                check="lifetime",
                verdict=Verdict.WARNING if risk.hint else Verdict.GOOD,
                found=risk.what,
                hint=risk.hint,
            )
            for risk in check_lifetime(paths.runtime, os.environ)
        ),
    ]


# --- memory ------------------------------------------------------------------------------------------------
def judge_shared_memory(path: Path, size: int, free: int, kind: str, needed: int) -> Finding:
    """The file system of the arena: must be memory, and large enough."""
    check = "shared memory"
    found = f"{path}: {kind}, {format_size(free)} free of {format_size(size)}"
    if kind not in ("tmpfs", "hugetlbfs"):
        hint = "the arena must lie in memory: mount a tmpfs there, or put SNAPD_ARENA_DIR in /dev/shm"
        return Finding(check=check, verdict=Verdict.BAD, found=found, hint=hint)
    grow = (
        "docker: --shm-size; Kubernetes: an emptyDir with medium Memory at /dev/shm; else remount with size="
    )
    if needed and free < needed:
        return Finding(
            check=check, verdict=Verdict.BAD, found=f"{found}, {format_size(needed)} needed", hint=grow
        )
    if not needed and size <= 64 * MIB:
        return Finding(check=check, verdict=Verdict.BAD, found=f"{found}: the container default", hint=grow)
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def judge_memory_limit(limit: int | None, used: int, source: str, needed: int) -> Finding:
    """The memory limit of the control group: pages of the arena count against it."""
    check = "memory limit"
    if limit is None:
        return Finding(check=check, verdict=Verdict.GOOD, found=f"no limit ({source})")
    found = f"{format_size(used)} used of {format_size(limit)} ({source})"
    if needed and used + needed > limit:
        hint = "the arena counts against this limit: raise it by the arena's size"
        return Finding(
            check=check, verdict=Verdict.BAD, found=f"{found}, {format_size(needed)} needed", hint=hint
        )
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def judge_memlock(limit: int, *, has_gpu: bool) -> Finding:
    """The limit of locked memory: pinning the arena for a GPU may need it."""
    found = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
    if has_gpu and limit != resource.RLIM_INFINITY:
        hint = "pinning the arena may be refused, copies are slower then: ulimit -l unlimited"
        return Finding(check="locked memory", verdict=Verdict.WARNING, found=found, hint=hint)
    return Finding(
        check="locked memory", verdict=Verdict.GOOD, found=found + ("" if has_gpu else ", no GPU here")
    )


def judge_open_files(limit: int) -> Finding:
    """The limit of open files: each session takes a few descriptors."""
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES_MIN:
        hint = f"ulimit -n {OPEN_FILES_MIN} or more"
        return Finding(check="open files", verdict=Verdict.WARNING, found=str(limit), hint=hint)
    found = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    return Finding(check="open files", verdict=Verdict.GOOD, found=found)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def filesystem_type(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds `path`, from /proc/mounts; "unknown" when it is not there."""
    text = (
        mounts if mounts is not None else Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    )
    best, kind = "", "unknown"
    for line in text.splitlines():
        fields = line.split()
        point = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
        # A later mount on the same point lies on top of the earlier one.
        if point and path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def read_cgroup_limit(
    root: Path = Path("/sys/fs/cgroup"), own: str | None = None
) -> tuple[int | None, int, str]:
    """(limit in bytes or None, bytes used, where that was read): the tightest limit above this process."""
    text = own if own is not None else Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace")
    tightest: tuple[int | None, int, str] = (None, 0, "no memory control group")
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            found = _read_limit(place, *names)
            if found is not None and (
                tightest[0] is None or (found[0] is not None and found[0] < tightest[0])
            ):
                tightest = found
    return tightest


def _read_limit(folder: Path, limit_name: str, used_name: str) -> tuple[int | None, int, str] | None:
    try:
        limit_text = (folder / limit_name).read_text(encoding="ascii").strip()
        used = int((folder / used_name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # the root group has none of these files
    limit = None if limit_text == "max" or int(limit_text) >= 1 << 62 else int(limit_text)
    return limit, used, str(folder / limit_name)


# --- folders and the daemon --------------------------------------------------------------------------------
def check_folder(check: str, path: Path) -> Finding:
    """A folder of the daemon: ours alone, or not there yet."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return Finding(check=check, verdict=Verdict.GOOD, found=f"{path}: not there yet, the daemon makes it")
    except OSError as error:
        return Finding(
            check=check, verdict=Verdict.BAD, found=f"{path}: {error.strerror}", hint="name another folder"
        )
    return judge_folder(check, path, facts.st_mode, facts.st_uid, os.getuid())


def judge_folder(check: str, path: Path, mode: int, owner: int, user: int) -> Finding:
    """Whether a folder's type, owner and mode are what the daemon accepts."""
    found = f"{path}: owner {owner}, mode {stat.S_IMODE(mode):04o}"
    if not stat.S_ISDIR(mode):
        hint = "remove it, or name another folder"
        return Finding(check=check, verdict=Verdict.BAD, found=f"{path} is not a folder", hint=hint)
    if owner != user:
        hint = "it is another user's: name a folder of your own with SNAPD_RUNTIME_DIR and SNAPD_ARENA_DIR"
        return Finding(check=check, verdict=Verdict.BAD, found=found, hint=hint)
    if mode & 0o077:
        return Finding(check=check, verdict=Verdict.BAD, found=found, hint=f"chmod 700 {path}")
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def judge_socket_path(path: Path) -> Finding:
    """Unix sockets have short names."""
    length = len(os.fsencode(path))
    found = f"{length} of {SOCKET_PATH_BYTES_MAX} bytes"
    if length > SOCKET_PATH_BYTES_MAX:
        hint = "set SNAPD_RUNTIME_DIR to a shorter path"
        return Finding(check="socket path", verdict=Verdict.BAD, found=found, hint=hint)
    return Finding(check="socket path", verdict=Verdict.GOOD, found=found)


def check_daemon(runtime: Path, connect: Callable[[Path], LocalClient] = LocalClient) -> Finding:
    """Whether a daemon answers, and what it is."""
    check = "daemon"
    if not (runtime / "handshake.sock").exists():
        found = "none runs; the first trainer starts one (SNAPD_AUTOSTART=0: it does not)"
        return Finding(check=check, verdict=Verdict.GOOD, found=found)
    try:
        with connect(runtime) as client:
            reply = client.status()
    except SnapdError as error:
        hint = error.hint or "see daemon.log in the runtime folder"
        return Finding(check=check, verdict=Verdict.BAD, found=str(error), hint=hint)
    problems = [f"{job.job}: {job.problem}" for job in reply.jobs if job.problem]
    jobs = "1 job" if len(reply.jobs) == 1 else f"{len(reply.jobs)} jobs"
    found = f"snapd {reply.version} answers, pid {reply.pid}, {jobs}"
    if problems:
        hint = "snapd verify shows what is bad; snapd rm JOB gives the job up"
        return Finding(check=check, verdict=Verdict.BAD, found="; ".join([found, *problems]), hint=hint)
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def judge_variables(problems: list[str]) -> list[Finding]:
    """A variable that is misspelt is silently the default; nothing is said where there is none."""
    hint = "`snapd config explain` has the names of all"
    return [
        Finding(check="variables", verdict=Verdict.WARNING, found=problem, hint=hint) for problem in problems
    ]


def check_native() -> Finding:
    """Whether the compiled part loads, and which copy kernel the processor got."""
    try:
        import snapd_native
    except ImportError as error:
        hint = "install snapd with a compiler at hand (g++, python3-dev), or a wheel for this Python"
        return Finding(check="copy engine", verdict=Verdict.BAD, found=str(error), hint=hint)
    return Finding(check="copy engine", verdict=Verdict.GOOD, found=f"kernel {snapd_native.copy_kernel()}")
