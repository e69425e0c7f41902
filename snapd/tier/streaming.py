"""Chunks out of packs, streamed: neighbours come in one ranged read, each is decoded and hashed where it belongs.

A few threads, each with a buffer of its own, take runs of chunks one after the other; while one waits for the store,
others decompress, hash and copy. What that takes is bounded whatever is read: THREADS buffers of RUN_BYTES, and
`LARGE_BYTES` for chunks that are larger than such a buffer. A chunk that is stored as it is, is read to its place.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from snapd.codec.compress import ChunkDecoder
from snapd.core.stored import Encoding, StoredChunk
from snapd.errors import IntegrityError, NotFoundError, SnapdError
from snapd.store.base import Store
from snapd.units import KIB, MIB

T = TypeVar("T")
R = TypeVar("R")
THREADS = 6
RUN_BYTES = 8 * MIB  # of one ranged read
GAP_BYTES = 128 * KIB  # that nobody wants, read along rather than asking twice
DIRECT_BYTES = 256 * KIB  # on a disk a chunk of this size that is stored as it is has a read of its own
DIRECT_FAR_BYTES = RUN_BYTES  # the same where each read costs a round to a server, tens of milliseconds
LARGE_BYTES = 128 * MIB  # for chunks beyond RUN_BYTES: stored and raw


class Fault(enum.Enum):
    """Why a chunk did not come. BAD: proved wrong there; GONE: its pack is not there (any more); AWAY: the store does
    not answer, or refuses: nothing is known of the chunk. STOPPED: the caller called the work off.
    """

    BAD = "bad"
    GONE = "gone"
    AWAY = "away"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Miss:
    """A chunk that did not come; `what` names object and byte."""

    index: int
    chunk: StoredChunk
    fault: Fault
    what: str
    error: SnapdError | None = None


@dataclass(frozen=True, slots=True)
class Want:
    """Chunk number `index` of a shard, and where it is stored."""

    index: int
    chunk: StoredChunk


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks of one pack that one ranged read brings."""

    pack: str
    wants: tuple[Want, ...]

    @property
    def offset(self) -> int:
        return self.wants[0].chunk.offset

    @property
    def nbytes(self) -> int:
        return max(want.chunk.offset + want.chunk.stored_nbytes for want in self.wants) - self.offset


Place = Callable[[int], memoryview]
"""Chunk index -> where its raw bytes go, as large as the chunk. Called on a thread of the pool, once for each try."""
Done = Callable[[int, memoryview], None]
"""The chunk is at its place, and is what its hash says. On a thread of the pool."""


def _is_direct(chunk: StoredChunk, direct_bytes: int) -> bool:
    return chunk.encoding is Encoding.RAW and chunk.nbytes >= direct_bytes


def plan_runs(wants: Sequence[Want], *, direct_bytes: int = DIRECT_BYTES) -> list[Run]:
    """Cut what is wanted into runs, in the order of the packs. Pure.

    `direct_bytes`: from this size on a chunk that is stored as it is is a run of its own, read to its place.
    """
    runs: list[Run] = []
    current: list[Want] = []
    end = 0
    for want in sorted(wants, key=lambda want: (want.chunk.pack, want.chunk.offset, want.index)):
        chunk = want.chunk
        stop = max(end, chunk.offset + chunk.stored_nbytes)
        is_joined = (
            current
            and chunk.pack == current[0].chunk.pack
            and not _is_direct(chunk, direct_bytes)
            and not _is_direct(current[-1].chunk, direct_bytes)
            and chunk.offset - end <= GAP_BYTES
            and stop - current[0].chunk.offset <= RUN_BYTES
        )
        if current and not is_joined:
            runs.append(Run(current[0].chunk.pack, tuple(current)))
            current = []
        end = stop if current else chunk.offset + chunk.stored_nbytes
        current.append(want)
    if current:
        runs.append(Run(current[0].chunk.pack, tuple(current)))
    return runs


