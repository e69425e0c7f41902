"""A node that lost its memory has its snapshots back from its own disk: whole, newest first, and nothing wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from snapd_proto import admin_pb2, trainer_pb2

from snapd.core.ids import SnapshotId
from snapd.core.tier_keys import TierKeys
from tests.support.disk_scene import (
    ON_DEMAND,
    SEED,
    DiskDaemon,
    capture_kept,
    changed,
    disk_daemon,
    flip,
)
from tests.support.fake_trainer import Refused
from tests.support.flush_scene import BY_STEPS
from tests.support.waiting import wait_for

KEYS = TierKeys("a")
FOUND, UNUSABLE = trainer_pb2.PlanRestoreReply.FOUND, trainer_pb2.PlanRestoreReply.UNUSABLE
UNREACHABLE = trainer_pb2.PlanRestoreReply.UNREACHABLE


def kept(scene: DiskDaemon, last: int = 4) -> None:
    """Steps up to `last` were captured, the last two are on the disk, and the trainer is gone."""
    scene.daemon.start()
    trainer = scene.trainer()
    capture_kept(scene, trainer, 1, last)
    trainer.disconnect()


def flip_at(scene: DiskDaemon, segment: int, at: int) -> None:
    """A bit of rank 0's memory."""
    path = scene.daemon.arena / "jobs" / "a" / f"rank-0.seg-{segment}"
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_machine_that_lost_its_memory_goes_on_as_if_nothing_had_happened() -> None:
    with disk_daemon() as scene:
        kept(scene)
        scene.reboot()
        trainer = scene.trainer("two")
        session = trainer.session
        assert (session.has_parent, session.newest_step, session.generation) == (True, 4, 2)
        assert trainer.restore(SEED) == 4  # compares every byte
        assert [event["step"] for event in scene.daemon.events("shard.brought")] == [4]
        capture_kept(scene, trainer, 5, 6, generation=2)
        trainer.disconnect()
        scene.reboot()
        assert scene.trainer("three").restore(SEED) == 6


def test_it_is_in_memory_before_anybody_asks() -> None:
    with disk_daemon() as scene:
        kept(scene)
        scene.reboot()
        wait_for(lambda: scene.daemon.events("disk.filled"), "the disk was read")
        assert [(s.step, s.complete) for s in scene.daemon.snapshots("a")] == [(4, True)]
        disk = scene.disk()
        assert (disk.durable_step, disk.pause) == (4, "")
        last = scene.daemon.admin("Verify", admin_pb2.VerifyRequest(job="a"))[-1]
        assert last.finished
        assert not last.bad_chunks


def test_all_ranks_of_a_world() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        ranks = [scene.trainer(rank=rank, world_size=2) for rank in range(2)]
        for step in (1, 2):
            for trainer in ranks:
                trainer.capture(step, SEED)
        scene.wait_kept(2)
        assert set(scene.shards()[SnapshotId(1, 2)]) == {0, 1}
        for trainer in ranks:
            trainer.disconnect()
        scene.reboot()
        for rank in range(2):
            plan = scene.trainer("two", rank=rank, world_size=2).plan()
            assert (plan.outcome, plan.step, len(plan.shards)) == (FOUND, 2, 1)


def bit_in_pack(scene: DiskDaemon) -> str:
    path, offset = own_pack(scene)
    changed(path, flip(offset + 100))
    return path.name


def pack_cut_off(scene: DiskDaemon) -> str:
    path, offset = own_pack(scene)
    changed(path, lambda data: bytes(data[: offset + 50]))
    return path.name


def pack_gone(scene: DiskDaemon) -> str:
    path, _ = own_pack(scene)
    path.unlink()
    return path.name


def bit_in_manifest(scene: DiskDaemon) -> str:
    changed(scene.root / KEYS.shard(SnapshotId(1, 4), 0), flip(80))
    return ".shard"


def manifest_of_another_step(scene: DiskDaemon) -> str:
    source = (scene.root / KEYS.shard(SnapshotId(1, 3), 0)).read_bytes()
    changed(scene.root / KEYS.shard(SnapshotId(1, 4), 0), lambda data: source)
    return ".shard"


