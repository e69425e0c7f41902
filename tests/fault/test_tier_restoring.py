"""A daemon restores from its shared tier: what is lost, damaged, away or newer elsewhere, and what is taken then."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from snapd_proto import admin_pb2, trainer_pb2

from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredChunk, StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.tier.known_chunks import read_record
from tests.support.fake_trainer import FakeTrainer
from tests.support.flush_scene import ON_DEMAND, TierDaemon, capture_steps, shards_of, tier_daemon
from tests.support.waiting import wait_for

STATE = 6 << 16
SEED = 1
KEYS = TierKeys("a")
FOUND, UNUSABLE = trainer_pb2.PlanRestoreReply.FOUND, trainer_pb2.PlanRestoreReply.UNUSABLE
UNREACHABLE = trainer_pb2.PlanRestoreReply.UNREACHABLE


def opened(scene: TierDaemon, incarnation: str, job: str = "a") -> FakeTrainer:
    trainer = scene.daemon.trainer()
    trainer.open(job=job, incarnation=incarnation, state_bytes_estimate=STATE)
    return trainer


def captured(scene: TierDaemon, *, last: int = 4) -> None:
    """Steps up to `last` in the tier, every second one; the trainer is gone, the daemon is there."""
    scene.daemon.start()
    trainer = opened(scene, "one")
    for step in range(1, last + 1):
        capture_steps(trainer, step, step, seed=SEED)
        if step % 2 == 0:
            scene.wait_durable(step)
    trainer.disconnect()


def lose_memory(scene: TierDaemon) -> None:
    """Everything but the tier is gone, and a fresh daemon runs."""
    scene.daemon.kill()
    shutil.rmtree(scene.daemon.arena)
    scene.daemon.log_file.write_text("")
    scene.daemon.start()


def stored(scene: TierDaemon, step: int, *, revision: int = 0) -> StoredShard:
    return shards_of(scene.store, read_record(scene.store, KEYS, SnapshotId(1, step), revision))[0]


def changed(path: Path, change: Callable[[bytearray], bytes]) -> None:
    path.chmod(0o600)
    path.write_bytes(change(bytearray(path.read_bytes())))


def own_pack(scene: TierDaemon, step: int) -> tuple[Path, int]:
    """The pack that only this step's chunks are in, and where one of them lies."""
    others = {c.pack for s in (2, 4) if s != step for c in stored(scene, s).chunks}
    chunk = next(c for c in stored(scene, step).chunks if c.pack not in others)
    return scene.root / KEYS.pack(chunk.pack), chunk.offset


