"""The threads of a tier: for short questions, for flushes, and for packs; all stand back behind training."""

from __future__ import annotations

import asyncio
import ctypes
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from snapd.errors import SnapdError, UnavailableError
from snapd.obs.log import EventLog
from snapd.runtime.pipeline import stand_back
from snapd.tier.writing import Stopped

FLUSHES = 4  # jobs that flush at once; each is mostly waiting
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_LOWEST = (2 << 13) | 7  # best effort, the last of its levels: idle would starve beside any reader

P = ParamSpec("P")
R = TypeVar("R")


class TierThreads:
    """`name`: of the tier, for the threads' names. `failed`: the event of an error that nobody expected."""

    def __init__(self, name: str, failed: str, log: EventLog, *, packers: int) -> None:
        self._name, self._failed, self._log = name, failed, log
        self.asking = ThreadPoolExecutor(2, thread_name_prefix=f"snapd-{name}", initializer=keep_low)
        self._flushing = ThreadPoolExecutor(
            FLUSHES, thread_name_prefix=f"snapd-{name}-flush", initializer=keep_low
        )
        self.packing = ThreadPoolExecutor(
            packers, thread_name_prefix=f"snapd-{name}-pack", initializer=keep_low
        )

    async def ask(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something short; UnavailableError (kind `stopping`) after `close`."""
        return await self._run(self.asking, function, *args, **kwargs)

    async def flush(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a flush."""
        return await self._run(self._flushing, function, *args, **kwargs)

    async def _run(
        self, threads: ThreadPoolExecutor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        def guarded() -> R:
            try:
                return function(*args, **kwargs)
            except (SnapdError, Stopped):
                raise
            except Exception as error:
                self._log.error(self._failed, exception=error, reason=str(error))
                raise UnavailableError(
                    f"an error that nobody expected: {type(error).__name__}: {error}",
                    kind="tier_failed",
                    hint=f"a bug of snapd: the daemon's log has it as {self._failed}",
                ) from error

        try:
            future = threads.submit(guarded)
        except RuntimeError as error:
            raise UnavailableError("the daemon is stopping", kind="stopping") from error
        return await asyncio.wrap_future(future)

    def close(self, wait_s: float) -> bool:
        """Join the threads. Blocking, for at most `wait_s`; False: some still hang in a request that cannot be called
        off.
        """
        pools = (self._flushing, self.asking, self.packing)
        for threads in pools:
            threads.shutdown(wait=False, cancel_futures=True)

        def join() -> None:
            for threads in pools:
                threads.shutdown(wait=True)

        joining = threading.Thread(target=join, name=f"snapd-{self._name}-end")
        joining.start()
        joining.join(wait_s)
        return not joining.is_alive()


def keep_low() -> None:
    """This thread stands back behind training, and so do its reads and writes."""
    stand_back()
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST)  # this thread; a refusal changes nothing
