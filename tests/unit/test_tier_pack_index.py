"""A pack's own index is read from a store and compared with manifests; `snapd verify --deep` names the pack."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from snapd.cli.main import app
from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys
from snapd.store.base import Store
from snapd.store.directory import DirectoryStore
from snapd.tier.manifests import decode_entry, decode_snapshot
from snapd.tier.pack_index import index_problem, read_index
from tests.support.stores import surroundings
from tests.support.tier_golden import JOB, SECOND

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tier_v1" / "tier"
KEYS = TierKeys(JOB)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "tier")
    return tmp_path / "tier"


@pytest.fixture
def store(tier: Path) -> Iterator[Store]:
    opened = DirectoryStore(tier, surroundings())
    yield opened
    opened.close()


def chunks_of(store: Store) -> list[StoredChunk]:
    key = KEYS.snapshot(SECOND)
    record = decode_snapshot(store.read(key, max_nbytes=1 << 20), key=key, job=JOB)
    shards = [decode_entry(store.read(e.key, max_nbytes=1 << 20), e, record) for e in record.shards]
    return [chunk for shard in shards for chunk in shard.chunks]


def test_indexes_say_what_manifests_say(store: Store) -> None:
    chunks = chunks_of(store)
    names = sorted({chunk.pack for chunk in chunks})
    assert len(names) >= 5
    for name in names:
        assert index_problem(store, KEYS, name, chunks) == ""
        assert set(read_index(store, KEYS, name)) >= {chunk for chunk in chunks if chunk.pack == name}
    first = dataclasses.replace(chunks[0], digest=b"x" * 16)
    assert "another chunk at byte" in index_problem(store, KEYS, first.pack, [first])
    assert index_problem(store, KEYS, "f" * 32 + "-000000", chunks) == ""  # not there: no index


@pytest.mark.parametrize("place", [3, 20, 60, -1, -20, -30, -45])
def test_a_changed_header_or_index_is_named(tier: Path, store: Store, place: int) -> None:
    name = chunks_of(store)[0].pack
    path = tier / KEYS.pack(name)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)
    assert KEYS.pack(name) in index_problem(store, KEYS, name, ())
    done = CliRunner().invoke(app, ["verify", JOB, "--from", str(tier), "--deep"])
    assert done.exit_code == 3 and name in done.output and "0 bad chunks" in done.output, done.output


@pytest.mark.parametrize("nbytes", [0, 10, 64, 103])
def test_a_pack_that_was_cut_off_is_named(tier: Path, store: Store, nbytes: int) -> None:
    name = chunks_of(store)[0].pack
    path = tier / KEYS.pack(name)
    path.write_bytes(path.read_bytes()[:nbytes])
    assert "cut off" in index_problem(store, KEYS, name, ())


def test_all_is_good_in_the_golden_tier(tier: Path) -> None:
    done = CliRunner().invoke(app, ["verify", JOB, "--from", str(tier), "--deep"])
    assert done.exit_code == 0 and done.output.count("all good") == 2, done.output
