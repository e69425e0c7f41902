"""The shared tier as restores read it: its store, opened for reading alone, and threads of its own.

Nothing is probed: credentials that may not write will do. On the event loop; what blocks runs in the threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from snapd.core.stored import Spot
from snapd.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    ConflictError,
    NotFoundError,
    SnapdError,
    UnavailableError,
)
from snapd.store.base import Store
from snapd.tier.reading import Candidate, TierReader
from snapd.tier.streaming import ReadPool

THREADS = 4
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 10.0

P = ParamSpec("P")
R = TypeVar("R")


class TierAccess:
    """`url`: of the tier, as configured. `open_store`: makes a store; asks nothing of it. `read_threads`: so many reads
    at once.
    """

    def __init__(self, url: str, open_store: Callable[[], Store], *, read_threads: int) -> None:
        self.url = url
        self._open_store = open_store
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._is_closing = False
        self._bad: dict[str, frozenset[Spot]] = {}  # job -> chunks that were read and are bad
        self.pool = ReadPool(threads=read_threads)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="snapd-restore")

    @property
    def store(self) -> Store | None:
        """None: nothing was asked yet."""
        return self._store

    def _opened(self) -> Store:
        with self._opening:
            if self._store is None:
                if self._is_closing:
                    raise UnavailableError("the daemon is stopping", kind="stopping")
                self._store = self._open_store()
            return self._store

    async def ask(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something blocking; UnavailableError (kind `stopping`) after `close`."""
        try:
            future = self.threads.submit(function, *args, **kwargs)
        except RuntimeError as error:
            raise UnavailableError("the daemon is stopping", kind="stopping") from error
        return await asyncio.wrap_future(future)

    async def reader(self, job: str) -> TierReader:
        return TierReader(await self.ask(self._opened), job, self.pool, partial(self._note_bad, job))

    def _note_bad(self, job: str, spots: Collection[Spot]) -> None:
        if spots:
            with self._opening:
                self._bad[job] = self.proved_bad(job) | frozenset(spots)

    def proved_bad(self, job: str) -> frozenset[Spot]:
        """Where stored chunks lie that this daemon has read and found bad: no later snapshot is to name them. From any
        thread.
        """
        return self._bad.get(job, frozenset())

    def close(self, wait_s: float) -> bool:
        """Let go of the store, and join the threads. Blocking, for at most `wait_s`; False: some still hang in a
        request that cannot be called off.
        """
        self._is_closing = True
        if self._store is not None:
            self._store.close()

        def join() -> None:
            self.threads.shutdown(wait=True, cancel_futures=True)
            self.pool.close()

        joining = threading.Thread(target=join, name="snapd-restore-end")
        joining.start()
        joining.join(wait_s)
        return not joining.is_alive()

    # what there is

    async def candidates(self, job: str) -> list[Candidate]:
        reader = await self.reader(job)
        return await self.ask(reader.candidates)

    async def listed(self, job: str, wait_s: float) -> list[Candidate]:
        """What the tier has, newest first, asked for again and again. Raises the last error."""
        clock = asyncio.get_running_loop()
        deadline_s, pause_s = clock.time() + wait_s, PAUSE_FIRST_S
        error: SnapdError = UnavailableError("no answer in time", kind="store_slow")
        while True:
            try:
                async with asyncio.timeout(max(0.1, deadline_s - clock.time())):
                    return await self.candidates(job)
            except TimeoutError:
                raise error from None
            except SnapdError as failure:
                if not is_store_away(failure) or failure.kind == "stopping":
                    raise
                error = failure
            if clock.time() + pause_s >= deadline_s:
                raise error
            await asyncio.sleep(pause_s)
            pause_s = min(PAUSE_MAX_S, 2 * pause_s)


def is_store_away(error: SnapdError) -> bool:
    """Whether the error says that the store cannot be asked, or refuses: nothing is proved by it."""
    if isinstance(error, NotFoundError):
        return error.kind == "bucket"
    if isinstance(error, ConflictError | CapacityError):
        return error.kind == "store_full"
    return isinstance(error, UnavailableError | AuthError | ConfigError)
