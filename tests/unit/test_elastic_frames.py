"""Frames with chunks for ranks that cut a snapshot anew: nobody else's while anybody still writes into them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from snapd.core.frames import FramePool
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk
from snapd.errors import NotFoundError
from snapd.runtime.arriving import Arriving
from snapd.runtime.elastic import fetch_chunks
from snapd.runtime.fetched import Fetched

CHUNK_BYTES = 64
SNAPSHOT = SnapshotId(1, 5)


class NoRows:
    """No index: nothing is left of an earlier daemon."""

    def all(self) -> list[Any]:
        return []

    def add(self, rank: int, chunks: Any) -> None: ...
    def remove(self, rank: int) -> None: ...


class Elsewhere:
    """Fills when it is told to."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None
        self.filled: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.found: Any = None

    async def record(self, job: Any, snapshot: SnapshotId, rank: int) -> Any:
        await asyncio.sleep(0)
        self.meanwhile()
        return self.found

    async def fill(self, job: Any, record: Any, wanted: Any) -> None:
        self.filled += [one.number for one in wanted]
        self.has_begun.set()
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        for one in wanted:
            one.view[:] = b"x" * len(one.view)


class Scene:
    def __init__(self) -> None:
        self.pool, self.elsewhere = FramePool(), Elsewhere()
        self.pool.add_segment(0, 8)
        self.memory = bytearray(8 * CHUNK_BYTES)
        self.kept: set[asyncio.Task[None]] = set()
        view = lambda at, nbytes: memoryview(self.memory)[at : at + nbytes]  # noqa: E731
        segment = SimpleNamespace(map_for_writing=lambda: SimpleNamespace(view=view))
        arena = SimpleNamespace(
            rank=0, pool=self.pool, memory=SimpleNamespace(chunk_bytes=CHUNK_BYTES, segments={0: segment})
        )
        record = SimpleNamespace(
            chunk_bytes=CHUNK_BYTES,
            rank=1,
            chunks=[Chunk(CHUNK_BYTES, bytes([n]) * 16, Place(0, 0)) for n in (1, 2)],
        )
        self.fetched = Fetched()
        self.fetched.records.put((SNAPSHOT, 1), record, 2)  # type: ignore[arg-type]
        self.job: Any = SimpleNamespace(
            name="job",
            chunk_bytes=CHUNK_BYTES,
            ledger=SimpleNamespace(snapshots={}),
            fetched=self.fetched,
            arriving=Arriving(NoRows()),  # type: ignore[arg-type]
            arenas={0: arena},
            arena=lambda rank: arena,
            served_sessions=list,
            context=SimpleNamespace(
                environment=SimpleNamespace(random_id=itertools.count(7).__next__), keep=self.keep
            ),
        )

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.kept.add(task)
        return task

    def ask(self, chunks: list[int], rank: int = 0) -> asyncio.Task[Any]:
        session: Any = SimpleNamespace(rank=rank, generation=2)
        elsewhere: Any = self.elsewhere
        work = fetch_chunks(self.job, session, elsewhere, (0, SNAPSHOT), {1: chunks})
        return asyncio.ensure_future(work)

    async def begin(self) -> asyncio.Task[Any]:
        call = self.ask([0, 1])
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
        assert scene.pool.granted_count == 2
        scene.elsewhere.may_end.set()
        await asyncio.gather(*scene.kept)
        assert scene.pool.free_count == 8
        assert scene.memory[: 2 * CHUNK_BYTES] == b"x" * (2 * CHUNK_BYTES)

    asyncio.run(run())


def test_frames_stay_until_the_round_is_over() -> None:
    async def run() -> None:
        scene = Scene()
        scene.elsewhere.may_end.set()
        found = await (await scene.begin())
        assert [one.place for one in found[1]] == [Place(0, 0), Place(0, 1)]
        assert scene.pool.granted_count == 2
        scene.fetched.release_below(scene.job.arenas, 3)
        assert scene.pool.free_count == 8

    asyncio.run(run())


def test_a_fill_that_failed_gives_its_frames_back_with_the_round() -> None:
    async def run() -> None:
        scene = Scene()
        scene.elsewhere.error = OSError("away")
        scene.elsewhere.may_end.set()
        with pytest.raises(OSError, match="away"):
            await (await scene.begin())
        scene.fetched.release(scene.job.arenas, (2, 0))
        assert scene.pool.free_count == 8

    asyncio.run(run())


def test_what_two_ranks_need_is_brought_once() -> None:
    async def run() -> None:
        scene = Scene()
        first = await scene.begin()
        second = scene.ask([1, 0], rank=3)
        await asyncio.sleep(0)
        assert not second.done()  # what it needs is on its way, and not there yet
        scene.elsewhere.may_end.set()
        mine, theirs = (await first)[1], (await second)[1]
        assert theirs == [mine[1], mine[0]] and {one.segment_rank for one in theirs} == {0}
        assert scene.elsewhere.filled == [0, 1] and scene.pool.granted_count == 2
        assert scene.fetched.segments(2, 0) == {0} and not scene.fetched.segments(2, 3)
        scene.fetched.release(scene.job.arenas, (2, 0))
        assert not scene.fetched.segments(2, 0)

    asyncio.run(run())


def test_what_failed_is_brought_anew_when_it_is_asked_for_again() -> None:
    async def run() -> None:
        scene = Scene()
        scene.elsewhere.error = OSError("away")
        scene.elsewhere.may_end.set()
        with pytest.raises(OSError, match="away"):
            await (await scene.begin())
        assert scene.pool.free_count == 8  # a retry does not take others
        scene.elsewhere.error = None
        scene.job.arriving.forget(0)
        found = await scene.ask([1])
        assert scene.elsewhere.filled == [0, 1, 1] and len(found[1]) == 1
        assert scene.pool.granted_count == 1

    asyncio.run(run())


def placed(record: Any, frame: int) -> Any:
    chunks = [Chunk(one.nbytes, one.digest, Place(0, frame + at)) for at, one in enumerate(record.chunks)]
    return SimpleNamespace(**{**vars(record), "chunks": chunks})


def unknown_record(scene: Scene) -> Any:
    """The shard's record, which has to be asked for elsewhere from now on."""
    record = scene.fetched.records.get((SNAPSHOT, 1))
    scene.fetched.records.clear()
    scene.elsewhere.found = record
    scene.elsewhere.may_end.set()
    return record


@pytest.mark.parametrize("is_generation_over", [False, True])
def test_a_call_that_outlives_its_round_is_granted_nothing(is_generation_over: bool) -> None:
    async def run() -> None:
        scene = Scene()
        unknown_record(scene)
        arenas = scene.job.arenas
        scene.elsewhere.meanwhile = lambda: (
            scene.fetched.release_below(arenas, 3)
            if is_generation_over
            else scene.fetched.release(arenas, (2, 0))
        )
        with pytest.raises(NotFoundError, match="round is over"):
            await scene.ask([0, 1])
        assert scene.pool.free_count == 8 and not scene.elsewhere.filled

    asyncio.run(run())


def test_a_shard_captured_while_its_record_was_asked_for_is_named_where_it_lies() -> None:
    async def run() -> None:
        scene = Scene()
        here = SimpleNamespace(record=placed(unknown_record(scene), 5))
        facts = SimpleNamespace(problem="", shards={1: here})
        scene.elsewhere.meanwhile = lambda: scene.job.ledger.snapshots.update({SNAPSHOT: facts})
        found = await scene.ask([1, 0])
        assert [one.place for one in found[1]] == [Place(0, 6), Place(0, 5)]

    asyncio.run(run())
