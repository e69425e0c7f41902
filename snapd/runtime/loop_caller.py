"""From a thread to the event loop and back: what must happen on the loop is called there, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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


class _Group(Generic[T]):
    """What one call gets: by number, so that one that nobody waits for any more can be taken out of it. The lock is its
    caller's.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock
        self.given: dict[int, T] = {}
        self.is_taken = False
        self.answers: Future[dict[int, SnapdError | None]] = Future()

    def take_out(self, number: int) -> bool:
        """Whether it is never seen to: False when it is too late for that."""
        with self.lock:
            return not self.is_taken and self.given.pop(number, None) is not None


class Ticket(Generic[T]):
    """For what was given to a `GroupCaller`."""

    def __init__(self, group: _Group[T], number: int) -> None:
        self._group, self._number = group, number

    def wait(self) -> None:
        """Until it was seen to; raise its error.

        Raises:
            UnavailableError: kind `stopping`: as `LoopCaller.call`; it was not seen to and never will be.
        """
        answers = self._group.answers
        try:
            found = answers.result(CALL_TIMEOUT_S)
        except FutureTimeout:
            if self._group.take_out(self._number):
                raise UnavailableError("the daemon's loop does not come round", kind="stopping") from None
            found = answers.result()  # it is being seen to right now
        error = found[self._number]
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
        self._numbers = itertools.count()
        self._group: _Group[T] | None = None  # the one that the loop was woken for

    def call(self, given: T) -> None:
        """Give it, and wait: `Ticket.wait`."""
        self.begin(given).wait()

    def begin(self, given: T) -> Ticket[T]:
        """Give it; the ticket says what came of it."""
        return self.begin_all([given])[0]

    def begin_all(self, given: Sequence[T]) -> list[Ticket[T]]:
        """Give several to one and the same call; a ticket for each."""
        if not given:
            return []
        with self._lock:
            group = self._group
            is_first = group is None
            if group is None:
                group = self._group = _Group(self._lock)
            numbers = [next(self._numbers) for _ in given]
            group.given.update(zip(numbers, given, strict=True))
        if is_first:
            self._wake(group)
        return [Ticket(group, number) for number in numbers]

    def _wake(self, group: _Group[T]) -> None:
        try:
            if self._gather_s:
                self._loop.call_soon_threadsafe(self._loop.call_later, self._gather_s, self._run, group)
            else:
                self._loop.call_soon_threadsafe(self._run, group)
        except RuntimeError:
            stopping: SnapdError | None = UnavailableError("the daemon is stopping", kind="stopping")
            group.answers.set_result(dict.fromkeys(self._take(group), stopping))

    def _take(self, group: _Group[T]) -> dict[int, T]:
        """What is in it; from now on nothing comes or goes."""
        with self._lock:
            if self._group is group:
                self._group = None
            group.is_taken = True
            return group.given

    def _run(self, group: _Group[T]) -> None:
        """On the loop."""
        given = self._take(group)
        errors: Sequence[SnapdError | None] = [InternalError("failed on the loop") for _ in given]
        try:
            errors = self._function(list(given.values()))
        finally:
            group.answers.set_result(dict(zip(given, errors, strict=True)))
