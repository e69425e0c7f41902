"""The folder of a node's own disk: it belongs to one daemon alone, for as long as that lives.

The file `.snapd-node` in it is locked (flock); it names the folder, and says whose it is. By it others see that the
folder is no shared tier. The folder is never made: where it is missing, its disk is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path

from snapd.core.tier_keys import JOBS
from snapd.errors import ConfigError, ConflictError, NotFoundError, SnapdError
from snapd.store.directory_files import NODE_MARKER, Root

_IDENTITY = re.compile(r"[0-9a-f]{32}")


class NodeFolder:
    """Not thread-safe. `owner`: the node and its process, in words, for whoever comes second. `token`: 32 hexadecimal
    digits, the name of the folder if it has none yet.
    """

    def __init__(self, path: Path, owner: str, token: str) -> None:
        self._path = path.absolute()
        self._owner = owner
        self.identity = token
        self._root = Root(path, single_writer=True)
        self._descriptor = -1

    def take(self) -> str:
        """Lock it, or see that it is locked by us still. Returns what a person should look at; empty: nothing.

        Raises:
            ConflictError: kind `disk_in_use`: another daemon has it. ConfigError: kind `disk_shared`: it is a shared
            tier. What a store raises: it is missing, not ours, ...
        """
        missing = self._root.missing()
        if missing is not None:
            raise missing
        if self._descriptor >= 0:
            self._check_same()
            return ""
        with self._root.speaking("look into the folder"):
            was_empty = not set(os.listdir(self._path)) - {NODE_MARKER}
            self._refuse_shared()
        self._lock()
        return f"{self._path} was empty: if a disk should be mounted there, it is not" if was_empty else ""

    def close(self) -> None:
        """Let go of the lock. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_same(self) -> None:
        """The locked file is the one that lies there: else another disk, or none, has come to light."""
        found = None
        with self._root.speaking("look at", NODE_MARKER), contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path / NODE_MARKER, follow_symlinks=False)
        held = os.fstat(self._descriptor)
        if found is not None and (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino):
            return
        raise NotFoundError(
            f"the folder {self._path} is not the one that it was",
            kind="bucket",
            hint="is its disk still mounted? After another one was mounted on purpose, start the daemon again",
        )

    def _refuse_shared(self) -> None:
        """Commit records are what a shared tier is made of."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for job in os.listdir(self._path / JOBS):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    if os.listdir(self._path / JOBS / job / "snapshots"):
                        raise ConfigError(
                            f"{self._path} is used as a shared tier: it has commit records (of job {job!r})",
                            kind="disk_shared",
                            hint="give tier.node a folder of its own",
                        )

    def _lock(self) -> None:
        path = self._path / NODE_MARKER
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        with self._root.speaking("lock", NODE_MARKER):  # for reading: it must not keep the disk writable
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o600)
        try:
            self._lock_descriptor(descriptor)
            found, _, _ = _parted(descriptor)
            self.identity = found if _IDENTITY.fullmatch(found) else self.identity
            with open(os.open(path, os.O_WRONLY | os.O_TRUNC | flags), "wb", buffering=0) as file:
                file.write(f"{self.identity}\n{self._owner}\n".encode())
                os.fsync(file.fileno())
        except OSError as error:
            os.close(descriptor)
            raise self._root.translated(error, "lock", NODE_MARKER) from error
        except SnapdError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _lock_descriptor(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _, _, holder = _parted(descriptor)
            raise ConflictError(
                f"another daemon keeps its snapshots in {self._path} ({holder or 'it is just starting'})",
                kind="disk_in_use",
                hint="each daemon needs a folder of its own: set tier.node (SNAPD_TIER_NODE), or stop the other one",
            ) from None


def _parted(descriptor: int) -> tuple[str, str, str]:
    """(identity, "", owner) as the file says."""
    return os.pread(descriptor, 400, 0).decode("utf-8", "replace").strip().partition("\n")


def is_node_folder(path: Path) -> bool:
    """Whether a folder is some node's own disk."""
    return os.path.lexists(path / NODE_MARKER)