def manifest_of_another_job(scene: DiskDaemon) -> str:
    other = scene.trainer(job="b")
    other.capture(4, SEED)
    scene.wait_kept(4, "b")
    other.disconnect()
    source = (scene.root / TierKeys("b").shard(SnapshotId(1, 4), 0)).read_bytes()
    changed(scene.root / KEYS.shard(SnapshotId(1, 4), 0), lambda data: source)
    return ".shard"


def own_pack(scene: DiskDaemon):  # type: ignore[no-untyped-def]
    """The pack that only step 4's chunks are in, and where one of them lies."""
    shards = scene.shards()
    others = {chunk.pack for chunk in shards[SnapshotId(1, 3)][0].chunks}
    chunk = next(c for c in shards[SnapshotId(1, 4)][0].chunks if c.pack not in others)
    return scene.root / KEYS.pack(chunk.pack), chunk.offset


DAMAGES = [
    bit_in_pack,
    pack_cut_off,
    pack_gone,
    bit_in_manifest,
    manifest_of_another_step,
    manifest_of_another_job,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_named_and_the_older_one_is_taken(damage: Callable[[DiskDaemon], str]) -> None:
    with disk_daemon() as scene:
        kept(scene)
        named = damage(scene)
        scene.reboot()
        trainer = scene.trainer("two")
        plan = trainer.plan()
        assert (plan.outcome, plan.step) == (FOUND, 3)
        newer = next(c for c in plan.candidates if c.step == 4)
        assert newer.verdict == "unusable"
        assert named in newer.reason
        found, bad = trainer.read(plan.shards[0])
        assert not bad
        expected = trainer.chunks(3, SEED, 6)  # but for chunk 1, which names the generation
        assert [*found[:1], *found[2:]] == [*expected[:1], *expected[2:]]
        assert trainer.finish().committed
        events = [*scene.daemon.events("disk.unusable"), *scene.daemon.events("disk.damaged")]
        assert any(named in event["reason"] for event in events)
        capture_kept(scene, trainer, 4, 6, generation=2)  # and all is well again
        assert scene.named_packs() == scene.packs()


def test_nothing_on_the_disk_can_be_used_and_each_is_named() -> None:
    with disk_daemon() as scene:
        kept(scene)
        for path in (scene.root / KEYS.packs).iterdir():
            path.unlink()
        scene.reboot()
        plan = scene.trainer("two").plan()
        assert plan.outcome == UNUSABLE
        assert {c.step for c in plan.candidates if c.verdict == "unusable"} == {3, 4}


def test_a_shared_tier_that_has_a_newer_one_is_asked(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "tier").mkdir()
    shared = {**BY_STEPS, "SNAPD_TIER_SHARED": str(tmp_path / "tier")}
    with disk_daemon(**shared, **ON_DEMAND) as scene:
        scene.daemon.start(SNAPD_TIER_NODE_EVERY="0.05")
        trainer = scene.trainer()
        trainer.capture(1, SEED)
        scene.wait_kept(1)
        scene.daemon.kill()
        scene.daemon.start(SNAPD_TIER_NODE_EVERY="0")  # from now on the disk gets nothing
        trainer.reconnect()
        for step in (2, 3, 4):
            trainer.capture(step, SEED)
        wait_for(lambda: scene.daemon.job("a").flush.durable_step == 4, "step 4 is in the shared tier")
        trainer.disconnect()
        assert scene.steps() == [1]
        scene.reboot()
        again = scene.trainer("two")
        assert again.session.generation == 2
        assert again.restore(SEED) == 4
        assert scene.daemon.events("restore.asks_tier")


def test_a_disk_that_is_away_is_waited_for_and_named() -> None:
    with disk_daemon(SNAPD_TIER_RESTORE_WAIT="1") as scene:
        kept(scene)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        scene.reboot()
        trainer = scene.trainer("two")
        plan = trainer.plan()
        assert plan.outcome == UNREACHABLE
        assert str(scene.root) in plan.reason
        trainer.disconnect()
        aside.rename(scene.root)
        assert scene.trainer("three").restore(SEED) == 4


def test_a_disk_that_is_away_does_not_hold_up_who_has_it_in_memory() -> None:
    with disk_daemon() as scene:
        kept(scene)
        scene.daemon.kill()
        scene.root.rename(scene.root.with_name("aside"))
        scene.daemon.start()
        assert scene.trainer("two").restore(SEED) == 4


def test_a_daemon_that_is_killed_while_it_reads_the_disk() -> None:
    with disk_daemon() as scene:
        kept(scene)
        scene.reboot(is_waiting=False, SNAPD_FAULT_POINTS="daemon.bring.record.before=kill")
        assert scene.daemon.process is not None
        assert scene.daemon.process.wait(20) == -9
        scene.daemon.start()
        assert scene.trainer("two").restore(SEED) == 4


def test_a_daemon_that_is_killed_between_two_ranks_goes_on_where_it_was() -> None:
    with disk_daemon() as scene:
        scene.daemon.start()
        ranks = [scene.trainer(rank=rank, world_size=2) for rank in range(2)]
        for trainer in ranks:
            trainer.capture(1, SEED)
        scene.wait_kept(1)
        for trainer in ranks:
            trainer.disconnect()
        scene.reboot(is_waiting=False, SNAPD_FAULT_POINTS="daemon.bring.record.before:2=kill")
        assert scene.daemon.process is not None
        assert scene.daemon.process.wait(20) == -9
        scene.daemon.start()
        for rank in range(2):
            plan = scene.trainer("two", rank=rank, world_size=2).plan()
            assert (plan.outcome, plan.step, len(plan.shards)) == (FOUND, 1, 1)


def test_a_start_that_was_numbered_before_the_disk_came_begins_again() -> None:
    with disk_daemon() as scene:
        kept(scene)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        scene.reboot()
        trainer = scene.trainer("two")
        assert trainer.session.generation == 1  # nobody could know better
        aside.rename(scene.root)
        wait_for(lambda: scene.daemon.events("disk.filled"), "the disk was read")
        with pytest.raises(Refused, match="tier_generation"):
            trainer.plan()
        trainer.disconnect()
        again = scene.trainer("three")
        assert again.session.generation == 2
        assert again.restore(SEED) == 4


def test_a_bad_chunk_while_the_disk_was_away_for_a_moment() -> None:
    """Memory gives the snapshot up; the disk still has it, and an older one is not taken."""
    with disk_daemon() as scene:
        kept(scene)
        request = admin_pb2.GetSnapshotRequest(job="a", has_step=True, step=4)
        record = scene.daemon.admin("GetSnapshot", request).shards[0]
        chunk = record.chunks[3]
        flip_at(scene, chunk.segment, chunk.frame * record.chunk_bytes + 5)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        last = scene.daemon.admin("Verify", admin_pb2.VerifyRequest(job="a"))[-1]
        assert last.finished
        aside.rename(scene.root)
        assert scene.trainer("two").restore(SEED) == 4


def test_there_is_no_room_in_memory() -> None:
    with disk_daemon() as scene:
        kept(scene)
        scene.reboot(SNAPD_ARENA_BYTES=str(2 << 16))
        wait_for(lambda: scene.daemon.events("disk.unusable"), "one clear event")
        assert "no room" in scene.daemon.events("disk.unusable")[0]["reason"]
        assert len(scene.daemon.events("disk.unusable")) == 1
        scene.daemon.kill()
        shutil.rmtree(scene.daemon.arena)
        scene.daemon.start()
        assert scene.trainer("two").restore(SEED) == 4


def test_a_bad_chunk_in_memory_comes_anew_from_the_disk() -> None:
    with disk_daemon() as scene:
        kept(scene)
        request = admin_pb2.GetSnapshotRequest(job="a", has_step=True, step=4)
        record = scene.daemon.admin("GetSnapshot", request).shards[0]
        chunk = record.chunks[3]
        flip_at(scene, chunk.segment, chunk.frame * record.chunk_bytes + 5)
        scene.daemon.kill()
        scene.daemon.start()
        assert scene.trainer("two").restore(SEED) == 4
        assert [event["rank"] for event in scene.daemon.events("shard.repaired")] == [0]
