"""The commands that read a tier with no daemon: what they print, and with which code they end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from snapd.cli.main import app
from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredChunk, StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.tier.known_chunks import read_entry, read_record
from snapd.tier.reading import Candidate, TierReader
from snapd.tier.streaming import Miss
from tests.support.stored_snapshot import TierWriter, build_world, directory_store, flip_bit
from tests.support.waiting import wait_for

KEYS = TierKeys("job")
runner = CliRunner()


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, steps 10 and 20, compressed. Nothing else of this user is looked at."""
    monkeypatch.setenv("SNAPD_RUNTIME_DIR", str(tmp_path / "none"))
    monkeypatch.delenv("SNAPD_JOB", raising=False)
    root = tmp_path / "tier"
    writer = TierWriter(directory_store(root), mode="always")
    for step in (10, 20):
        writer.write_built(build_world(step=step))
    return root


def run(*arguments: object, code: int = 0) -> str:
    """Standard output; with a code other than 0 standard error, in one line."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result.stdout if code == 0 else result.stdout + result.stderr


def damage(root: Path, step: int) -> str:
    """Flip a bit of a chunk that only this step has; the pack's name."""
    store = directory_store(root)

    def chunks(of: int) -> list[StoredChunk]:
        record = read_record(store, KEYS, SnapshotId(1, of), 0)
        return [chunk for entry in record.shards for chunk in read_entry(store, record, entry).chunks]

    others = {chunk.digest for chunk in chunks(30 - step)}
    chunk = next(c for c in reversed(chunks(step)) if c.digest not in others)
    flip_bit(root, KEYS.pack(chunk.pack), chunk.offset + chunk.stored_nbytes // 2)
    return str(chunk.pack)


def test_ls_lists_newest_first_and_names_what_is_broken(tier: Path) -> None:
    rows = json.loads(run("ls", "--from", tier, "--json"))
    assert [(row["job"], row["step"], row["complete"]) for row in rows] == [
        ("job", 20, True),
        ("job", 10, True),
    ]
    flip_bit(tier, KEYS.snapshot(SnapshotId(1, 20)), 40)
    rows = json.loads(run("ls", "--from", tier, "--json"))
    assert KEYS.snapshot(SnapshotId(1, 20)) in rows[0]["problem"]
    flip_bit(tier, KEYS.snapshot(SnapshotId(1, 10)), 40)
    run("ls", "--from", tier, code=3)


def test_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["ls"], ["verify"], ["restore", "--to", tmp_path / "x"]):
        told = run(*command, "--from", tmp_path / "empty", code=1)
        assert len(told.strip().splitlines()) == 1
    told = run("restore", "--to", tmp_path / "x", "--from", tmp_path / "gone", "--job", "job", code=4)
    assert "gone is missing" in told  # a disk that is not mounted is not an empty one


def test_show(tier: Path) -> None:
    found = json.loads(run("show", "job", "--from", tier, "--json"))
    assert (found["step"], found["world_size"], len(found["shards"])) == (20, 2, 2)
    assert [tensor["name"] for tensor in found["shards"][0]["tensors"]] == ["w", "frozen"]


def test_verify_reads_what_it_says(tier: Path) -> None:
    assert "all good" in run("verify", "--from", tier)
    deep = json.loads(run("verify", "job", "--deep", "--from", tier, "--json"))
    assert [row["bad_chunks"] for row in deep] == [[], []]
    assert 0 < deep[1]["nbytes"] < deep[0]["nbytes"]  # frozen chunks are read once
    pack = damage(tier, 20)
    assert "all good" in run("verify", "--from", tier)  # manifests and sizes say nothing of it
    told = run("verify", "job", "--deep", "--from", tier, code=3)
    assert pack in told and "in it:" in told
    (tier / KEYS.pack(pack)).unlink()
    assert f"{KEYS.pack(pack)} is not there" in run("verify", "--from", tier, code=3)


