"""The two folders of a daemon: private, checked, locked. See "One node on disk" in ARCHITECTURE.md."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from snapd.errors import ConfigError, ConflictError, IntegrityError

FORMAT_VERSION = "1"
DATA_PATTERNS = ("rank-*.seg-*", "session-*.ctl", "parity.seg-*")


def private_folder(path: Path) -> Path:
    """Create `path` as a 0700 folder of ours, or check that it is one.

    Raises: ConfigError: kind `folder`: a symbolic link, not a folder, another owner, open to others, or not
        to be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        facts = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}", kind="folder") from error
    wrong = ""
    if stat.S_ISLNK(facts.st_mode):
        wrong = "is a symbolic link"
    elif not stat.S_ISDIR(facts.st_mode):
        wrong = "is not a folder"
    elif facts.st_uid != os.getuid():
        wrong = f"belongs to user {facts.st_uid}, not to {os.getuid()}"
    elif stat.S_IMODE(facts.st_mode) & 0o077:
        wrong = f"is open to others (mode {stat.S_IMODE(facts.st_mode):04o}, must be 0700)"
    if wrong:
        raise ConfigError(f"{path} {wrong}", kind="folder", hint="remove it, or name another folder")
    return path


@dataclass(slots=True)
class FolderLock:
    """An exclusive lock on a file that holds our pid; released by `close` or by the end of the process."""

    descriptor: int

    @classmethod
    def take(cls, path: Path) -> FolderLock:
        """Lock `path`.

        Raises:
            ConflictError: kind `already_running`: another daemon has it; its pid is in the message.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise ConflictError(
                f"another daemon serves {path.parent} (pid {pid})",
                kind="already_running",
                hint="use it, or stop it, or name other folders: SNAPD_RUNTIME_DIR, SNAPD_ARENA_DIR",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass(frozen=True, slots=True)
class ArenaFolder:
    """Paths of the arena. Job names are checked before they get here."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> ArenaFolder:
        """Create or check the tree.

        Raises:
            ConfigError: as `private_folder`.
            IntegrityError: kind `arena_version`: the tree is of another format version.
        """
        private_folder(path)
        private_folder(path / "jobs")
        version = path / "VERSION"
        try:
            found = version.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            temporary = path / ".VERSION.new"
            temporary.write_text(FORMAT_VERSION + "\n", encoding="ascii")
            os.replace(temporary, version)
            found = FORMAT_VERSION
        if found != FORMAT_VERSION:
            raise IntegrityError(
                f"the arena {path} has format version {found[:16]!r}, this daemon knows {FORMAT_VERSION}",
                kind="arena_version",
                hint="use the snapd that made it, or move the folder away",
            )
        return cls(path)

    def job_names(self) -> list[str]:
        return sorted(entry.name for entry in (self.path / "jobs").iterdir() if entry.is_dir())

    def job(self, name: str) -> JobFolder:
        return JobFolder(self.path / "jobs" / name)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """One job's files."""

    path: Path

    @property
    def index(self) -> Path:
        return self.path / "index.db"

    def segment(self, rank: int, segment: int) -> Path:
        return self.path / f"rank-{rank}.seg-{segment}"

    def parity_segment(self, number: int) -> Path:
        return self.path / f"parity.seg-{number}"

    def page(self, session_id: int) -> Path:
        return self.path / f"session-{session_id}.ctl"

    def has_data(self) -> bool:
        """True when there are segments or pages: an index must have been here."""
        return any(any(self.path.glob(pattern)) for pattern in DATA_PATTERNS)

    def remove(self) -> int:
        """Delete everything; returns the segments' bytes. Trainers that still map them are not harmed."""
        freed = 0
        if not self.path.is_dir():
            return 0
        self.index.unlink(missing_ok=True)  # first: what is left without an index is never taken for a job
        for entry in self.path.iterdir():
            if ".seg-" in entry.name:
                freed += entry.lstat().st_blocks * 512
            entry.unlink(missing_ok=True)
        self.path.rmdir()
        return freed
