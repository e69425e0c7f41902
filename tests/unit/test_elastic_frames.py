"""Frames with chunks for ranks that cut a snapshot anew: nobody else's while anybody still writes into them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.runtime.elastic import fetch_chunks
from snapd.runtime.fetched import Fetched

CHUNK_BYTES = 64
SNAPSHOT = SnapshotId(1, 5)


class Pool:
    def __init__(self) -> None:
        self.granted: dict[LaneKey, list[Place]] = {}

    def grant(self, owner: LaneKey, count: int) -> list[Place]:
        self.granted[owner] = [Place(0, frame) for frame in range(count)]
        return self.granted[owner]

    def return_grant(self, owner: LaneKey) -> None:
        del self.granted[owner]


class Elsewhere:
    """Fills when it is told to."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None

    async def fill(self, job: Any, record: Any, wanted: Any) -> None:
        self.has_begun.set()
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        for one in wanted:
            one.view[:] = b"x" * len(one.view)


class Scene:
    def __init__(self) -> None:
        self.pool, self.elsewhere = Pool(), Elsewhere()
        self.memory = bytearray(4 * CHUNK_BYTES)
        self.kept: set[asyncio.Task[None]] = set()
        view = lambda at, nbytes: memoryview(self.memory)[at : at + nbytes]  # noqa: E731
        segment = SimpleNamespace(map_for_writing=lambda: SimpleNamespace(view=view))
        arena = SimpleNamespace(
            pool=self.pool, memory=SimpleNamespace(chunk_bytes=CHUNK_BYTES, segments={0: segment})
        )
        record = SimpleNamespace(
            chunk_bytes=CHUNK_BYTES, rank=1, chunks=[SimpleNamespace(nbytes=CHUNK_BYTES)] * 2
        )
        self.fetched = Fetched(records={(SNAPSHOT, 1): record})  # type: ignore[dict-item]
        self.job: Any = SimpleNamespace(
            name="job",
            chunk_bytes=CHUNK_BYTES,
            ledger=SimpleNamespace(snapshots={}),
            fetched=self.fetched,
            arenas={0: arena},
            arena=lambda rank: arena,
            context=SimpleNamespace(environment=SimpleNamespace(random_id=lambda: 7), keep=self.keep),
        )

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.kept.add(task)
        return task

    async def begin(self) -> asyncio.Task[Any]:
        session: Any = SimpleNamespace(rank=0, generation=2)
        elsewhere: Any = self.elsewhere
        work = fetch_chunks(self.job, session, elsewhere, (0, SNAPSHOT), {1: [0, 1]})
        call = asyncio.ensure_future(work)
        await self.elsewhere.has_begun.wait()
        return call


def test_frames_of_a_killed_rank_are_free_only_when_they_are_filled() -> None:
    async def run() -> None:
        scene = Scene()
        call = await scene.begin()
        call.cancel()  # the trainer was killed, and the round concluded without it
        with pytest.raises(asyncio.CancelledError):
            await call
        scene.fetched.release(scene.job.arenas, (2, 0))
        assert len(scene.pool.granted) == 1
        scene.elsewhere.may_end.set()
        await asyncio.gather(*scene.kept)
        assert not scene.pool.granted
        assert scene.memory[: 2 * CHUNK_BYTES] == b"x" * (2 * CHUNK_BYTES)

    asyncio.run(run())


def test_frames_stay_until_the_round_is_over() -> None:
    async def run() -> None:
        scene = Scene()
        scene.elsewhere.may_end.set()
        found = await (await scene.begin())
        assert [one.place for one in found[1]] == [Place(0, 0), Place(0, 1)]
        assert len(scene.pool.granted) == 1
        scene.fetched.release_below(scene.job.arenas, 3)
        assert not scene.pool.granted

    asyncio.run(run())


def test_a_fill_that_failed_gives_its_frames_back_with_the_round() -> None:
    async def run() -> None:
        scene = Scene()
        scene.elsewhere.error = OSError("away")
        scene.elsewhere.may_end.set()
        with pytest.raises(OSError, match="away"):
            await (await scene.begin())
        scene.fetched.release(scene.job.arenas, (2, 0))
        assert not scene.pool.granted

    asyncio.run(run())
