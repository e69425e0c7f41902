"""The rows of one plan that this node leads, and the fragments that it is given: what is lacking, and who does it when.

Lives on the event loop; batches of rows run on the pipeline's threads. Peers that hold a fragment already are asked
first, in batches, so equal rows cost one question for hundreds of them. A peer that fails is left alone for a while,
with the rows that take it; the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from snapd.core.protection import RowPlan
from snapd.core.rows import Row
from snapd.core.states import LaneState
from snapd.errors import SnapdError
from snapd.obs.protection_metrics import ProtectionMetrics
from snapd.peer.base import HOLDS_MAX, FragmentName
from snapd.runtime.coding import (
    BatchResult,
    Bench,
    RowTask,
    check_fragments,
    code_batch,
    pieces_per_row,
    timeout_s,
)
from snapd.runtime.peer_backoff import PeerBackoff
from snapd.runtime.pipeline import Pipeline, Stopped

RECHECK_FIRST_S = 2.0
RECHECK_LONGEST_S = 60.0
COUNT_S = 0.02  # while fragments are waited for, they are counted so often
COUNT_WORKING_S = 0.2  # the same while batches run: each is counted when it ends, anyway
YIELD_MAX_S = (
    0.05  # while a copy is under way, its trainer may be waiting at the fence: a batch begins so much later
)
YIELD_STEP_S = 0.005

Place = tuple[int, int]  # row number, fragment number


class RowWork:
    """`go_on` again and again, then `aclose`. Counts are of this plan since it was taken up."""

    def __init__(
        self,
        plan: RowPlan,
        node: str,
        bench: Bench,
        pipeline: Pipeline,
        metrics: ProtectionMetrics,
        backoff: PeerBackoff,
        suspect: Callable[[str, int], None],
    ) -> None:
        """`suspect(node, rank)`: that node's shard of the rank is not what its record says."""
        self._plan = plan
        self._suspect = suspect
        self._bench = bench
        self._pipeline = pipeline
        self._metrics = metrics
        self._backoff = backoff
        # equal rows (all zeros, say) are one
        self._given = list(dict.fromkeys((row.id, number) for row, number in plan.given_to(node)))
        self._led = list({(row.id, row.parity_nodes): row for row in reversed(plan.led_by(node))}.values())[
            ::-1
        ]
        self._confirmed: set[Place] = set()
        self._unasked = {node for row in self._led for node in row.parity_nodes[1:]}
        self._is_first_round = True
        self._running: dict[asyncio.Task[BatchResult], Sequence[RowTask]] = {}
        self._finished: list[asyncio.Task[BatchResult]] = []
        self._todo: dict[int, RowTask] = {}  # by number of row
        self._version = self._losses = -1
        self._lacking: set[tuple[bytes, int]] = set()  # of the given ones
        self._recheck_s = RECHECK_FIRST_S
        self._moved_s = self._now_s()
        self._asked_s = self._now_s()
        self.held_count = 0
        self.rows_shared = 0
        self.pulled_bytes = 0
        self.pushed_bytes = 0

    @property
    def given_count(self) -> int:
        return len(self._given)

    def is_stuck(self, patience_s: float) -> bool:
        """Nothing has moved for so long although something is lacking."""
        return self.held_count < self.given_count and self._now_s() - self._moved_s > patience_s

    async def check_held(self) -> None:
        """Hash the given fragments that an earlier process left; bad ones are forgotten."""
        unchecked = self._bench.job.parity.unchecked(self._given)
        if unchecked:
            await self._pipeline.code(check_fragments, self._bench, unchecked)
        self._count()
        self._look_at(self._led)

    async def aclose(self) -> None:
        """Wait for nobody: threads see `stop`, and their results are dropped."""
        for task in self._running:
            task.cancel()

    # one round

    async def go_on(self) -> None:
        """Ask, start what can be started, and return when something has changed."""
        if await self._ask():
            return
        if self._todo and len(self._running) < self._pipeline.threads:
            await self._yield_to_trainer()
            self._start()
        job = self._bench.job
        await job.changes.wait_until(self._has_news, self._patience_s())
        for task in self._finished:
            self._take(task)
        self._finished.clear()
        self._count()
        if self._is_recheck_due():
            self._recheck_s = min(RECHECK_LONGEST_S, 2 * self._recheck_s)
            self._confirmed.clear()
            self._unasked = {node for row in self._led for node in row.parity_nodes[1:]}
            self._look_at(self._led)

    def _has_news(self) -> bool:
        job = self._bench.job
        if self._finished or job.is_removed:
            return True
        return job.parity.version != self._version and not self._is_busy()

    def _is_busy(self) -> bool:
        """Fragments come and go; they are counted every `COUNT_S`, not one by one."""
        return bool(self._running) or self.held_count < self.given_count

    def _patience_s(self) -> float:
        """Until a peer may be asked again, or the peers are to be asked whether they still hold what they did."""
        wait_s = self._backoff.next_s() if self._todo or self._unasked else None
        if self._running:
            longest_s = COUNT_WORKING_S
        else:
            longest_s = COUNT_S if self._is_busy() else self._recheck_s
        return max(0.005, min(longest_s, longest_s if wait_s is None else wait_s))

    def _is_recheck_due(self) -> bool:
        is_waiting = not (self._running or self._unasked or self._todo)
        return is_waiting and bool(self._led) and self._now_s() - self._asked_s > self._recheck_s

    def _count(self) -> None:
        parity = self._bench.job.parity
        if parity.version == self._version:
            return
        self._version = parity.version
        if parity.losses != self._losses:
            self._losses, self._lacking = parity.losses, set(self._given)
        self._lacking -= parity.held_among(self._lacking)
        held = len(self._given) - len(self._lacking)
        if held < self.held_count:  # one was found bad
            self._look_at(self._led)
        if held != self.held_count:
            self._moved_s = self._now_s()
        self.held_count = held

    # what is lacking

    def _look_at(self, rows: Iterable[Row]) -> None:
        """Note what these rows lack, for all that nobody works at."""
        busy = {task.row.number for tasks in self._running.values() for task in tasks}
        chosen = [row for row in rows if row.number not in busy]
        kept = self._bench.job.parity.held_among((row.id, 0) for row in chosen)
        for row in chosen:
            lacking = {n for n in range(1, len(row.parity_nodes)) if (row.number, n) not in self._confirmed}
            if (row.id, 0) not in kept:
                lacking.add(0)
            if lacking:
                self._todo[row.number] = RowTask(row, frozenset(lacking))
            else:
                self._todo.pop(row.number, None)

    def _is_asked(self, row: Row) -> bool:
        return not self._unasked or self._unasked.isdisjoint(row.parity_nodes[1:])

    async def _ask(self) -> bool:
        """Ask each peer which of its fragments it holds already. True when there is something new to be told."""
        if not self._unasked and not self._is_first_round:
            return False
        if self._unasked:
            self._asked_s = self._now_s()
        peers = [peer for peer in sorted(self._unasked) if self._backoff.wait_s([peer]) == 0]
        await asyncio.gather(*(self._ask_one(peer) for peer in peers))
        if peers:
            self._look_at(self._led)
        if self._is_first_round and not self._unasked:
            self._is_first_round = False
            self.rows_shared = len(self._led) - len(self._todo)
            self._metrics.rows_shared.inc(self.rows_shared)
            return True
        return False

    async def _ask_one(self, peer: str) -> None:
        theirs = [
            (row, number)
            for row in self._led
            for number, node in enumerate(row.parity_nodes)
            if number and node == peer
        ]
        try:
            for first in range(0, len(theirs), HOLDS_MAX):
                part = theirs[first : first + HOLDS_MAX]
                names = [FragmentName(self._bench.job.name, row.id, number) for row, number in part]
                held = await self._pipeline.code(self._holds, peer, names)
                self._confirmed.update(
                    (row.number, number) for (row, number), has in zip(part, held, strict=True) if has
                )
        except SnapdError as error:
            self._backoff.failed(peer, error.message)
            return
        self._backoff.succeeded(peer)
        self._unasked.discard(peer)

    def _holds(self, peer: str, names: Sequence[FragmentName]) -> list[bool]:
        return self._bench.links.to(peer).holds(names, timeout_s=timeout_s(0))

    # batches

    async def _yield_to_trainer(self) -> None:
        left_s = YIELD_MAX_S
        while left_s > 0 and self._is_copying():
            await asyncio.sleep(YIELD_STEP_S)
            left_s -= YIELD_STEP_S

    def _is_copying(self) -> bool:
        return any(
            session.lane_state(lane) is LaneState.OPEN
            for session in self._bench.job.served_sessions()
            for lane in range(session.page.lane_count)
        )

    def _start(self) -> None:
        while len(self._running) < self._pipeline.threads:
            tasks = self._choose()
            if not tasks:
                return
            work = self._pipeline.code(code_batch, self._bench, tasks, self._plan.frame_bytes)
            running = asyncio.get_running_loop().create_task(_dropped_if_stopped(work))
            self._running[running] = tasks
            running.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[BatchResult]) -> None:
        self._finished.append(task)
        self._bench.job.changes.notify()

    def _choose(self) -> list[RowTask]:
        """The next batch, taken off the list: rows whose peers may be asked now; a peer in doubt gets one row at a
        time. Where little is left, the other threads get their share.
        """
        asked = {peer for tasks in self._running.values() for task in tasks for peer in task.peers}
        chosen: list[RowTask] = []
        rows_max = 1
        for task in self._todo.values():
            if not self._is_asked(task.row) or self._backoff.wait_s(task.peers) > 0:
                continue
            doubtful = {peer for peer in task.peers if self._backoff.is_doubtful(peer)}
            if doubtful & asked or (doubtful and chosen):
                continue
            if not chosen:
                rows_max = self._pipeline.rows_per_batch(pieces_per_row(task.row), self._plan.frame_bytes)
                rows_max = min(rows_max, max(1, -(-len(self._todo) // self._pipeline.threads)))
            chosen.append(task)
            if doubtful or len(chosen) >= rows_max:
                break
        for task in chosen:
            del self._todo[task.row.number]
        return chosen

    def _take(self, task: asyncio.Task[BatchResult]) -> None:
        tasks = self._running.pop(task)
        if task.cancelled():
            self._look_at([one.row for one in tasks])
            return
        result = task.result()
        self.pulled_bytes += result.pulled_bytes
        self.pushed_bytes += result.pushed_bytes
        self._metrics.pulled_bytes.inc(result.pulled_bytes)
        self._metrics.pushed_bytes.inc(result.pushed_bytes)
        self._metrics.encoded_bytes.inc(result.encoded_bytes)
        self._metrics.rows_coded.inc(result.rows_coded)
        self._confirmed.update(place for place in result.placed if place[1])
        if result.placed:
            self._moved_s = self._now_s()
        self._look_at([one.row for one in tasks])
        self._note_wrong(result)
        self._note_failures(tasks, result)

    def _note_wrong(self, result: BatchResult) -> None:
        job = self._bench.job
        for text in result.wrong:
            self._metrics.wrong_bytes.inc()
            job.context.log.error(
                "peer.wrong_bytes",
                job=job.name,
                generation=self._plan.map.id.generation,
                step=self._plan.map.id.step,
                reason=text,
            )
        for node, rank in result.suspects:
            self._suspect(node, rank)

    def _note_failures(self, tasks: Sequence[RowTask], result: BatchResult) -> None:
        failed = {failure.peer: failure.error for failure in result.failures}
        for peer, error in failed.items():
            self._metrics.peer_failures.inc()
            self._backoff.failed(peer, error.message)
        touched: set[str] = {""}
        for task in tasks:
            touched |= task.peers
        if not failed:
            for peer in touched:
                self._backoff.succeeded(peer)

    def _now_s(self) -> float:
        return self._bench.job.context.environment.monotonic_s()


async def _dropped_if_stopped(work: Coroutine[Any, Any, BatchResult]) -> BatchResult:
    try:
        return await work
    except Stopped:
        return BatchResult()
