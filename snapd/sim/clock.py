"""Virtual time: an asyncio loop that jumps to the next timer and does the same things in the same order every time.

It has no selector, threads or signals; timers of the same moment run in the order in which they were set.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any


class VirtualLoop(asyncio.BaseEventLoop):
    """`run_until` drives it. An exception that leaves a callback ends the run, unless it is a cancellation."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.events = 0
        self.failure: BaseException | None = None
        self._soon: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._shared_context = copy_context()
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context or self._shared_context)
        self._soon.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context or self._shared_context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def run_until(self, end_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Run what is due until the clock reads `end_s`, or `is_over` says so (asked once per moment)."""
        asyncio._set_running_loop(self)
        try:
            while self.failure is None and not is_over():
                self._run_soon()
                if not self._timers or self._timers[0][0] > end_s:
                    self.now_s = max(self.now_s, end_s)
                    break
                when, _, handle = heapq.heappop(self._timers)
                if not handle.cancelled():
                    self.now_s = max(self.now_s, when)
                    self.events += 1
                    handle._run()
            else:
                self._run_soon()
        finally:
            asyncio._set_running_loop(None)
        if self.failure is not None:
            raise self.failure

    def _run_soon(self) -> None:
        soon = self._soon
        while soon and self.failure is None:
            handle = soon.popleft()
            if not handle.cancelled():
                self.events += 1
                handle._run()

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.failure is None and not isinstance(error, asyncio.CancelledError):
            self.failure = error if isinstance(error, BaseException) else RuntimeError(context["message"])
