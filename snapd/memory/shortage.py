"""Errors of the system that say nothing about a file: descriptors, memory or room are lacking just now."""

from __future__ import annotations

import contextlib
import errno
import resource
import sqlite3

from snapd.errors import CapacityError

OPEN_FILES = 1 << 16  # enough for any node; programs that look at every descriptor are slow with far more
_DESCRIPTORS_HINT = "raise the limit of open files (ulimit -n)"
_LACKING = {
    errno.EMFILE: _DESCRIPTORS_HINT,
    errno.ENFILE: "the machine has no file descriptors left (fs.file-max)",
    errno.ENOMEM: "the machine has no memory left for it",
    errno.ENOSPC: "free shared memory: other files lie there, too",
    errno.EDQUOT: "free shared memory, or raise the quota",
}


def shortage(error: OSError, what: str, *, job: str = "") -> CapacityError | None:
    """What `error` means where something is lacking; None: it is about the file itself. `what`: could not be done."""
    hint = _LACKING.get(error.errno or 0)
    if hint is None:
        return None
    context = {"job": job} if job else {}
    return CapacityError(f"{what}: {error.strerror or error}", kind="files", hint=hint, **context)


def index_shortage(error: sqlite3.Error, job: str) -> CapacityError | None:
    """The same of an index: it could not be opened, or has no memory to work with; nothing is known of its bytes."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM):
        return None
    return CapacityError(
        f"the index of job {job!r} cannot be opened: {error}", kind="files", hint=_DESCRIPTORS_HINT, job=job
    )


def raise_open_files() -> None:
    """Allow this process as many descriptors as its user may have: each session, and each request to a store, takes
    some. A kernel that refuses leaves the limit as it was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
