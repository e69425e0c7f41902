"""Ranks of another number read from the tier only what they ask for, once for all of a node, and resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash
from snapd_proto import format_pb2, trainer_pb2

from snapd.core.tier_keys import TierKeys
from tests.support.fake_trainer import FakeTrainer, Refused
from tests.support.flush_scene import TierDaemon, tier_daemon
from tests.support.waiting import wait_for

SAVED, CHUNKS = 3, 6
STATE = CHUNKS << 16
KEYS = TierKeys("a")
FOUND = trainer_pb2.PlanRestoreReply.FOUND


@contextmanager
def lost_machine(**settings: str) -> Iterator[TierDaemon]:
    """Steps 2 and 4 of three ranks are in the tier, and nothing else is left; a fresh daemon runs."""
    with tier_daemon(**settings) as scene:
        scene.daemon.start()
        trainers = [scene.daemon.trainer() for _ in range(SAVED)]
        for rank, trainer in enumerate(trainers):
            trainer.open(job="a", rank=rank, world_size=SAVED, state_bytes_estimate=STATE)
        for step in (2, 4):
            for trainer in trainers:
                trainer.capture(step, seed=1)
            scene.wait_durable(step)
        for trainer in trainers:
            trainer.disconnect()
        restart(scene, is_empty=True)
        yield scene


def restart(scene: TierDaemon, *, is_empty: bool = False, **settings: str) -> None:
    scene.daemon.kill()
    if is_empty:
        shutil.rmtree(scene.daemon.arena)
    scene.daemon.start(**settings)


def opened(scene: TierDaemon, rank: int, incarnation: str = "two", world_size: int = 2) -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(
        job="a", rank=rank, world_size=world_size, incarnation=incarnation, state_bytes_estimate=STATE
    )
    return trainer


def plan(trainer: FakeTrainer, number: int = 0) -> trainer_pb2.PlanRestoreReply:
    request = trainer_pb2.PlanRestoreRequest(
        session_id=trainer.session.session_id, round=number, elastic=True
    )
    reply = trainer.call("PlanRestore", request)
    assert reply.outcome == FOUND, reply.reason
    return reply


def listed(trainer: FakeTrainer, ranks: Sequence[int], number: int = 0) -> list[format_pb2.ShardRecord]:
    request = trainer_pb2.ListShardsRequest(session_id=trainer.session.session_id, round=number, ranks=ranks)
    return list(trainer.call("ListShards", request).shards)


def fetched(trainer: FakeTrainer, wanted: dict[int, list[int]], number: int = 0) -> list[Any]:
    request = trainer_pb2.FetchChunksRequest(
        session_id=trainer.session.session_id,
        round=number,
        wanted=[trainer_pb2.ShardChunks(rank=rank, chunks=chunks) for rank, chunks in wanted.items()],
    )
    return [
        list(zip(one.segment_rank, one.segment, one.frame, strict=True))
        for one in trainer.call("FetchChunks", request).found
    ]


def read(scene: TierDaemon, place: tuple[int, int, int], chunk: format_pb2.Chunk) -> bytes:
    rank, segment, frame = place
    with (scene.daemon.arena / "jobs" / "a" / f"rank-{rank}.seg-{segment}").open("rb") as file:
        file.seek(frame * (1 << 16))
        return file.read(chunk.nbytes)


def is_there(scene: TierDaemon, place: tuple[int, int, int], chunk: format_pb2.Chunk) -> bool:
    return xxhash.xxh3_128_digest(read(scene, place, chunk)) == chunk.xxh3_128


def packs(scene: TierDaemon) -> list[Path]:
    return [scene.root / info.key for info in scene.store.list(KEYS.packs)]


def frames_used(scene: TierDaemon) -> int:
    return int(scene.daemon.job("a").arena_bytes_in_use) >> 16


def test_nothing_is_brought_but_what_a_rank_asks_for() -> None:
    with lost_machine() as scene:
        trainer = opened(scene, 0)
        reply = plan(trainer)
        assert (reply.step, reply.saved_world_size, len(reply.shards)) == (4, SAVED, 0)
        records = listed(trainer, [0, 2])
        found = fetched(trainer, {2: [3, 1]})
        assert [place[0] for place in found[0]] == [0, 0]  # in its own arena
        assert all(
            is_there(scene, place, records[1].chunks[at]) for place, at in zip(found[0], (3, 1), strict=True)
        )
        assert not scene.daemon.events("shard.brought")
        assert not scene.daemon.job("a").has_complete


def test_two_ranks_read_it_once_and_map_it_where_it_is() -> None:
    with lost_machine() as scene:
        first, second = opened(scene, 0), opened(scene, 1)
        plan(first)
        plan(second)
        record = listed(first, [1])[0]
        mine = fetched(first, {1: [2, 3]})
        for path in packs(scene):  # nothing can be read any more
            path.rename(path.with_suffix(".aside"))
        assert fetched(second, {1: [3]}) == [[mine[0][1]]]
        with pytest.raises(Refused, match="pack"):
            fetched(second, {1: [4]})
        assert second.handshake is not None
        request = trainer_pb2.FetchShard(job="a", generation=1, step=4, rank=0, fetched=True)
        reply, descriptors = second.handshake.ask(trainer_pb2.HandshakeRequest(fetch_shard=request))
        assert [(one.rank, one.segment) for one in reply.descriptors.segments] == [(0, mine[0][0][1])]
        assert len(descriptors) == 1 and is_there(scene, mine[0][1], record.chunks[3])


def test_what_cannot_be_had_makes_all_ranks_take_the_next_snapshot() -> None:
    with lost_machine() as scene:
        first, second = opened(scene, 0), opened(scene, 1)
        assert plan(first).step == plan(second).step == 4
        for path in (scene.root / "jobs" / "a").rglob("*"):
            if path.is_file() and path.name.endswith(".shard") and "0000000004" in str(path):
                path.unlink()
        with pytest.raises(Refused, match=r"\.shard") as refused:
            listed(first, [1])
        assert refused.value.kind == "shard_sources"
        bad = trainer_pb2.BadChunk(rank=1, chunk_index=0, what=refused.value.message)
        # both report before either is answered
        request = trainer_pb2.FinishRestoreRequest(session_id=first.session.session_id, bad_chunks=[bad])
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(second.finish)
            answer = first.call("FinishRestore", request)
            assert answer.try_again and other.result().try_again
        again = plan(first, 1)
        assert again.step == plan(second, 1).step == 2
        verdict = next(one for one in again.candidates if one.step == 4)
        assert verdict.verdict == "unusable" and ".shard" in verdict.reason


def test_a_killed_daemon_finds_again_what_had_arrived() -> None:
    with lost_machine() as scene:
        trainer = opened(scene, 0)
        plan(trainer)
        fetched(trainer, {1: [2, 3]})
        trainer.disconnect()
        restart(scene)
        again = opened(scene, 0, "three")
        plan(again)
        record = listed(again, [1])[0]
        for path in packs(scene):
            path.rename(path.with_suffix(".aside"))
        found = fetched(again, {1: [3, 2]})
        assert is_there(scene, found[0][0], record.chunks[3])
        assert is_there(scene, found[0][1], record.chunks[2])
        with pytest.raises(Refused, match="pack"):
            fetched(again, {1: [4]})


def test_what_a_killed_daemon_left_is_hashed_before_it_counts() -> None:
    with lost_machine() as scene:
        trainer = opened(scene, 0)
        plan(trainer)
        place = fetched(trainer, {1: [2]})[0][0]
        trainer.disconnect()
        scene.daemon.kill()
        path = scene.daemon.arena / "jobs" / "a" / f"rank-{place[0]}.seg-{place[1]}"
        with path.open("r+b") as file:
            file.seek(place[2] * (1 << 16) + 77)
            file.write(b"?")
        scene.daemon.start()
        again = opened(scene, 0, "three")
        plan(again)
        record = listed(again, [1])[0]
        found = fetched(again, {1: [2]})
        assert is_there(scene, found[0][0], record.chunks[2])


def test_frames_are_free_again_when_the_round_is_over() -> None:
    with lost_machine() as scene:
        trainer = opened(scene, 0, world_size=1)
        plan(trainer)
        before = frames_used(scene)
        fetched(trainer, {0: [0, 1], 1: [2]})
        assert frames_used(scene) == before + 3
        assert trainer.finish().committed
        wait_for(lambda: frames_used(scene) == before, "the frames are free")
        trainer.capture(5, seed=1)