def test_restore_takes_the_next_when_the_newest_is_bad_and_says_so(tier: Path, tmp_path: Path) -> None:
    run("restore", "--to", tmp_path / "good", "--from", tier, "--rank", "1")
    pack = damage(tier, 20)
    told = run("restore", "--to", tmp_path / "older", "--from", tier, "--json")
    found = json.loads(told[told.index("{") :])
    assert found["step"] == 10
    assert pack in found["passed_over"][0]["reason"]
    built = build_world(step=10)[1]
    with safe_open(tmp_path / "older" / "rank-00001.safetensors", framework="np") as file:
        start = built.layout.regions[0].shard_offset
        whole = b"".join(built.chunk(i) for i in range(len(built.record.chunks)))
        assert file.get_tensor("w").tobytes() == whole[start : start + 4 * 6000]
    assert not list(tmp_path.glob(".*partial"))
    told = run("restore", "--to", tmp_path / "named", "--step", "20", "--from", tier, code=3)
    assert pack in told
    assert not (tmp_path / "named").exists()


def test_what_retention_drops_while_it_is_read_is_not_called_damaged(
    tier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, read = tmp_path / "kept", TierReader.read
    shutil.copytree(tier, kept)
    deleted: list[int] = []

    def read_late(reader: TierReader, shard: StoredShard, *more: Any, **named: Any) -> list[Miss]:
        record = tier / KEYS.snapshot(shard.id, 0)
        if shard.id.step == 20 and record.exists():
            deleted.append(shard.id.step)
            record.unlink()
            shutil.rmtree(tier / KEYS.packs)
        return read(reader, shard, *more, **named)

    monkeypatch.setattr(TierReader, "read", read_late)
    told = run("restore", "--to", tmp_path / "out", "--from", tier, code=4)
    assert "1/20 of job was deleted while it was read" in told and "snapd pin" in told
    assert deleted == [20] and not (tmp_path / "out").exists()
    shutil.rmtree(tier)
    shutil.copytree(kept, tier)
    told = run("verify", "job", "--step", "20", "--deep", "--from", tier)
    assert "step 20: was deleted while it was verified" in told and deleted == [20, 20]
    damage(kept, 20)  # what is there still is damaged
    assert "bad chunk" in run("verify", "job", "--step", "20", "--deep", "--from", kept, code=3)


def test_what_is_deleted_between_listing_and_looking_is_not_listed(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = TierReader.candidates
    listed: list[int] = []

    def then_delete(reader: TierReader) -> list[Candidate]:
        found = candidates(reader)
        if not listed:
            listed.extend(candidate.id.step for candidate in found)
            (tier / KEYS.snapshot(SnapshotId(1, 20), 0)).unlink()
        return found

    monkeypatch.setattr(TierReader, "candidates", then_delete)
    rows = json.loads(run("ls", "--from", tier, "--json"))
    assert listed == [20, 10] and [(row["step"], row["complete"]) for row in rows] == [(10, True)]


def test_sigterm_leaves_nothing_behind(tier: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = f"""if True:
        import pathlib, sys, time
        from snapd.cli.main import main
        from snapd.export import directory
        def write(working, *more):
            (working / "rank-00000.safetensors").write_bytes(b"x")
            pathlib.Path({str(begun)!r}).touch()
            time.sleep(60)
        directory._write_rank = write
        sys.argv = ["snapd", "restore", "--to", {str(tmp_path / "out")!r}, "--from", {str(tier)!r}]
        main()
    """
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(begun.exists, "it writes")
    assert list(tmp_path.glob(".out.*.partial"))
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "tier"]


def test_a_job_must_be_named_where_there_are_several(tier: Path, tmp_path: Path) -> None:
    TierWriter(directory_store(tier), job="other").write_built(build_world(job="other"))
    assert "job, other" in run("restore", "--to", tmp_path / "x", "--from", tier, code=2)
    assert {row["job"] for row in json.loads(run("ls", "--from", tier, "--json"))} == {"job", "other"}


def test_shared_needs_a_configured_tier(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAPD_TIER_SHARED", raising=False)
    assert "no shared tier is configured" in run("ls", "--from", "shared", code=2)
    monkeypatch.setenv("SNAPD_TIER_SHARED", str(tier))
    assert "20" in run("ls", "--from", "shared")
