"""A daemon's process: everything that it does to the world goes through `effect`, and a crash may come before any.

After the crash nothing of it has an effect any more: what still runs is unwound by `LifeEnded`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from snapd.errors import UnavailableError

Result = TypeVar("Result")


class LifeEnded(asyncio.CancelledError):
    """This process is dead. A cancellation, so that nobody handles it."""


class Life:
    """One incarnation. `on_crash` is called once, outside of whatever was running. `crash_after`: so many effects
    may still happen; None: no crash is planned.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, on_crash: Callable[[str], None]) -> None:
        self.name = name
        self.is_alive = True
        self.crash_after: int | None = None
        self.effects = 0
        self.crashed_at = ""
        self._loop = loop
        self._on_crash = on_crash
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def effect(self, what: str) -> None:
        """Something is about to be stored or sent. Raises LifeEnded when the process is dead, or dies just now."""
        if not self.is_alive:
            raise LifeEnded(self.name)
        if self.crash_after is not None:
            if self.crash_after <= 0:
                self.end(f"before {what}")
                raise LifeEnded(self.name)
            self.crash_after -= 1
        self.effects += 1

    def check(self) -> None:
        if not self.is_alive:
            raise LifeEnded(self.name)

    def end(self, why: str) -> None:
        if self.is_alive:
            self.is_alive = False
            self.crashed_at = why
            self._loop.call_soon(self._unwind)

    def _unwind(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._tasks.clear()
        self._on_crash(self.crashed_at)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task of this process; its errors end the simulation."""
        if not self.is_alive:
            work.close()
            raise LifeEnded(self.name)
        task = self._loop.create_task(work, name=f"{self.name} {name}")
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    async def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """As a local client does: its error is the caller's. Raises UnavailableError when this process dies."""
        if not self.is_alive:
            work.close()
            raise UnavailableError("the daemon is not running", kind="daemon_gone")
        task = self._loop.create_task(work)
        self._tasks[task] = None
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            self._tasks.pop(task, None)
        if task.cancelled():
            raise UnavailableError("the daemon is gone", kind="daemon_gone")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": f"{task.get_name()} failed", "exception": error})
