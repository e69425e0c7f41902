"""Somebody empties the tier while a snapshot is written: a bucket made anew, a backup put back, a rule that expires
packs. What is committed afterwards can be read to the last byte, and nobody waits for what is gone.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.errors import UnavailableError
from snapd.store.directory import DirectoryStore
from snapd.tier.writing import ShardBytes
from tests.support.flush_parts import Writers, contents_of, flush, shard
from tests.support.flush_scene import capture_steps, tier_daemon
from tests.support.stores import directory_store
from tests.support.tier_audit import audit
from tests.support.waiting import wait_for

ATTEMPTS_MAX = 3
MOMENTS = [
    "daemon.flush.intent.after",
    "daemon.flush.pack.before",
    "daemon.flush.pack.after",
    "daemon.flush.manifest.before",
    "daemon.flush.manifest.after",
]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return directory_store(tmp_path / "tier")


@pytest.fixture
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def emptied(root: Path) -> None:
    shutil.rmtree(root / "jobs")


def frames_of(written: ShardBytes) -> list[bytes]:
    return [bytes(frame) for frame in written.memory.frames]  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_beat_due", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_all_is_gone_and_the_snapshot_is_written_anew(
    store: DirectoryStore, writers: Writers, tmp_path: Path, moment: str, is_beat_due: bool
) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    writer, built = writers.make(store), [shard(contents_of(2), step=2)]

    def strike() -> None:
        emptied(tmp_path / "tier")
        writers.clock.ahead_s += 1000.0 if is_beat_due else 0.0  # a quarter of the hour that an intent lives

    writers.at[moment] = strike
    kinds = []
    for _ in range(ATTEMPTS_MAX):
        try:
            flush(writer, built)
            break
        except UnavailableError as error:
            kinds.append(error.kind)
    assert moment not in writers.at and set(kinds) == {"tier_condemned"}
    assert audit(store, "a") == {SnapshotId(1, 2): [frames_of(built[0])]}


def test_packs_are_gone_that_a_manifest_of_a_killed_daemon_names(
    store: DirectoryStore, writers: Writers, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    built = [shard(contents_of(2), step=2)]
    writers.at["daemon.flush.commit.before"] = kill
    with pytest.raises(Killed):
        flush(writers.make(store, node="n"), built)
    shutil.rmtree(tmp_path / "tier" / "jobs" / "a" / "packs")
    writer = writers.make(store, node="n")
    with pytest.raises(UnavailableError) as error:
        flush(writer, built)
    assert error.value.kind == "tier_condemned" and "packs" in str(error.value.context["key"])
    done = flush(writer, built)
    assert done.snapshot.revision == 1 and done.shards_resumed == 0
    assert audit(store, "a") == {SnapshotId(1, 2): [frames_of(built[0])]}


@pytest.mark.parametrize("folder", ["snapshots", "shards"])
def test_a_bad_sector_under_the_newest_snapshot_does_not_keep_newer_ones_from_becoming_durable(
    store: DirectoryStore, writers: Writers, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    opened, struck = DirectoryStore._opened, []

    def fail(self: DirectoryStore, key: str) -> int:
        if f"/{folder}/" in key and "-000000000000001" in key:
            struck.append(key)
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, key)

    monkeypatch.setattr(DirectoryStore, "_opened", fail)
    built = [shard(contents_of(2), step=2)]
    done = flush(writers.make(store), built)
    assert struck and done.is_ours
    with pytest.raises(
        UnavailableError
    ) as error:  # it is not called damaged: another path to the disk may read it
        store.read(struck[0], max_nbytes=1 << 20)
    assert error.value.kind == "store_failing" and "dmesg" in error.value.hint
    monkeypatch.setattr(DirectoryStore, "_opened", opened)
    assert audit(store, "a")[SnapshotId(1, 2)] == [frames_of(built[0])]


def put_back(root: Path, kept: Path) -> None:
    shutil.rmtree(root / "jobs")
    shutil.copytree(kept / "jobs", root / "jobs")


def test_an_older_state_is_put_back_and_drain_does_not_call_durable_what_is_gone() -> None:
    with tier_daemon(SNAPD_TIER_GC_EVERY="1h") as scene:
        scene.daemon.start()
        trainer = scene.daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=6 << 16)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        kept = scene.root.with_name("kept")
        shutil.copytree(scene.root, kept)
        capture_steps(trainer, 3, 4)
        scene.wait_durable(4)
        put_back(scene.root, kept)
        assert max(scene.snapshots()) == SnapshotId(1, 2)
        reply = scene.daemon.admin("Flush", scene.flush_request(20.0))
        assert (reply.is_durable, reply.step) == (True, 4)
        assert scene.snapshots()[SnapshotId(1, 4)] == [trainer.chunks(4, 1, 6)]
        (lost,) = scene.daemon.events("flush.lost")
        assert lost["snapshot"] == "1/4" and "1/2" in lost["reason"]


def test_an_older_state_is_put_back_and_the_collector_sees_it() -> None:
    with tier_daemon(SNAPD_TIER_GC_EVERY="1s", SNAPD_TIER_INTENT_TTL="4s") as scene:
        scene.daemon.start()
        trainer = scene.daemon.trainer()
        trainer.open(job="a", state_bytes_estimate=6 << 16)
        capture_steps(trainer, 1, 2)
        scene.wait_durable(2)
        emptied(scene.root)
        wait_for(lambda: scene.daemon.events("flush.lost"), "it is seen")
        wait_for(lambda: SnapshotId(1, 2) in audit(scene.store, "a"), "it is written again")
