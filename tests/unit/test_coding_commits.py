"""A batch's own fragments while they are recorded: their frames are nobody else's until that has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from snapd.core.rows import Row
from snapd.errors import CapacityError, SnapdError
from snapd.runtime.coding import BatchResult, OwnFragments
from snapd.runtime.loop_caller import GroupCaller
from snapd.runtime.pipeline import Stopped


class Parity:
    """Notes in which order frames are taken back and recorded."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def reserve(self, row_id: bytes, number: int, nbytes: int) -> Any:
        return SimpleNamespace(row_id=row_id, view=memoryview(bytearray(nbytes)))

    def cancel(self, reservation: Any) -> None:
        self.said.append("cancel")

    def commit(self, given: Sequence[Any]) -> list[SnapdError | None]:
        self.said.append(f"commit {len(given)}")
        return [
            CapacityError("full", kind="index_full") if not number else None for number, _ in enumerate(given)
        ]


def run_batch(parity: Parity, result: BatchResult, body: Any) -> None:
    """Two fragments, of rows 0 and 1, with `body` between the beginning and the end of their commit."""

    async def run() -> None:
        commits = GroupCaller(asyncio.get_running_loop(), parity.commit, gather_s=0.05)
        job = SimpleNamespace(parity=parity)
        bench: Any = SimpleNamespace(job=job, commits=commits, check=lambda: None)

        def batch() -> None:
            with ExitStack() as undo:
                own = OwnFragments(bench, undo)
                for number in range(2):
                    row = Row(number, bytes([number]), (), ("a",), 8)
                    own.add(row, own.reserve(row))
                with own.being_committed(result):
                    body()

        await asyncio.to_thread(batch)

    asyncio.run(run())


def test_each_has_its_own_outcome() -> None:
    parity, result, held_up = Parity(), BatchResult(), threading.Event()
    run_batch(parity, result, lambda: held_up.wait(0.01))
    assert result.placed == [(1, 0)]
    assert [(failure.row.number, failure.peer, failure.error.kind) for failure in result.failures] == [
        (0, "", "index_full")
    ]


def test_a_batch_that_is_called_off_waits_for_its_commit_before_frames_are_taken_back() -> None:
    def called_off() -> None:
        raise Stopped

    parity, result = Parity(), BatchResult()
    with pytest.raises(Stopped):
        run_batch(parity, result, called_off)
    assert parity.said == ["commit 2", "cancel", "cancel"]
