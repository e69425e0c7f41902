"""From a thread to the event loop and back: what must happen on the loop is called there, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import ParamSpec, TypeVar

from snapd.errors import UnavailableError

CALL_TIMEOUT_S = 30.0

P = ParamSpec("P")
R = TypeVar("R")


class LoopCaller:
    """Made on the loop; used from any other thread. A call costs one wake-up of the loop (some 50 microseconds)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` on the loop's thread and return what it returns, or raise what it raises.

        Raises:
            UnavailableError: kind `stopping`: the loop is closed, or does not come round.
        """

        async def run() -> R:
            return function(*args, **kwargs)

        work = run()
        try:
            done = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise UnavailableError("the daemon is stopping", kind="stopping") from error
        try:
            return done.result(CALL_TIMEOUT_S)
        except (FutureTimeout, CancelledError) as error:
            done.cancel()
            raise UnavailableError("the daemon's loop does not come round", kind="stopping") from error

    def post(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run `function` on the loop some time; nothing is waited for. A closed loop drops it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: function(*args, **kwargs))
