"""Waiting for a change of state on the event loop, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """Wakes those who wait whenever `notify` is called; each looks at its own condition again."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for future in self._waiting:
            _wake(future)
        self._waiting.clear()

    async def wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Return True once `is_so()`, False when the time ran out."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not is_so():
            left = deadline - loop.time()
            if left <= 0:
                return False
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.add(future)
            timer = loop.call_at(deadline, _wake, future)
            try:
                await future
            finally:
                timer.cancel()
                self._waiting.discard(future)
        return True


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
