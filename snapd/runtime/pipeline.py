"""The threads and the memory of coding: few, of low priority, shared by all jobs of the node, and bounded.

A piece is a buffer for one chunk or fragment. No more than `bytes_max` of pieces are ever lent at once (a request that
is larger than that is allowed alone, when nothing else is lent), so what the coding of many rows takes does not depend
on how many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from snapd.errors import UnavailableError
from snapd.units import MIB

BUFFER_BYTES_DEFAULT = 128 * MIB
BATCH_BYTES = 16 * MIB  # what one thread takes at once: more would leave the cache before it is coded
THREADS_DEFAULT = 2
BRING_THREADS_DEFAULT = (
    4  # for recovery: nobody trains while a restore waits, so these are threads like any other
)
NICE = 5  # below training; lower, a thread that is preempted while it holds the GIL would hold up the daemon's loop
_WAIT_S = 0.5

P = ParamSpec("P")
R = TypeVar("R")


class Stopped(Exception):
    """The work was called off; nothing of it is left. Never leaves the runtime."""


class Buffers:
    """Pieces of memory, lent and taken back. Thread-safe. `*_max`: the most that was lent at once."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_lent = 0
        self.pieces_lent = 0
        self.bytes_lent_max = 0
        self.pieces_lent_max = 0
        self._free: dict[int, list[bytearray]] = {}
        self._changed = threading.Condition()

    @contextmanager
    def lend(self, count: int, nbytes: int, stop: threading.Event) -> Iterator[list[memoryview]]:
        """`count` pieces of `nbytes`, with whatever was in them; waits until they are to be had.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        total = count * nbytes
        with self._changed:
            while self.bytes_lent and self.bytes_lent + total > self.bytes_max:
                if stop.is_set():
                    raise Stopped
                self._changed.wait(_WAIT_S)
            self.bytes_lent += total
            self.pieces_lent += count
            self.bytes_lent_max = max(self.bytes_lent_max, self.bytes_lent)
            self.pieces_lent_max = max(self.pieces_lent_max, self.pieces_lent)
            free = self._free.get(nbytes, [])
            taken = [free.pop() for _ in range(min(count, len(free)))]
        taken.extend(bytearray(nbytes) for _ in range(count - len(taken)))
        try:
            yield [memoryview(piece) for piece in taken]
        finally:
            with self._changed:
                self.bytes_lent -= total
                self.pieces_lent -= count
                kept = sum(size * len(pieces) for size, pieces in self._free.items())
                if self.bytes_lent + kept + total > self.bytes_max:
                    self._free.clear()  # pieces of other sizes
                self._free.setdefault(nbytes, []).extend(taken)
                self._changed.notify_all()

    def trim(self) -> None:
        """Give the memory of pieces that nobody has back to the system."""
        with self._changed:
            self._free.clear()


class Pipeline:
    """Owned by the node; `close` joins the threads."""

    def __init__(
        self,
        *,
        threads: int = THREADS_DEFAULT,
        bytes_max: int = BUFFER_BYTES_DEFAULT,
        bring_threads: int = BRING_THREADS_DEFAULT,
    ) -> None:
        self.threads = threads
        self.buffers = Buffers(bytes_max)
        self._coding = ThreadPoolExecutor(threads, thread_name_prefix="snapd-code", initializer=stand_back)
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="snapd-plan", initializer=stand_back)
        self._bringing = ThreadPoolExecutor(bring_threads, thread_name_prefix="snapd-bring")
        self.bring_threads = bring_threads
        self._users = 0

    async def code(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run blocking work of coding; UnavailableError (kind `stopping`) after `close`."""
        return await self._run(self._coding, function, *args, **kwargs)

    async def plan(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `code`, for what only computes: never queued behind a transfer."""
        return await self._run(self._planning, function, *args, **kwargs)

    async def bring(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `code`, for recovery."""
        return await self._run(self._bringing, function, *args, **kwargs)

    async def _run(
        self, threads: ThreadPoolExecutor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        try:
            future = threads.submit(function, *args, **kwargs)
        except RuntimeError as error:
            raise UnavailableError("the daemon is stopping", kind="stopping") from error
        return await asyncio.wrap_future(future)

    def rows_per_batch(
        self, pieces_per_row: int, piece_bytes: int, *, rows_max: int = 32, threads: int = 0
    ) -> int:
        """How many rows one thread takes at once: some `BATCH_BYTES`, and all threads together stay below the bound."""
        share = min(BATCH_BYTES, self.buffers.bytes_max // (threads or self.threads))
        return max(1, min(rows_max, share // max(1, pieces_per_row * piece_bytes)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """While somebody uses it, pieces are kept for the next; the last one gives them back. On the loop."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self.buffers.trim()

    def close(self) -> None:
        """Call work off (its owners have set their `stop`), join the threads. Blocking."""
        self._coding.shutdown(wait=True, cancel_futures=True)
        self._planning.shutdown(wait=True, cancel_futures=True)
        self._bringing.shutdown(wait=True, cancel_futures=True)


def stand_back() -> None:
    """This thread wakes nobody off a core, and takes a smaller share than a training thread where all are busy."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