class _Budget:
    """So many bytes may be lent at once; what is larger than that waits until nothing is lent."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lent = 0
        self._changed = threading.Condition()

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._lent or self._lent + nbytes <= self._nbytes)
            self._lent += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._lent -= nbytes
                self._changed.notify_all()


class ReadPool:
    """The threads and the memory of reading; one for all shards that a process reads. `close` joins the threads.

    Buffers live as long as work goes on: `trim` gives them back.
    """

    def __init__(self, *, threads: int = THREADS, large_bytes: int = LARGE_BYTES) -> None:
        self.threads = threads
        self.decoder = ChunkDecoder()  # keeps scratch for each thread
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="snapd-read")
        self._large = _Budget(large_bytes)
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []

    def read(
        self,
        store: Store,
        key_of: Callable[[str], str],
        wants: Sequence[Want],
        place: Place,
        *,
        done: Done | None = None,
        stop: threading.Event | None = None,
    ) -> list[Miss]:
        """Bring the chunks to their places. Blocking; returns when no thread touches a place any more.

        `key_of`: pack name -> the key of its object. Returns what did not come; bytes at its place are then undefined.
        A store that does not answer once is not asked for the rest.
        """
        direct_bytes = DIRECT_BYTES if hasattr(store, "read_through") else DIRECT_FAR_BYTES
        work = _Work(self, store, key_of, place, done, stop or threading.Event(), direct_bytes)
        runs = plan_runs(wants, direct_bytes=direct_bytes)
        futures = [self._executor.submit(work.take, run) for run in runs]
        for future in futures:  # all of them end before this returns: they write to the caller's memory
            if future.exception() is not None:
                work.stop.set()
        misses = [miss for future in futures for miss in future.result()]
        return sorted(misses, key=lambda miss: miss.index)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each, at once; the first error is raised when all have ended."""
        futures = [self._executor.submit(function, item) for item in items]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[memoryview]:
        """Memory for the stored bytes of one run."""
        if nbytes > RUN_BYTES:
            yield memoryview(bytearray(nbytes))
            return
        with self._lock:
            buffer = self._buffers.pop() if self._buffers else bytearray(RUN_BYTES)
        try:
            yield memoryview(buffer)[:nbytes]
        finally:
            with self._lock:
                self._buffers.append(buffer)

    @contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Wait until a large chunk fits beside the others."""
        with self._large.lend(nbytes):
            yield

    def trim(self) -> None:
        """Give the memory of idle buffers back."""
        with self._lock:
            self._buffers.clear()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.trim()


@dataclass(slots=True)
class _Work:
    """One call of `read`, on the threads of the pool."""

    pool: ReadPool
    store: Store
    key_of: Callable[[str], str]
    place: Place
    done: Done | None
    stop: threading.Event
    direct_bytes: int
    away: SnapdError | None = None

    def take(self, run: Run) -> list[Miss]:
        if self.stop.is_set():
            return [Miss(w.index, w.chunk, Fault.STOPPED, "called off") for w in run.wants]
        if self.away is not None:
            return [self._miss(want, Fault.AWAY, self.away) for want in run.wants]
        if len(run.wants) == 1 and _is_direct(run.wants[0].chunk, self.direct_bytes):
            return self._take_direct(run.wants[0])
        if run.nbytes <= RUN_BYTES:
            return self._take_run(run)
        with self.pool.room(run.nbytes + sum(want.chunk.nbytes for want in run.wants)):
            return self._take_run(run)

    def _take_direct(self, want: Want) -> list[Miss]:
        view, key = self.place(want.index), self.key_of(want.chunk.pack)
        through = getattr(self.store, "read_through", None)
        try:
            if through is None:
                self.store.read_into(key, want.chunk.offset, view)
                return self._checked(want, view, view)
            digest = xxhash.xxh3_128()
            through(key, want.chunk.offset, view, digest.update)
        except SnapdError as error:
            return [self._failed(want, error)]
        if digest.digest() != want.chunk.digest:
            return self._checked(want, view, view)  # says what is wrong
        if self.done is not None:
            self.done(want.index, view)
        return []

    def _take_run(self, run: Run) -> list[Miss]:
        with self.pool.buffer(run.nbytes) as stored:
            try:
                self.store.read_into(self.key_of(run.pack), run.offset, stored)
            except IntegrityError as error:  # the pack ends early: what of it is there?
                if len(run.wants) == 1:
                    return [self._failed(run.wants[0], error)]
            except SnapdError as error:
                return [self._failed(want, error) for want in run.wants]
            else:
                return [miss for want in run.wants for miss in self._decode(want, stored, run.offset)]
        return [miss for want in run.wants for miss in self.take(Run(run.pack, (want,)))]

    def _decode(self, want: Want, stored: memoryview, offset: int) -> list[Miss]:
        start = want.chunk.offset - offset
        return self._checked(want, stored[start : start + want.chunk.stored_nbytes], self.place(want.index))

    def _checked(self, want: Want, stored: memoryview, view: memoryview) -> list[Miss]:
        """Decode into place, or only check what is there already."""
        try:
            self.pool.decoder.decode(stored, want.chunk, view)
        except IntegrityError as error:
            return [self._miss(want, Fault.BAD, error)]
        if self.done is not None:
            self.done(want.index, view)
        return []

    def _failed(self, want: Want, error: SnapdError) -> Miss:
        if isinstance(error, NotFoundError) and error.kind == "object":
            return self._miss(want, Fault.GONE, error)
        if isinstance(error, IntegrityError):
            return self._miss(want, Fault.BAD, error)
        self.away = error
        return self._miss(want, Fault.AWAY, error)

    def _miss(self, want: Want, fault: Fault, error: SnapdError) -> Miss:
        where = f"{self.key_of(want.chunk.pack)} at byte {want.chunk.offset}"
        return Miss(want.index, want.chunk, fault, f"{where}: {error.message}", error)
