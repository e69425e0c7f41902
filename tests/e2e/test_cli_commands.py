"""The commands against a real daemon: what they print, what they end with, and what they do with bad bytes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from snapd.cli.main import app
from tests.support.built_trainer import BuiltTrainer
from tests.support.daemon_process import ROOT, DaemonProcess, daemon_folders
from tests.support.shard_builder import ShardBuilder
from tests.support.waiting import wait_for

CHUNK = 65536
SCREEN_S = 60.0  # a machine with much to do takes long to start a Python
FROZEN = bytes(range(256)) * 1024  # 4 chunks


class Commands:
    """`snapd ARGUMENTS` in this process, against one daemon."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self._environment = {
            "SNAPD_RUNTIME_DIR": str(daemon.runtime),
            "SNAPD_ARENA_DIR": str(daemon.arena),
            "SNAPD_JOB": "",
        }

    def run(self, *arguments: object, code: int = 0) -> str:
        """What it prints; with another exit code than 0, what it prints on stderr."""
        result = CliRunner().invoke(app, [str(a) for a in arguments], env=self._environment)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        if code:
            assert "Traceback" not in result.stderr
        return result.stderr if code else result.stdout

    def json(self, *arguments: object, code: int = 0) -> object:
        """The document that it prints with --json."""
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"], env=self._environment)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return json.loads(result.stdout)


@pytest.fixture
def commands() -> Iterator[Commands]:
    with daemon_folders(SNAPD_ARENA_CHUNK_BYTES=str(CHUNK)) as daemon:
        daemon.start()
        yield Commands(daemon)


def _describe(step: int) -> object:
    def describe(builder: ShardBuilder) -> None:
        builder.plain("base.weight", "uint8", [1024, 256], FROZEN, "frozen")
        builder.plain("w", "float32", [128, 256], bytes([step % 256]) * CHUNK * 2)
        builder.plain("bias", "bfloat16", [64], bytes([step % 251, 1]) * 64)

    return describe


def _trainer(commands: Commands, job: str = "job", rank: int = 0, world_size: int = 1) -> BuiltTrainer:
    trainer = BuiltTrainer(commands.daemon.runtime)
    trainer.open(job=job, rank=rank, world_size=world_size, state_bytes_estimate=12 * CHUNK)
    return trainer


def _capture(commands: Commands, *steps: int, job: str = "job") -> BuiltTrainer:
    trainer = _trainer(commands, job)
    for step in steps:
        trainer.capture_built(step, _describe(step))
    trainer.wait_complete(steps[-1])
    return trainer


