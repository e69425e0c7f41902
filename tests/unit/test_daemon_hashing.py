"""Hashing a shard on several threads, and on which cores they run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from snapd_native import Mapping
from snapd_proto import format_pb2

from snapd.core.ids import Place
from snapd.core.lanes import ChunkSource
from snapd.errors import InvariantViolated
from snapd.memory.segments import SegmentSet, back_segment
from snapd.runtime import digesting
from snapd.runtime.digesting import Digested, ExpectedLayout, digest_shard
from snapd.runtime.hash_threads import hash_threads, settle_down, share_of

CHUNK, FRAMES = 4096, 40
LAYOUT = format_pb2.ShardLayout(job="j", rank=0, world_size=1, chunk_bytes=CHUNK).SerializeToString()
EXPECTED = ExpectedLayout("j", 0, 1, CHUNK, len(LAYOUT))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SegmentSet]:
    path = tmp_path / "segment"
    back_segment(path, 0, CHUNK * FRAMES).mapping.close()
    data = b"".join(bytes([frame]) * CHUNK for frame in range(FRAMES))
    path.write_bytes(LAYOUT + data[len(LAYOUT) :])
    segments = SegmentSet(0, CHUNK)
    descriptor = os.open(path, os.O_RDWR)
    from snapd.memory.segments import Segment

    segments.add(Segment(0, CHUNK * FRAMES, path, Mapping(descriptor, CHUNK * FRAMES, False)))
    os.close(descriptor)
    yield segments
    segments.segments[0].mapping.close()


def digest(memory: SegmentSet, sources: list[ChunkSource], *, workers: int) -> Digested:
    with hash_threads(workers) as threads:
        return asyncio.run(
            digest_shard(
                threads, memory, sources, own=None, base=None, expected=EXPECTED,
                hash_workers=workers, trainers=1,
            )
        )  # fmt: skip


def fresh(count: int = FRAMES) -> list[ChunkSource]:
    return [ChunkSource(Place(0, frame), CHUNK - frame, is_reused=False) for frame in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_chunk_has_the_hash_of_its_own_bytes_however_many_threads_share_the_work(
    memory: SegmentSet, workers: int
) -> None:
    sources = fresh()
    digested = digest(memory, sources, workers=workers)
    wanted = [xxhash.xxh3_128_digest(memory.view(s.place, s.nbytes)) for s in sources]
    assert [chunk.digest for chunk in digested.chunks] == wanted
    assert len(set(wanted)) == FRAMES
    assert digested.digest == xxhash.xxh3_128_digest(b"".join(wanted))
    assert digested.own == [s.place for s in sources]


def test_each_chunk_is_hashed_once_by_whichever_thread_comes_first(
    memory: SegmentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Place] = []
    plain = digesting.hash_frame

    def noted(segments: SegmentSet, place: Place, nbytes: int) -> bytes:
        taken.append(place)
        return plain(segments, place, nbytes)

    monkeypatch.setattr(digesting, "hash_frame", noted)
    digest(memory, fresh(), workers=4)
    assert sorted(taken) == [Place(0, frame) for frame in range(FRAMES)]


def test_a_frame_outside_its_segment_ends_the_capture(memory: SegmentSet) -> None:
    sources = [*fresh(3), ChunkSource(Place(0, FRAMES), CHUNK, is_reused=False)]
    with pytest.raises(InvariantViolated):
        digest(memory, sources, workers=2)


def test_the_cores_are_shared_out_while_there_are_enough() -> None:
    shares = [share_of(number, 3, range(8)) for number in range(3)]
    assert frozenset().union(*shares) == frozenset(range(8))
    assert sum(len(share) for share in shares) == 8
    assert share_of(1, 3, [4, 6]) == {4, 6}
    assert share_of(0, 1, [4, 6]) == {4, 6}


def affinity_of(threads: ThreadPoolExecutor, trainers: int) -> frozenset[int]:
    def ask() -> frozenset[int]:
        settle_down(trainers)
        return frozenset(os.sched_getaffinity(0))

    return threads.submit(ask).result()


def test_a_thread_keeps_to_its_cores_only_while_trainers_leave_one_free() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    with hash_threads(2) as threads:
        apart = affinity_of(threads, len(cores) - 1)
        assert apart in (share_of(0, 2, cores), share_of(1, 2, cores))
        assert affinity_of(threads, len(cores)) == cores
        assert affinity_of(threads, 0) in (share_of(0, 2, cores), share_of(1, 2, cores))
    settle_down(0)
    assert os.sched_getaffinity(0) == cores, "not a hashing thread: left alone"
