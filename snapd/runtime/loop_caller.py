"""From a thread to the event loop and back: what must happen on the loop is called there, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, ParamSpec, TypeVar

from snapd.errors import InternalError, SnapdError, UnavailableError

CALL_TIMEOUT_S = 30.0

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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


class Ticket:
    """For what was given to a `GroupCaller`."""

    def __init__(self) -> None:
        self.seen_to: Future[SnapdError | None] = Future()

    def wait(self) -> None:
        """Until it was seen to; raise its error.

        Raises:
            UnavailableError: kind `stopping`: as `LoopCaller.call`; it was not seen to and never will be.
        """
        try:
            error = self.seen_to.result(CALL_TIMEOUT_S)
        except FutureTimeout:
            if self.seen_to.cancel():
                raise UnavailableError("the daemon's loop does not come round", kind="stopping") from None
            error = self.seen_to.result()  # it is being seen to right now
        if error is not None:
            raise error


class GroupCaller(Generic[T]):
    """As `LoopCaller`, for what costs less together: `function` gets all that threads have given since the first of
    them woke the loop, `gather_s` ago or more, and returns None or an error for each. It raises no SnapdError.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[[Sequence[T]], Sequence[SnapdError | None]],
        *,
        gather_s: float = 0.0,
    ) -> None:
        self._loop, self._function, self._gather_s = loop, function, gather_s
        self._lock = threading.Lock()
        self._given: list[tuple[T, Future[SnapdError | None]]] = []

    def call(self, given: T) -> None:
        """Give it, and wait: `Ticket.wait`."""
        self.begin(given).wait()

    def begin(self, given: T) -> Ticket:
        """Give it; the ticket says what came of it."""
        ticket = Ticket()
        with self._lock:
            is_first = not self._given
            self._given.append((given, ticket.seen_to))
        if is_first:
            self._wake()
        return ticket

    def _wake(self) -> None:
        try:
            if self._gather_s:
                self._loop.call_soon_threadsafe(self._loop.call_later, self._gather_s, self._run)
            else:
                self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            with self._lock:
                given, self._given = self._given, []
            for _, seen_to in given:
                seen_to.set_result(UnavailableError("the daemon is stopping", kind="stopping"))

    def _run(self) -> None:
        """On the loop."""
        with self._lock:
            given, self._given = self._given, []
        given = [one for one in given if one[1].set_running_or_notify_cancel()]
        errors: Sequence[SnapdError | None] = [InternalError("failed on the loop") for _ in given]
        try:
            errors = self._function([item for item, _ in given])
        finally:
            for (_, seen_to), error in zip(given, errors, strict=True):
                seen_to.set_result(error)
