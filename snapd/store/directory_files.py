"""How files of a directory tier come to be: written aside, synced, given their name in one step, names synced too.

All through Python's own file functions (`open`, `os.fsync`, `os.link`, `os.rename`, `os.remove`): tools that watch for
what a crash would leave see each step.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from snapd.errors import AuthError, CapacityError, ConfigError, NotFoundError, SnapdError, UnavailableError
from snapd.store.base import Buffer
from snapd.store.surroundings import checked_key, view_of

TMP = ".tmp"
MARKER = ".snapd-tier"
NODE_MARKER = ".snapd-node"  # of a node's own disk: node_folder.py
TOKEN_DIGITS = 32
_VECTORS_MAX = 1024  # IOV_MAX
_PUBLISH_ATTEMPTS = 20
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_NOT_HERE = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_AWAY = {
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENODEV,
    errno.ENXIO,
}
_HINTS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no file descriptors left (fs.file-max)",
    errno.EIO: "the disk reports errors: see the kernel's log (dmesg)",
}


class Publishing(enum.Enum):
    """How a name is given that nobody has yet. In order of preference."""

    LINK = "link"
    NOREPLACE = "rename without replacing"
    RENAME = "rename"  # replaces what somebody else put there meanwhile: for a single writer only


def renamed_without_replacing(source: str, target: str) -> None:
    """renameat2(RENAME_NOREPLACE), which Python's os lacks.

    Raises:
        OSError: EEXIST, or EINVAL or ENOSYS where file system or kernel cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_NOREPLACE)
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, target)


