"""Somebody empties the tier while a snapshot is written: a bucket made anew, a backup put back, a rule that expires
packs. What is committed afterwards can be read to the last byte, and nobody waits for what is gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.core.ids import SnapshotId
from snapd.errors import UnavailableError
from snapd.store.directory import DirectoryStore
from snapd.tier.writing import ShardBytes
from tests.support.flush_parts import Writers, contents_of, flush, shard
from tests.support.stores import directory_store
from tests.support.tier_audit import audit

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


@pytest.mark.parametrize("moment", MOMENTS)
def test_all_is_gone_and_the_snapshot_is_written_anew(
    store: DirectoryStore, writers: Writers, tmp_path: Path, moment: str
) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    writer, built = writers.make(store), [shard(contents_of(2), step=2)]
    writers.at[moment] = lambda: emptied(tmp_path / "tier")
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
