"""A durable tier in a directory: of a local disk, or of a shared file system.

An object is a file below the root, 0600 in folders 0700. What is being written lies in `.tmp/`, named after its key,
and gets its name in one step by a link; see directory_files.py. The clock is the file system's own. A file system that
hangs holds its caller up: deadlines cannot be kept here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from snapd.errors import ConfigError, IntegrityError, NotFoundError
from snapd.store.base import Buffer, Created, ObjectInfo, Probe, Requests
from snapd.store.directory_files import (
    NODE_MARKER,
    TMP,
    Publishing,
    Root,
    TemporaryFile,
    parsed_temporary,
    sync_folder,
    temporary_name,
)
from snapd.store.probing import PROBE, probe_conditional
from snapd.store.surroundings import Meter, StoreClock, Surroundings, checked_key, checked_prefix, view_of

_PIECE = 1 << 20
_CLOCK = f"{PROBE}clock"


class DirectoryStore:
    """See base.Store. `root` must exist."""

    def __init__(self, root: Path, surroundings: Surroundings, *, single_writer: bool = False) -> None:
        self._root = Root(root, single_writer=single_writer)
        self._surroundings = surroundings
        self._meter = Meter()
        self._clock = StoreClock(surroundings.monotonic_s)

    @property
    def description(self) -> str:
        return self._root.path

    @property
    def requests(self) -> Requests:
        return self._meter.requests

    # what it can do

    def probe(self) -> Probe:
        missing = self._root.missing()
        if missing is not None:
            raise missing
        with self._root.speaking("look into the folder"):
            there = os.listdir(self._root.path)
        if NODE_MARKER in there:
            raise ConfigError(
                f"{self.description} is the own disk of a node (tier.node): it cannot be a shared tier, too",
                kind="disk_shared",
                hint="give tier.shared a folder of its own",
            )
        was_empty = not there
        skew_s = self._asked_clock_s() - self._surroundings.wall_s()
        refuses, problems = probe_conditional(self, self._surroundings.random_token())
        if refuses and self._root.publishing is Publishing.RENAME:
            refuses = False
            problems.append(
                f"the file system of {self.description} knows neither links nor renaming without replacing"
            )
        if was_empty:
            problems.append(f"{self.description} was empty: if a disk should be mounted there, it is not")
        return Probe(refuses, True, skew_s, tuple(problems))

    def now_s(self) -> float:
        now = self._clock.now_s()
        return self._asked_clock_s() if now is None else now

    def _asked_clock_s(self) -> float:
        """The time that the file system gives to a file of ours."""
        with self._root.speaking("ask the clock"):
            file = self._root.begin(_CLOCK, self._surroundings.random_token())
            try:
                file.write([b"\n"])
                now = file.synced_s()
            finally:
                file.discard()
        self._clock.heard(now)
        return now

    # writing

    def create(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> Created:
        with self._root.speaking("create", key):
            if self._published(key, data, is_replacing=False):
                return Created.OURS
            if self._read(key, view_of(data).nbytes + 1) != bytes(data):
                return Created.ANOTHERS
            self._root.sync_parents(key)  # whoever named it may have ended before that
            return Created.OURS

    def put(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> None:
        with self._root.speaking("write", key):
            self._published(key, data, is_replacing=True)

    def _published(self, key: str, data: Buffer, *, is_replacing: bool) -> bool:
        file = self._root.begin(key, self._surroundings.random_token())
        try:
            file.write([data])
            self._meter.add("put", sent_nbytes=file.nbytes)
            return file.publish(is_replacing=is_replacing)
        finally:
            file.discard()

    def upload(self, key: str, *, nbytes: int | None = None) -> DirectoryUpload:
        file = self._root.begin(key, self._surroundings.random_token())
        return DirectoryUpload(self._root, self._meter, file)

    # reading

    def read(self, key: str, *, max_nbytes: int, deadline_s: float | None = None) -> bytes:
        with self._root.speaking("read", key):
            data = self._read(key, max_nbytes + 1)
        if len(data) > max_nbytes:
            raise IntegrityError(
                f"{key} in {self.description} has more than {max_nbytes} bytes", kind="store_bytes"
            )
        return data

    def _read(self, key: str, nbytes_max: int) -> bytes:
        pieces: list[bytes] = []
        left = nbytes_max
        descriptor = self._opened(key)
        try:
            while left > 0:
                piece = os.read(descriptor, min(left, _PIECE))
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
        finally:
            os.close(descriptor)
        self._meter.add("get", received_nbytes=nbytes_max - left)
        return b"".join(pieces)

    def read_into(
        self, key: str, offset: int, buffer: memoryview, *, deadline_s: float | None = None
    ) -> None:
        self.read_through(key, offset, buffer, None)

    def read_through(
        self, key: str, offset: int, buffer: memoryview, taken: Callable[[memoryview], None] | None
    ) -> None:
        """As `read_into`; `taken` gets each piece while it is in the processor's cache."""
        view = view_of(buffer)
        piece = _PIECE if taken is not None else view.nbytes
        done = 0
        with self._root.speaking("read", key):
            descriptor = self._opened(key)
            try:
                while done < view.nbytes:
                    count = os.preadv(descriptor, [view[done : done + piece]], offset + done)
                    if count == 0:
                        break
                    if taken is not None:
                        taken(view[done : done + count])
                    done += count
            finally:
                os.close(descriptor)
        self._meter.add("get", received_nbytes=done)
        if done < view.nbytes:
            raise IntegrityError(
                f"{key} in {self.description} ends at {offset + done}, {offset + view.nbytes} were expected",
                kind="store_bytes",
            )

    def _opened(self, key: str) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._root.path_of(key), flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NotFoundError(f"{key} in {self.description} is no file", kind="object")
        return descriptor

    def head(self, key: str, *, deadline_s: float | None = None) -> ObjectInfo:
        self._meter.add("head")
        with self._root.speaking("look at", key):
            found = os.lstat(self._root.path_of(key))
        if not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"{key} in {self.description} is no file", kind="object")
        return ObjectInfo(key, found.st_size, found.st_mtime)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        checked_prefix(prefix)
        self._root.check()
        folder = prefix.rpartition("/")[0]
        self._meter.add("list")
        with self._root.speaking("list", prefix):
            if folder:
                self._root.path_of(f"{folder}/x")
            yield from self._walked(folder, prefix)

    def _walked(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        path = f"{self._root.path}/{folder}" if folder else self._root.path
        try:
            with os.scandir(path) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or not (key.startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walked(key, prefix)
                elif entry.is_file(follow_symlinks=False) and key.startswith(prefix):
                    facts = entry.stat(follow_symlinks=False)
                    yield ObjectInfo(key, facts.st_size, facts.st_mtime)
            except FileNotFoundError:
                continue  # deleted meanwhile

    # deleting

    def delete(self, keys: Sequence[str]) -> None:
        folders: dict[str, None] = {}
        self._root.check()
        for key in keys:
            with self._root.speaking("delete", key):
                self._meter.add("delete")
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.remove(self._root.path_of(key))
                folders[key.rpartition("/")[0]] = None
        for folder in folders:
            with self._root.speaking("delete in", folder):
                self._synced_without_empty(folder)

    def _synced_without_empty(self, folder: str) -> None:
        """Remove the folder and those above while they are empty; sync the first that stays."""
        while folder:
            try:
                os.rmdir(f"{self._root.path}/{folder}")
            except FileNotFoundError:
                pass
            except OSError:  # not empty
                break
            folder = folder.rpartition("/")[0]
        with suppress(FileNotFoundError):
            sync_folder(f"{self._root.path}/{folder}")

    def unfinished(self) -> Iterator[tuple[str, str, float]]:
        self._root.check()
        self._meter.add("list")
        with self._root.speaking("list", TMP):
            try:
                entries = list(os.scandir(f"{self._root.path}/{TMP}"))
            except FileNotFoundError:
                return
            for entry in entries:
                parsed = parsed_temporary(entry.name)
                if parsed is None:
                    continue
                with suppress(FileNotFoundError):
                    yield (*parsed, entry.stat(follow_symlinks=False).st_mtime)

    def abort_unfinished(self, key: str, token: str) -> None:
        checked_key(key)
        name = temporary_name(key, token)
        assert parsed_temporary(name) == (key, token), name
        self._meter.add("abort")
        with self._root.speaking("remove what is unfinished of", key), suppress(FileNotFoundError):
            os.remove(f"{self._root.path}/{TMP}/{name}")

    def close(self) -> None:
        """Nothing is held open between calls."""


class DirectoryUpload:
    """See base.Upload."""

    def __init__(self, root: Root, meter: Meter, file: TemporaryFile) -> None:
        self._root = root
        self._meter = meter
        self._file = file

    def write(self, buffers: Sequence[Buffer]) -> None:
        before = self._file.nbytes
        with self._root.speaking("write", self._file.key):
            self._file.write(buffers)
        self._meter.add("part", sent_nbytes=self._file.nbytes - before)

    def commit(self) -> int:
        key = self._file.key
        with self._root.speaking("publish", key):
            if not self._file.publish():
                if not _are_equal(self._file.path, self._root.path_of(key)):
                    raise IntegrityError(
                        f"{self._root.path} has another object {key} already", kind="store_bytes"
                    )
                self._root.sync_parents(key)
            self._file.discard()
        self._meter.add("complete")
        return self._file.nbytes

    def abort(self) -> None:
        self._file.discard()


def _are_equal(one: str, other: str) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            piece = first.read(_PIECE)
            if piece != second.read(_PIECE):
                return False
            if not piece:
                return True