class Root:
    """The folder of a tier. It is never made, and never made again: under it could lie the disk that was unmounted."""

    def __init__(self, path: Path, *, single_writer: bool) -> None:
        self.path = str(path.absolute())
        self._single_writer = single_writer
        self._identity: str | None = None  # of the tier that this process has written to
        self.publishing = Publishing.LINK

    # names

    def path_of(self, key: str) -> str:
        """Where `key` lies; no part of it on the way is a link to elsewhere."""
        parts = checked_key(key).split("/")
        path = self.path
        for part in parts[:-1]:
            path = f"{path}/{part}"
            try:
                if stat.S_ISLNK(os.lstat(path).st_mode):
                    raise ConfigError(f"{path} is a symbolic link: a tier has none", kind="store")
            except FileNotFoundError:
                break
        return f"{self.path}/{key}"

    @contextmanager
    def speaking(self, doing: str, key: str = "") -> Iterator[None]:
        """Errors of the file system in the words of base.py."""
        try:
            yield
        except OSError as error:
            raise self.translated(error, doing, key) from error

    def translated(self, error: OSError, doing: str, key: str) -> SnapdError:
        number = error.errno or 0
        what = f"cannot {doing} {key}" if key else f"cannot {doing}"
        text = f"{what} in {self.path}: {error.strerror or error}"
        if number in (errno.ENOENT, errno.ENOTDIR):
            missing = self.missing()
            return missing or NotFoundError(f"{self.path} has no {key}", kind="object")
        if number in _FULL:
            return CapacityError(
                text,
                kind="store_full",
                hint="free space (df -h) or inodes (df -i), raise the quota, or keep fewer snapshots",
            )
        if number in _DENIED:
            return AuthError(
                text, kind="store_denied", hint="the folder must belong to the user who runs snapd"
            )
        if number in _AWAY:
            return UnavailableError(text, kind="store_unreachable")
        if number in (errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR):
            return ConfigError(text, kind="store")
        return UnavailableError(text, kind="store_failing", hint=_HINTS.get(number, ""), errno=number)

    # the folder itself

    def missing(self) -> SnapdError | None:
        """Why the root cannot be used, if it cannot."""
        try:
            is_folder = stat.S_ISDIR(os.stat(self.path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_folder = False
        except OSError as error:
            return self.translated(error, "look at the folder", "")
        if is_folder:
            return None
        return NotFoundError(
            f"the folder {self.path} is missing",
            kind="bucket",
            hint="mount its disk, or make it once (it is not made by snapd, so that no other disk is filled)",
        )

    def check(self, *, new_identity: str = "") -> None:
        """See that it is there, and the one that it was. `new_identity`: what it is called if it never was a tier.

        Raises:
            NotFoundError: kind `bucket`: it is missing, or another one is in its place.
        """
        missing = self.missing()
        if missing is not None:
            raise missing
        found = self._marker()
        if self._identity is None and not found and new_identity:
            with self.speaking("begin a tier"):
                found = self._marked(new_identity)
        if self._identity is not None and found != self._identity:
            raise NotFoundError(
                f"the folder {self.path} is not the one that it was",
                kind="bucket",
                hint="is its disk still mounted? If it is new on purpose, restart the daemon",
            )
        self._identity = found or None

    def _marker(self) -> str:
        with self.speaking("read", MARKER):
            try:
                with open(f"{self.path}/{MARKER}", "rb") as file:
                    return file.read(64).decode("ascii", "replace").strip()
            except FileNotFoundError:
                return ""

    def _marked(self, identity: str) -> str:
        """Make the marker; of several who do at once, one wins."""
        self._make_folder(f"{self.path}/{TMP}")
        temporary = f"{self.path}/{TMP}/{identity}.marker"
        write_synced(temporary, f"{identity}\n".encode())
        try:
            self._named(temporary, f"{self.path}/{MARKER}")
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)
        sync_folder(self.path)
        return self._marker()

    # giving names

    def begin(self, key: str, token: str) -> TemporaryFile:
        """A file that will be `key`."""
        self.path_of(key)
        self.check(new_identity=token)
        with self.speaking("write", key):
            self._make_folder(f"{self.path}/{TMP}")
            return TemporaryFile(self, key, token)

    def publish(self, temporary: str, key: str, *, is_replacing: bool) -> bool:
        """Give a synced file its name, and sync that too. False: the name is taken; nothing was changed."""
        target = self.path_of(key)
        for _ in range(_PUBLISH_ATTEMPTS):
            self.check()  # writing may have taken long: no folder is made below another tier, or none
            self._make_parents(key)
            try:
                if is_replacing:
                    os.replace(temporary, target)
                elif not self._named(temporary, target):
                    return False
            except FileNotFoundError:
                if not os.path.exists(temporary):
                    raise UnavailableError(
                        f"what was written for {key} in {self.path} was removed by somebody else",
                        kind="store_failing",
                    ) from None
                continue  # a folder that had become empty was removed just now
            self.sync_parents(key)
            return True
        raise UnavailableError(f"the folders of {key} in {self.path} do not stay", kind="store_failing")

    def _named(self, temporary: str, target: str) -> bool:
        """One step from no such name to the whole file. False: the name is taken."""
        try:
            if self.publishing is Publishing.LINK:
                os.link(temporary, target, follow_symlinks=False)
            elif self.publishing is Publishing.NOREPLACE:
                renamed_without_replacing(temporary, target)
            else:
                if os.path.lexists(target):
                    return False
                os.rename(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NOT_HERE or not self._is_worth_another_way():
                raise
            return self._named(temporary, target)
        return True

    def _is_worth_another_way(self) -> bool:
        """Fall back to the next way of publishing; False: there is none."""
        if self.publishing is Publishing.LINK:
            self.publishing = Publishing.NOREPLACE
            return True
        if self.publishing is Publishing.RENAME:
            return False
        if not self._single_writer:
            raise ConfigError(
                f"the file system of {self.path} knows neither links nor renaming without replacing:"
                " two writers could overwrite one another's commits",
                kind="store_conditional",
                hint="another file system, or tier.single_writer=yes if nobody else writes there",
            )
        self.publishing = Publishing.RENAME
        return True

    def _make_parents(self, key: str) -> None:
        path = self.path
        for part in key.split("/")[:-1]:
            path = f"{path}/{part}"
            self._make_folder(path)

    def _make_folder(self, path: str) -> None:
        try:
            is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            return
        if not is_folder:
            raise ConfigError(f"{path} is no folder: a tier has no links and no other files", kind="store")

    def sync_parents(self, key: str) -> None:
        """Sync the folders from the key's own up to the root: any of them may be new, whoever made it."""
        parts = key.split("/")[:-1]
        for depth in range(len(parts), -1, -1):
            with suppress(FileNotFoundError):  # became empty by a deletion, which syncs for itself
                sync_folder("/".join([self.path, *parts[:depth]]))


class TemporaryFile:
    """A file on its way, named so that others see for which key, and can remove it."""

    def __init__(self, root: Root, key: str, token: str) -> None:
        self._root = root
        self.key = key
        self.path = f"{root.path}/{TMP}/{temporary_name(key, token)}"
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - closed by publish or discard
        os.fchmod(self._file.fileno(), 0o600)
        self.nbytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.nbytes += write_all(self._file.fileno(), buffers)

    def publish(self, *, is_replacing: bool = False) -> bool:
        """Sync it and give it its name. False: the name is taken."""
        os.fsync(self._file.fileno())
        self._file.close()
        return self._root.publish(self.path, self.key, is_replacing=is_replacing)

    def synced_s(self) -> float:
        """When it was written, by the clock of whoever keeps the file system."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime

    def discard(self) -> None:
        """Remove it, if it is still there. Its name stays if it has got it."""
        self._file.close()
        with suppress(OSError):  # a leftover is listed among the unfinished
            os.remove(self.path)


def temporary_name(key: str, token: str) -> str:
    return f"{token}.{key.replace('/', '+')}"


def parsed_temporary(name: str) -> tuple[str, str] | None:
    """(key, token); None: not one of ours."""
    token, dot, rest = name.partition(".")
    if not dot or len(token) != TOKEN_DIGITS or not all(c in "0123456789abcdef" for c in token):
        return None
    key = rest.replace("+", "/")
    try:
        return checked_key(key), token
    except ConfigError:
        return None


def write_all(descriptor: int, buffers: Sequence[Buffer]) -> int:
    """Write all of the buffers, not copied; how many bytes."""
    views = [view for view in map(view_of, buffers) if view.nbytes]
    total, done = sum(view.nbytes for view in views), 0
    while views:
        count = os.writev(descriptor, views[:_VECTORS_MAX])
        done += count
        while views and count >= views[0].nbytes:
            count -= views.pop(0).nbytes
        if views and count:
            views[0] = views[0][count:]
    assert done == total
    return total


def write_synced(path: str, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o600)
        write_all(file.fileno(), [data])
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