def flip(offset: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        data[offset] ^= 0x10
        return bytes(data)

    return change


def bit_in_pack(scene: TierDaemon) -> str:
    path, offset = own_pack(scene, 4)
    changed(path, flip(offset + 100))
    return path.name


def pack_cut_off(scene: TierDaemon) -> str:
    path, offset = own_pack(scene, 4)
    changed(path, lambda data: bytes(data[: offset + 50]))
    return path.name


def pack_gone(scene: TierDaemon) -> str:
    path, _ = own_pack(scene, 4)
    path.unlink()
    return path.name


def bit_in_shard(scene: TierDaemon) -> str:
    changed(scene.root / KEYS.shard(SnapshotId(1, 4), 0), flip(80))
    return ".shard"


def shard_of_another_step(scene: TierDaemon) -> str:
    source = (scene.root / KEYS.shard(SnapshotId(1, 2), 0)).read_bytes()
    changed(scene.root / KEYS.shard(SnapshotId(1, 4), 0), lambda data: source)
    return ".shard"


def record_cut_off(scene: TierDaemon) -> str:
    changed(scene.root / KEYS.snapshot(SnapshotId(1, 4)), lambda data: bytes(data[:-9]))
    return ".snapshot"


DAMAGES = [bit_in_pack, pack_cut_off, pack_gone, bit_in_shard, shard_of_another_step, record_cut_off]


def test_a_fresh_machine_with_only_the_tier() -> None:
    with tier_daemon() as scene:
        captured(scene)
        lose_memory(scene)
        trainer = opened(scene, "two")
        session = trainer.session
        assert (session.has_parent, session.newest_step, session.generation) == (True, 4, 2)
        assert trainer.restore(SEED) == 4
        assert scene.flush().pause == "", scene.flush().reason
        capture_steps(trainer, 5, 6, seed=SEED)
        scene.wait_durable(6, generation=2)
        assert [event["step"] for event in scene.daemon.events("shard.brought")] == [4]
        assert scene.daemon.events("flush.paused") == []  # what came from the tier is not refused by it


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_named_and_the_next_is_taken(damage: Callable[[TierDaemon], str]) -> None:
    with tier_daemon() as scene:
        captured(scene)
        scene.daemon.kill()
        named = damage(scene)
        lose_memory(scene)
        trainer = opened(scene, "two")
        plan = trainer.plan()
        assert (plan.outcome, plan.step) == (FOUND, 2)
        newer = next(c for c in plan.candidates if c.step == 4)
        assert newer.verdict == "unusable"
        assert named in newer.reason
        found, bad = trainer.read(plan.shards[0])
        assert not bad and len(found) == 6


def flip_in_memory(scene: TierDaemon, step: int, index: int) -> None:
    record = scene.record(step)
    chunk = record.chunks[index]
    path = scene.daemon.arena / "jobs" / "a" / f"rank-0.seg-{chunk.segment}"
    changed_at = chunk.frame * record.chunk_bytes + 5
    with path.open("r+b") as file:
        file.seek(changed_at)
        byte = file.read(1)[0]
        file.seek(changed_at)
        file.write(bytes([byte ^ 1]))


def test_verify_mends_from_the_tier_and_says_so() -> None:
    with tier_daemon() as scene:
        captured(scene)
        flip_in_memory(scene, 4, 3)

        def verify(*arguments: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "snapd", "verify", "a", *arguments]
            done = subprocess.run(command, env=scene.daemon.env, capture_output=True, text=True, check=False)
            return done.returncode, done.stdout + done.stderr

        code, text = verify()
        assert code == 0 and f"1 bad chunk brought back from {scene.root}\n" in text, text
        assert scene.daemon.events("shard.repaired")[-1]["source"] == str(scene.root)
        flip_in_memory(scene, 4, 2)
        code, text = verify("--json")
        (found,) = (each for each in json.loads(text) if each["step"] == 4)
        assert code == 0 and found["repaired_from"] == str(scene.root)
        assert [chunk["chunk"] for chunk in found["repaired_chunks"]] == [2]
        assert {each["repaired_from"] for each in json.loads(verify("--json")[1])} == {None}


def test_memory_and_tier_together_make_a_snapshot_whole() -> None:
    """A chunk that is bad in memory comes from the tier, what is good stays where it is."""
    with tier_daemon() as scene:
        captured(scene)
        flip_in_memory(scene, 4, 3)
        scene.daemon.kill()
        scene.daemon.start()
        trainer = opened(scene, "two")
        assert trainer.restore(SEED) == 4
        brought = scene.daemon.events("shard.brought")
        assert [(event["step"], event["reused_chunks"]) for event in brought] == [(4, 5)]
        assert any(event["event"] == "shard.bad" for event in scene.daemon.events())


def test_a_trainer_that_starts_again_does_not_ask_the_tier() -> None:
    """Memory has the newest, and the daemon knows it: a tier that is away does not hold it up."""
    with tier_daemon() as scene:
        scene.daemon.start()
        trainer = opened(scene, "one")
        capture_steps(trainer, 1, 5, seed=SEED)
        scene.wait_durable(4)
        trainer.disconnect()
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        again = opened(scene, "two")
        assert again.restore(SEED) == 5
        assert not scene.daemon.events("restore.asks_tier"), scene.daemon.events("restore.asks_tier")


def test_a_tier_that_is_away_is_waited_for_and_named() -> None:
    with tier_daemon(SNAPD_TIER_RESTORE_WAIT="1") as scene:
        captured(scene)
        aside = scene.root.with_name("aside")
        scene.root.rename(aside)
        lose_memory(scene)
        trainer = opened(scene, "two")
        plan = trainer.plan()
        assert plan.outcome == UNREACHABLE
        assert str(scene.root) in plan.reason
        trainer.disconnect()
        aside.rename(scene.root)
        assert opened(scene, "three").restore(SEED) == 4


@pytest.mark.parametrize("idle_s", [0.0, 200.0], ids=["just now", "longer ago"])
def test_a_daemon_that_starts_again_while_the_tier_is_away(idle_s: float) -> None:
    """Right after its trainers were served it goes on from memory; later the job may have been elsewhere, and nobody
    can say.
    """
    with tier_daemon(SNAPD_TIER_RESTORE_WAIT="1") as scene:
        captured(scene)
        index = sqlite3.connect(scene.daemon.arena / "jobs" / "a" / "index.db")
        with contextlib.closing(index), index:
            (text,) = index.execute("SELECT value FROM meta WHERE key = 'served'").fetchone()
            assert list(json.loads(text)) == ["1"]
        scene.daemon.kill()
        index = sqlite3.connect(scene.daemon.arena / "jobs" / "a" / "index.db")
        with contextlib.closing(index), index:
            aged = {number: at_s - idle_s for number, at_s in json.loads(text).items()}
            index.execute("UPDATE meta SET value = ? WHERE key = 'served'", (json.dumps(aged),))
        scene.root.rename(scene.root.with_name("aside"))
        scene.daemon.start()
        trainer = opened(scene, "two")
        plan = trainer.plan()
        if idle_s:
            assert plan.outcome == UNREACHABLE
            assert str(scene.root) in plan.reason
        else:
            assert (plan.outcome, plan.step) == (FOUND, 4)
        assert [event["how"] for event in scene.daemon.events("restore.asks_tier")] == [
            "must" if idle_s else "briefly"
        ]


def test_a_job_that_was_elsewhere_meanwhile() -> None:
    """Memory here has step 4; another machine went on to step 8 and this one's daemon was started again."""
    with tier_daemon() as here, tier_daemon(here.root) as there:
        captured(here)
        there.daemon.start()
        trainer = opened(there, "elsewhere")
        assert trainer.restore(SEED) == 4
        capture_steps(trainer, 5, 8, seed=SEED)
        there.wait_durable(8, generation=2)
        there.daemon.kill()
        here.daemon.restart()
        again = opened(here, "two")
        assert again.session.generation == 3
        assert again.restore(SEED) == 8


def test_a_step_that_only_the_tier_has() -> None:
    with tier_daemon() as scene:
        captured(scene)
        trainer = opened(scene, "two")
        plan = trainer.plan(step=2)
        assert (plan.outcome, plan.step) == (FOUND, 2)
        _, bad = trainer.read(plan.shards[0])
        assert not bad
        assert trainer.finish().committed
        capture_steps(trainer, 3, 4, seed=SEED)  # it goes on from there
        scene.wait_durable(4, generation=2)


def test_everything_is_unusable_and_each_is_named() -> None:
    with tier_daemon() as scene:
        captured(scene)
        for path in (scene.root / "jobs/a/packs").iterdir():
            path.unlink()
        lose_memory(scene)
        plan = opened(scene, "two").plan()
        assert plan.outcome == UNUSABLE
        assert {c.step for c in plan.candidates if c.verdict == "unusable"} == {2, 4}


def test_a_daemon_that_is_killed_while_it_brings_a_shard() -> None:
    with tier_daemon() as scene:
        captured(scene)
        scene.daemon.kill()
        shutil.rmtree(scene.daemon.arena)
        scene.daemon.start(SNAPD_FAULT_POINTS="daemon.bring.record.before=kill")
        trainer = opened(scene, "two")
        with pytest.raises(Exception, match=r"UNAVAILABLE|Socket|unavailable|reset"):
            trainer.plan()
        assert scene.daemon.process is not None
        assert wait_for(lambda: scene.daemon.process.poll(), "the daemon is dead") == -9
        trainer.disconnect()
        scene.daemon.start()
        assert opened(scene, "three").restore(SEED) == 4
        brought = scene.daemon.events("shard.brought")  # all had arrived: it is hashed, and not read again
        assert [(event["arrived_chunks"], event["fetched_bytes"]) for event in brought] == [(6, 0)]


def test_the_arena_is_filled_before_the_trainer_starts() -> None:
    with tier_daemon(**ON_DEMAND, SNAPD_TIER_RESTORE_WAIT="1") as scene:
        scene.daemon.start(SNAPD_TIER_EVERY_STEPS="2")
        trainer = opened(scene, "one")
        capture_steps(trainer, 1, 4, seed=SEED)
        scene.wait_durable(4)
        trainer.disconnect()
        lose_memory(scene)
        request = admin_pb2.FillArenaRequest(job="a")
        last = scene.daemon.admin("FillArena", request)[-1]
        assert (last.finished, last.step, last.generation, list(last.ranks_here)) == (True, 4, 1, [])
        assert list(scene.daemon.admin("FillArena", request)[-1].ranks_here) == [0]
        wait_for(lambda: scene.daemon.events("tier.learnt"), "the daemon knows what the tier has")
        scene.root.rename(scene.root.with_name("aside"))
        assert opened(scene, "two").restore(SEED) == 4


def frozen_chunk(scene: TierDaemon, snapshot: SnapshotId) -> StoredChunk:
    """The one that every step has alike."""
    return shards_of(scene.store, read_record(scene.store, KEYS, snapshot, 0))[0].chunks[5]


def test_what_a_restore_found_bad_in_the_tier_is_not_built_upon() -> None:
    with tier_daemon() as scene:
        captured(scene)
        bad = frozen_chunk(scene, SnapshotId(1, 4))
        assert bad == frozen_chunk(scene, SnapshotId(1, 2))
        changed(scene.root / KEYS.pack(bad.pack), flip(bad.offset + 9))
        lose_memory(scene)
        trainer = opened(scene, "two")
        assert trainer.plan().outcome == UNUSABLE  # both snapshots name it
        capture_steps(trainer, 1, 2, seed=SEED)
        scene.wait_durable(2, generation=2)
        assert frozen_chunk(scene, SnapshotId(2, 2)) != bad
        trainer.disconnect()
        lose_memory(scene)
        assert opened(scene, "three").restore(SEED) == 2


def test_a_bad_pack_that_is_put_aside_is_not_built_upon() -> None:
    """What docs/tiers.md has an operator do when `snapd verify --from URL --deep` names a bad pack."""
    with tier_daemon() as scene:
        captured(scene)
        bad = frozen_chunk(scene, SnapshotId(1, 4))
        path = scene.root / KEYS.pack(bad.pack)
        changed(path, flip(bad.offset + 9))
        path.rename(path.with_suffix(".aside"))
        trainer = opened(scene, "two")
        assert trainer.restore(SEED) == 4  # from memory
        capture_steps(trainer, 5, 6, seed=SEED)
        scene.wait_durable(6, generation=2)
        assert (
            bad.pack
            not in shards_of(scene.store, read_record(scene.store, KEYS, SnapshotId(2, 6), 0))[0].packs
        )
        trainer.disconnect()
        lose_memory(scene)
        assert opened(scene, "three").restore(SEED) == 6