def _flip(commands: Commands, job: str, tensor: str) -> int:
    """Flip one bit of the tensor's first byte where it lies in the arena; returns the chunk's number."""
    shard = commands.json("show", job)["shards"][0]
    chunk = next(t for t in shard["tensors"] if t["name"] == tensor)["chunks"][0]
    reply = commands.daemon.admin("GetSnapshot", _get(job))
    place = reply.shards[0].chunks[chunk]
    path = commands.daemon.arena / "jobs" / job / f"rank-{place.segment_rank}.seg-{place.segment}"
    with path.open("r+b") as file:
        file.seek(place.frame * reply.shards[0].chunk_bytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    return chunk


def _get(job: str) -> object:
    from snapd_proto import admin_pb2

    return admin_pb2.GetSnapshotRequest(job=job)


# --- nothing there ----------------------------------------------------------------------------------------------
def test_without_snapshots_the_commands_find_nothing(commands: Commands, tmp_path: Path) -> None:
    assert "no jobs" in commands.run("status")
    assert commands.json("status")["jobs"] == []
    assert "no snapshots here" in commands.run("ls", code=1)
    assert commands.json("ls", code=1) == []
    for arguments in (("show", "x"), ("status", "x"), ("rm", "x"), ("verify", "x"), ("ls", "x")):
        assert "'x'" in commands.run(*arguments, code=1)
    assert "no such snapshot" in commands.run("verify", code=1)
    assert "no snapshots here" in commands.run("restore", "--to", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_with_json_an_object_too(commands: Commands) -> None:
    text = commands.run("show", "x", code=1)
    assert text.startswith("snapd: no job 'x' on this node [job]") and text.count("\n") == 1
    error = commands.json("show", "x", code=1)["error"]
    assert (error["kind"], error["exit_code"]) == ("job", 1)


# --- a snapshot -------------------------------------------------------------------------------------------------
def test_status_shows_daemon_job_and_session(commands: Commands) -> None:
    trainer = _capture(commands, 7)
    status = commands.json("status", "job")
    (job,) = status["jobs"]
    assert job["complete"] == {"generation": 1, "step": 7}
    assert status["pid"] == commands.daemon.process.pid
    (session,) = job["sessions"]
    assert (session["rank"], session["state"], session["newest_captured_step"]) == (0, "attached", 7)
    assert session["pid"] == os.getpid() and session["skipped_steps"] == 0
    text = commands.run("status")
    assert "step 7 (generation 1)" in text and "attached" in text and str(commands.daemon.arena) in text
    assert commands.run("top", "--once").split()[:2] == ["daemon", "snapd"]
    trainer.skip(8)
    wait_for(lambda: commands.json("status")["jobs"][0]["sessions"][0]["skipped_steps"] == 1, "it is counted")
    trainer.disconnect()


def test_ls_lists_complete_and_partial_snapshots(commands: Commands) -> None:
    first, second = (_trainer(commands, rank=rank, world_size=2) for rank in range(2))
    for trainer in (first, second):
        trainer.capture_built(3, _describe(3))
    first.capture_built(4, _describe(4))
    whole, part = sorted(commands.json("ls"), key=lambda snapshot: snapshot["step"])
    assert whole["complete"] and whole["ranks_captured"] == [0, 1]
    assert not part["complete"] and part["ranks_captured"] == [0] and part["parent"] is None
    lines = commands.run("ls", "job").splitlines()
    assert "only ranks 0" in lines[1] and "complete" in lines[2]


def test_show_names_tensors_chunks_and_what_is_stored_once(commands: Commands) -> None:
    _capture(commands, 1, 2, 3)
    (shard,) = commands.json("show", "job")["shards"]
    tensors = {tensor["name"]: tensor for tensor in shard["tensors"]}
    assert tensors["base.weight"]["shape"] == [1024, 256] and tensors["w"]["dtype"] == "float32"
    frozen = [shard["chunks"][index] for index in tensors["base.weight"]["chunks"]]
    assert len(frozen) == 4
    assert all(chunk["unchanged_since"] == {"generation": 1, "step": 1} for chunk in frozen)
    assert all(shard["chunks"][index]["unchanged_since"] is None for index in tensors["w"]["chunks"])
    text = commands.run("show", "job", "--step", "3", "--rank", "0")
    assert "all since step 1" in text and "base.weight" in text
    assert "no shard of rank 5" in commands.run("show", "job", "--rank", "5", code=1)
    assert "no such snapshot" in commands.run("show", "job", "--step", "99", code=1)


def test_two_snapshots_share_the_frozen_chunks(commands: Commands) -> None:
    first, second = (_trainer(commands, rank=rank, world_size=2) for rank in range(2))
    for trainer in (first, second):
        trainer.capture_built(3, _describe(3))
    first.capture_built(4, _describe(4))
    shard = commands.json("show", "job", "--step", "4")["shards"][0]
    tensors = {tensor["name"]: tensor for tensor in shard["tensors"]}
    assert tensors["base.weight"]["chunks_shared"] == 4 and tensors["w"]["chunks_shared"] == 0
    assert shard["nbytes_shared"] >= len(FROZEN)
    assert "all" in commands.run("show", "job", "--step", "4")


def test_verify_and_restore(commands: Commands, tmp_path: Path) -> None:
    from safetensors import safe_open

    _capture(commands, 5)
    assert "all good" in commands.run("verify")
    (verdict,) = commands.json("verify", "job", "--step", "5")
    assert verdict["bad_chunks"] == [] and verdict["nbytes"] > len(FROZEN)
    target = tmp_path / "out"
    done = commands.json("restore", "--to", target)
    assert (done["step"], done["ranks"], done["tensor_count"]) == (5, [0], 3)
    with safe_open(target / "rank-00000.safetensors", framework="numpy") as file:
        assert bytes(file.get_tensor("base.weight")) == FROZEN
        assert bytes(file.get_tensor("w")) == bytes([5]) * CHUNK * 2
    assert "is not empty" in commands.run("restore", "--to", target, code=2)


def test_restore_asks_which_job_when_there_are_several(commands: Commands, tmp_path: Path) -> None:
    _capture(commands, 1, job="one")
    _capture(commands, 2, job="two")
    assert "one, two" in commands.run("restore", "--to", tmp_path / "out", code=2)
    commands.run("restore", "--to", tmp_path / "out", "--job", "two")
    assert json.loads((tmp_path / "out" / "snapshot.json").read_text())["job"] == "two"


def test_restore_of_some_ranks(commands: Commands, tmp_path: Path) -> None:
    for rank in range(2):
        _trainer(commands, rank=rank, world_size=2).capture_built(3, _describe(3))
    commands.run("restore", "--to", tmp_path / "out", "--rank", "1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "snapshot.json", "rank-00001.json", "rank-00001.safetensors",
    }  # fmt: skip
    assert "no shard of rank 2" in commands.run("restore", "--to", tmp_path / "o", "--rank", "2", code=3)


# --- bad bytes --------------------------------------------------------------------------------------------------
def test_a_flipped_bit_is_named_by_rank_chunk_and_tensor(commands: Commands, tmp_path: Path) -> None:
    _capture(commands, 5)
    _capture(commands, 6, job="other")
    chunk = _flip(commands, "job", "w")
    stderr = commands.run("restore", "--to", tmp_path / "out", "--job", "job", code=3)
    assert f"in it: w [bad_chunk] rank=0 chunk={chunk}" in stderr
    assert list(tmp_path.iterdir()) == []
    job, other = sorted(commands.json("verify", code=3), key=lambda verdict: verdict["job"])
    assert [(b["rank"], b["chunk"], b["contents"]) for b in job["bad_chunks"]] == [(0, chunk, ["w"])]
    assert other["bad_chunks"] == []
    assert f"rank 0 chunk {chunk}: hash differs" in commands.run("ls")
    commands.run("verify", "other")
    commands.run("restore", "--to", tmp_path / "out", "--job", "other")


def test_a_bad_layout_is_named_too(commands: Commands, tmp_path: Path) -> None:
    _capture(commands, 5)
    reply = commands.daemon.admin("GetSnapshot", _get("job"))
    place = reply.shards[0].chunks[0]
    path = commands.daemon.arena / "jobs" / "job" / f"rank-0.seg-{place.segment}"
    with path.open("r+b") as file:
        file.seek(place.frame * reply.shards[0].chunk_bytes + 3)
        file.write(b"\xff")
    (verdict,) = commands.json("verify", code=3)
    assert [(bad["chunk"], bad["contents"]) for bad in verdict["bad_chunks"]] == [(0, [])]
    assert "chunk=0" in commands.run("restore", "--to", tmp_path / "out", code=3)
    assert "rank=0 chunk=0" in commands.run("show", "job", code=3)
    assert list(tmp_path.iterdir()) == []


# --- removing ---------------------------------------------------------------------------------------------------
def test_rm_refuses_a_job_in_use_unless_forced(commands: Commands) -> None:
    trainer = _capture(commands, 5)
    assert "job_in_use" in commands.run("rm", "job", code=2)
    done = commands.json("rm", "job", "--force")
    assert done["snapshots_removed"] == 1 and done["arena_bytes_freed"] > 0
    assert trainer.word("fenced") == 1
    commands.run("ls", code=1)


# --- readers and writers ----------------------------------------------------------------------------------------
def test_a_snapshot_is_kept_while_a_command_reads_it(commands: Commands) -> None:
    from snapd.cli.shards import open_snapshot
    from snapd.rpc.local_client import LocalClient

    trainer = _capture(commands, 5)
    with LocalClient(commands.daemon.runtime) as client:
        _, views = open_snapshot(client, "job", step=None, generation=None, ranks=[])
        trainer.capture_built(6, _describe(6))
        trainer.wait_complete(6)
        assert {snapshot["step"] for snapshot in commands.json("ls")} == {5, 6}
        with pytest.raises(TimeoutError):  # two slots: one is read, one is the newest complete
            trainer.take_lane(12, timeout_s=0.5)
        for index in range(len(views[0].record.chunks)):
            assert views[0].bytes_of.chunk(index) is not None
    trainer.capture_built(7, _describe(7))
    trainer.wait_complete(7)
    wait_for(lambda: {snapshot["step"] for snapshot in commands.json("ls")} == {7}, "5 and 6 are given up")


# --- the daemon itself ------------------------------------------------------------------------------------------
def test_a_broken_job_is_named_and_the_rest_is_served(commands: Commands) -> None:
    _capture(commands, 5).disconnect()
    _capture(commands, 6, job="other").disconnect()
    commands.daemon.kill()
    index = commands.daemon.arena / "jobs" / "job" / "index.db"
    index.with_name("index.db-wal").unlink(missing_ok=True)
    index.write_bytes(index.read_bytes()[:1000])
    commands.daemon.start()
    problems = {job["job"]: job["problem"] for job in commands.json("status")["jobs"]}
    assert problems["other"] is None and "index of job 'job'" in problems["job"]
    assert "index of job 'job'" in commands.run("show", "job", code=3)
    assert [snapshot["job"] for snapshot in commands.json("ls")] == ["other"]
    daemon = next(check for check in commands.json("doctor", code=3) if check["check"] == "daemon")
    assert daemon["verdict"] == "BAD" and "index of job 'job'" in daemon["found"]
    commands.run("verify", "other")
    assert "job_unusable" in commands.run("rm", "job", code=3)
    commands.run("rm", "job", "--force")
    assert [job["job"] for job in commands.json("status")["jobs"]] == ["other"]


@pytest.mark.parametrize("screens", [1, 2])
def test_top_refreshes_on_a_terminal_until_it_is_interrupted(commands: Commands, screens: int) -> None:
    trainer = _capture(commands, 5)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "snapd", "top"]
    top = subprocess.Popen(
        command,
        env={**commands.daemon.env, "TERM": "xterm"},
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    try:
        shown = b""
        while shown.count(b"step 5") < screens:
            assert select.select([ours], [], [], SCREEN_S)[0], f"no further screen: {shown[-500:]!r}"
            shown += os.read(ours, 65536)
        assert b"attached" in shown
        top.send_signal(signal.SIGINT)
        _, said = top.communicate(timeout=SCREEN_S)
        assert (top.returncode, said) == (0, b"")
    finally:
        top.kill()
        top.communicate()
        os.close(ours)
        trainer.disconnect()


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    for name in ("status", "ls", "verify", "top"):
        result = CliRunner().invoke(app, [name, "--runtime-dir", str(tmp_path / "none")])
        assert result.exit_code == 4 and "no snapd daemon runs in" in result.stderr
    tmp_path.chmod(0o700)
    result = CliRunner().invoke(app, ["status", "--runtime-dir", str(tmp_path)])
    assert result.exit_code == 4 and "handshake.sock" in result.stderr
    tmp_path.chmod(0o755)
    result = CliRunner().invoke(app, ["status", "--runtime-dir", str(tmp_path)])
    assert result.exit_code == 2 and "chmod 700" in result.stderr


def test_serve_embedded_and_its_log(tmp_path: Path) -> None:
    with daemon_folders() as folders:
        command = [sys.executable, "-m", "snapd", "serve", "--embedded"]
        first = subprocess.Popen(command, env=folders.env, cwd=ROOT, stderr=subprocess.PIPE)
        folders.process = first
        wait_for(folders.is_answering, "it answers")
        assert "daemon.started" in (folders.runtime / "daemon.log").read_text()
        first.send_signal(signal.SIGHUP)  # the login ends
        second = subprocess.run(
            command, env=folders.env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert second.returncode == 2 and f"pid {first.pid}" in second.stderr
        assert first.poll() is None
        first.terminate()
        assert first.wait(20) == 0 and first.stderr is not None
        assert first.stderr.read() == b""
        first.stderr.close()


def test_serve_refuses_wrong_settings_with_all_their_problems() -> None:
    result = CliRunner().invoke(app, ["serve", "--arena-chunk-bytes", "3MB", "--log-level", "loud"])
    assert result.exit_code == 2
    assert "arena.chunk_bytes" in result.stderr and "log.level = 'loud' (from flag)" in result.stderr
    assert CliRunner().invoke(app, ["serve", "--no-such-flag"]).exit_code == 2


def test_doctor_sees_the_daemon(commands: Commands) -> None:
    checks = {check["check"]: check for check in commands.json("doctor")}
    assert checks["daemon"]["verdict"] == "ok" and "answers" in checks["daemon"]["found"]
    assert checks["shared memory"]["verdict"] == "ok"
    assert checks["copy engine"]["verdict"] == "ok"
    checks = {check["check"]: check for check in commands.json("doctor", "--need", "900TiB", code=3)}
    assert checks["shared memory"]["verdict"] == "BAD" and "--shm-size" in checks["shared memory"]["hint"]
    commands.run("doctor", "--need", "lots", code=2)
