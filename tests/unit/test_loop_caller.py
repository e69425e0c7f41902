"""What threads give to the loop together: each is seen to once, gets its own answer, and none waits for ever."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence

import pytest

from snapd.errors import InternalError, NotFoundError, SnapdError, UnavailableError
from snapd.runtime import loop_caller
from snapd.runtime.loop_caller import GroupCaller


def outcome(caller: GroupCaller[int], given: int) -> str:
    try:
        caller.call(given)
    except SnapdError as error:
        return type(error).__name__
    return "done"


def test_what_comes_meanwhile_is_one_call_and_each_gets_its_own_answer() -> None:
    seen: list[list[int]] = []

    def function(given: Sequence[int]) -> list[SnapdError | None]:
        seen.append(list(given))
        return [NotFoundError("odd") if one % 2 else None for one in given]

    async def run() -> list[str]:
        caller = GroupCaller(asyncio.get_running_loop(), function)
        found: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda one=one: found.update({one: outcome(caller, one)}))
            for one in range(6)
        ]
        for thread in threads:
            thread.start()
        while caller._group is None or len(caller._group.given) < len(
            threads
        ):  # the loop is held up until all have given
            os.sched_yield()
        await asyncio.to_thread(lambda: [thread.join(10.0) for thread in threads])
        return [found[one] for one in range(6)]

    assert asyncio.run(run()) == ["done", "NotFoundError"] * 3
    assert [sorted(one) for one in seen] == [list(range(6))]


def test_a_bug_on_the_loop_leaves_nobody_waiting() -> None:
    def function(given: Sequence[int]) -> list[SnapdError | None]:
        raise ZeroDivisionError

    async def run() -> str:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        return await asyncio.to_thread(outcome, GroupCaller(loop, function), 1)

    told: list[BaseException] = []
    assert asyncio.run(run()) == InternalError.__name__
    assert [type(error) for error in told] == [ZeroDivisionError]


def test_a_loop_that_does_not_come_round_never_sees_to_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_caller, "CALL_TIMEOUT_S", 0.05)
    seen: list[int] = []

    def function(given: Sequence[int]) -> list[SnapdError | None]:
        seen.extend(given)
        return [None for _ in given]

    async def run() -> list[str]:
        caller = GroupCaller(asyncio.get_running_loop(), function)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(outcome(caller, 1)))
        thread.start()
        thread.join(10.0)  # on the loop's own thread
        await asyncio.to_thread(caller.call, 2)
        return found

    assert asyncio.run(run()) == [UnavailableError.__name__]
    assert seen == [2]


def test_a_closed_loop_refuses_at_once() -> None:
    loop = asyncio.new_event_loop()
    caller: GroupCaller[int] = GroupCaller(loop, lambda given: [None for _ in given])
    loop.close()
    assert outcome(caller, 1) == outcome(caller, 2) == UnavailableError.__name__
