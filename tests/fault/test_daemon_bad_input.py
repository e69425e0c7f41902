"""Whatever is broken, truncated or impudent is refused by name; nothing is lost and the rest is served."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from snapd_proto import admin_pb2, trainer_pb2

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer, Handshake, Refused
from tests.support.waiting import wait_for

STATE = 6 << 16
PLAN = trainer_pb2.PlanRestoreReply


@pytest.fixture(scope="module")
def shared() -> Iterator[DaemonProcess]:
    with daemon_folders() as found:
        found.start()
        yield found
        assert found.stop() == 0, found.log_file.read_text()[-3000:]


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[DaemonProcess]:
    yield shared
    shared.clear()


def one_snapshot(daemon: DaemonProcess, job: str = "a", steps: int = 1) -> None:
    """A job with a complete snapshot of each of the last steps, whose trainer has gone."""
    trainer = daemon.trainer()
    trainer.open(job=job, state_bytes_estimate=STATE, slots=1 + steps)
    for step in range(1, steps + 1):
        trainer.capture(step)
    trainer.wait_complete(steps)
    trainer.close()
    trainer.disconnect()


def segment_of(daemon: DaemonProcess, job: str = "a") -> Path:
    return next((daemon.arena / "jobs" / job).glob("rank-0.seg-*"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def place_of(daemon: DaemonProcess, step: int, index: int) -> int:
    """Where a chunk lies in the only segment."""
    request = admin_pb2.GetSnapshotRequest(job="a", has_step=True, step=step)
    record = daemon.admin("GetSnapshot", request).shards[0]
    return record.chunks[index].frame * record.chunk_bytes


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("is_restarted", [False, True])
def test_one_flipped_bit_in_any_chunk_is_found(daemon: DaemonProcess, index: int, is_restarted: bool) -> None:
    one_snapshot(daemon)
    flip(segment_of(daemon), place_of(daemon, 1, index) + 1)
    if is_restarted:
        daemon.restart()
    trainer = daemon.trainer()
    trainer.open(job="a", incarnation="two", state_bytes_estimate=STATE)
    assert trainer.session.has_parent
    plan = trainer.plan()
    if plan.outcome == PLAN.FOUND:  # it was hashed just before the bit flipped: the client finds it
        assert not is_restarted
        assert trainer.read(plan.shards[0])[1] == [index]
        answer = trainer.finish(succeeded=False, bad=[index])
        assert answer.try_again and not answer.committed
        plan = trainer.plan(round=1)
    assert plan.outcome == PLAN.UNUSABLE
    assert f"rank 0 chunk {index}: hash differs" in plan.reason
    assert plan.candidates[0].verdict == "unusable"
    assert f"chunk {index}" in daemon.snapshots("a")[0].problem
    trainer.disconnect()


def test_an_older_snapshot_is_taken_when_the_newer_is_proved_bad(daemon: DaemonProcess) -> None:
    one_snapshot(daemon, steps=2)
    flip(segment_of(daemon), place_of(daemon, 2, 3))
    daemon.restart()
    trainer = daemon.trainer()
    trainer.open(job="a", incarnation="two", state_bytes_estimate=STATE)
    plan = trainer.plan()
    assert (plan.outcome, plan.step) == (PLAN.FOUND, 1)
    assert [(c.step, c.verdict) for c in plan.candidates] == [(2, "unusable"), (1, "chosen")]
    daemon.restart()
    assert "hash differs" in daemon.snapshots("a")[0].problem
    trainer.disconnect()


def test_verify_names_the_bad_chunk(daemon: DaemonProcess) -> None:
    one_snapshot(daemon)
    good = daemon.admin("Verify", admin_pb2.VerifyRequest(job="a"))[-1]
    assert good.finished and not good.bad_chunks and good.nbytes_done == good.nbytes_total > 0
    flip(segment_of(daemon), place_of(daemon, 1, 4))
    bad = daemon.admin("Verify", admin_pb2.VerifyRequest(job="a"))[-1]
    assert [(chunk.rank, chunk.chunk_index) for chunk in bad.bad_chunks] == [(0, 4)]


def truncate_index(folder: Path) -> None:
    os.truncate(folder / "index.db", (folder / "index.db").stat().st_size // 2)


def empty_index(folder: Path) -> None:
    os.truncate(folder / "index.db", 0)


def overwrite_index(folder: Path) -> None:
    size = (folder / "index.db").stat().st_size
    (folder / "index.db").write_bytes(b"\x5a" * size)


def remove_index(folder: Path) -> None:
    (folder / "index.db").unlink()


def shorten_segment(folder: Path) -> None:
    path = next(folder.glob("rank-0.seg-*"))
    os.truncate(path, path.stat().st_size - 4096)


def lengthen_segment(folder: Path) -> None:
    path = next(folder.glob("rank-0.seg-*"))
    os.truncate(path, path.stat().st_size + 4096)


def remove_segment(folder: Path) -> None:
    next(folder.glob("rank-0.seg-*")).unlink()


BREAKS: list[Callable[[Path], None]] = [
    truncate_index,
    empty_index,
    overwrite_index,
    remove_index,
    shorten_segment,
    lengthen_segment,
    remove_segment,
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_job_with_broken_files_is_refused_by_name_and_the_others_served(
    daemon: DaemonProcess, damage: Callable[[Path], None]
) -> None:
    one_snapshot(daemon, "a")
    one_snapshot(daemon, "b")
    daemon.stop()
    folder = daemon.arena / "jobs" / "a"
    damage(folder)
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    daemon.start()
    assert "'a'" in daemon.job("a").problem and "snapd rm --force" in daemon.job("a").problem
    trainer = daemon.trainer()
    with pytest.raises(Refused) as refused:
        trainer.open(job="a", incarnation="two")
    assert refused.value.kind == "job_unusable"
    after = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert trainer.open(job="b", incarnation="two") == 2
    assert trainer.restore() == 1

    with pytest.raises(grpc.RpcError):
        daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a"))
    daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a", force=True))
    other = daemon.trainer()
    assert other.open(job="a", incarnation="three") == 1
    for each in (trainer, other):
        each.disconnect()


def test_a_bad_control_page_refuses_its_job_by_name(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    daemon.kill()
    page = next((daemon.arena / "jobs" / "a").glob("session-*.ctl"))
    with page.open("r+b") as file:
        file.write(b"RUBBISH!")
    daemon.start()
    assert "control page" in daemon.job("a").problem
    trainer.disconnect()


def test_a_page_that_claims_frames_of_a_snapshot_refuses_its_job(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    assert trainer.page is not None
    segments, frames, _, _ = trainer.page.read_entries(trainer.lane)
    assert frames
    trainer.take_lane(6)
    daemon.kill()
    trainer.page.set_lane_state(trainer.lane, 1, 0)
    trainer.page.write_grant(trainer.lane, segments, frames)
    trainer.page.set_lane_state(trainer.lane, 0, 1)
    daemon.start()
    assert "claims frames" in daemon.job("a").problem
    trainer.disconnect()


GARBAGE = [
    b"\x00" * 4096,
    b"\xff" * 4096,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    struct.pack("<I", 12) + b"\xff" * 12,
    struct.pack("<I", 1 << 31),
    struct.pack("<I", 100) + b"short",
    b"",
]


@pytest.mark.parametrize("name", ["handshake.sock", "snapd.sock"])
def test_garbage_on_a_socket_ends_that_connection_only(daemon: DaemonProcess, name: str) -> None:
    daemon.restart()  # it says each thing once in its life
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    for garbage in GARBAGE * 3:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(daemon.runtime / name))
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while True:
                try:
                    if not connection.recv(1 << 16):
                        break
                except ConnectionResetError:
                    break
    trainer.capture(1)
    trainer.wait_complete(1)
    if name == "handshake.sock":
        assert 1 <= len(daemon.events("handshake.refused")) <= 3
    trainer.disconnect()


def test_a_hundred_silent_connections_do_no_harm(daemon: DaemonProcess) -> None:
    silent = []
    for _ in range(100):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.runtime / "handshake.sock"))
        silent.append(connection)
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    for connection in silent:
        connection.close()
    trainer.disconnect()


@pytest.mark.parametrize("is_other_runtime", [False, True])
def test_a_second_daemon_is_refused_in_one_line(
    daemon: DaemonProcess, is_other_runtime: bool, tmp_path: Path
) -> None:
    assert daemon.process is not None
    env = dict(daemon.env)
    if is_other_runtime:
        env["SNAPD_RUNTIME_DIR"] = str(tmp_path / "other")
    second = subprocess.run(
        daemon.process.args, env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1
    assert f"(pid {daemon.process.pid})" in second.stderr
    assert daemon.is_answering()


def test_stale_sockets_are_replaced(daemon: DaemonProcess) -> None:
    daemon.kill()
    assert (daemon.runtime / "handshake.sock").exists()
    daemon.start()
    assert daemon.status().pid == daemon.process.pid


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "", ".hidden", "a" * 129, "a\n", "ä", "a b", "-a", "a/b"]
)
def test_a_job_name_cannot_leave_its_folder(daemon: DaemonProcess, name: str) -> None:
    before = sorted(path for path in daemon.arena.rglob("*"))
    trainer = daemon.trainer()
    with pytest.raises(Refused) as refused:
        trainer.open(job=name)
    assert refused.value.kind == "job_name"
    assert sorted(path for path in daemon.arena.rglob("*")) == before
    with pytest.raises(grpc.RpcError):
        daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job=name, force=True))
    trainer.disconnect()


WRONG = [
    ({"world_size": 0}, "world"),
    ({"rank": 2, "world_size": 2}, "world"),
    ({"world_size": 4, "local_world_size": 2}, "no_coordination"),
    ({"incarnation": ""}, "incarnation"),
    ({"chunk_bytes": 100000}, "chunk_bytes"),
    ({"slots": 1}, "slots"),
    ({"slots": 99}, "slots"),
    ({"state_bytes_estimate": 1 << 62}, "remote_protocol"),
]


@pytest.mark.parametrize(("more", "kind"), WRONG)
def test_a_world_that_cannot_be_is_refused(daemon: DaemonProcess, more: dict[str, int], kind: str) -> None:
    trainer = daemon.trainer()
    with pytest.raises(Refused) as refused:
        trainer.open(job="a", **more)
    assert refused.value.kind == kind
    assert refused.value.hint or kind in ("world", "chunk_bytes", "slots", "remote_protocol")
    assert [job.job for job in daemon.status().jobs] == []
    trainer.disconnect()


def refusal(trainer: FakeTrainer, **arguments: object) -> str:
    with pytest.raises(Refused) as refused:
        trainer.open(**arguments)
    trainer.disconnect()
    return refused.value.kind


def test_ranks_that_contradict_each_other_are_refused(daemon: DaemonProcess) -> None:
    first = daemon.trainer()
    first.open(job="a", rank=0, world_size=2, incarnation="one")
    assert refusal(daemon.trainer(), job="a", rank=1, world_size=3, incarnation="one") == "world_size"
    assert refusal(daemon.trainer(), job="a", rank=0, world_size=2, incarnation="one") == "duplicate_rank"
    second = daemon.trainer()
    second.open(job="a", rank=0, world_size=2, incarnation="two")
    assert refusal(daemon.trainer(), job="a", rank=1, world_size=2, incarnation="one") == "stale_generation"
    with pytest.raises(Refused) as refused:
        first.plan()
    assert refused.value.kind == "stale_generation"
    for trainer in (first, second):
        trainer.disconnect()


def test_another_world_size_is_an_answer_of_its_own(daemon: DaemonProcess) -> None:
    one_snapshot(daemon)
    trainer = daemon.trainer()
    trainer.open(job="a", rank=0, world_size=2, incarnation="two")
    plan = trainer.plan()
    assert plan.outcome == PLAN.WORLD_SIZE_DIFFERS
    assert "1 ranks" in plan.reason
    trainer.disconnect()


def test_calls_without_a_token_are_refused(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a")
    assert trainer.handshake is not None
    trainer.handshake.welcome.token = "0" * 32
    with pytest.raises(Refused) as refused:
        trainer.plan()
    assert refused.value.kind == "token"
    assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
    trainer.disconnect()


def test_one_trainer_cannot_use_or_map_anothers_session(daemon: DaemonProcess) -> None:
    first, second = daemon.trainer(), daemon.trainer()
    first.open(job="a")
    second.open(job="b")
    second.session.session_id = first.session.session_id
    with pytest.raises(Refused) as refused:
        second.plan()
    assert refused.value.kind == "token"
    with pytest.raises(Refused) as refused:
        second.fetch()
    assert refused.value.kind == "secret"
    request = trainer_pb2.FetchShard(job="a", generation=1, step=1, rank=0)
    assert second.handshake is not None
    with pytest.raises(Refused) as refused:
        second.handshake.ask(trainer_pb2.HandshakeRequest(fetch_shard=request))
    assert refused.value.kind == "job"
    for trainer in (first, second):
        trainer.disconnect()


def test_descriptors_of_a_shard_are_read_only(daemon: DaemonProcess) -> None:
    one_snapshot(daemon)
    admin = Handshake(daemon.runtime / "handshake.sock", trainer_pb2.PEER_ROLE_ADMIN).connect()
    request = trainer_pb2.FetchShard(job="a", generation=1, step=1, rank=0)
    _, descriptors = admin.ask(trainer_pb2.HandshakeRequest(fetch_shard=request))
    assert descriptors
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        os.close(descriptor)
    admin.close()


def test_a_state_that_does_not_fit_is_refused_with_numbers_and_what_to_change(daemon: DaemonProcess) -> None:
    one_snapshot(daemon, "holder")
    daemon.stop()
    daemon.start(SNAPD_ARENA_BYTES=str(4 * STATE))
    trainer = daemon.trainer()
    with pytest.raises(Refused) as refused:
        trainer.open(job="a", state_bytes_estimate=2 * STATE)
    assert refused.value.kind == "arena_full"
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"needs {4 * STATE} bytes" in refused.value.message
    assert f"{2 * STATE} are available" in refused.value.message
    assert "holder 768 KiB" in refused.value.message
    assert "SNAPD_ARENA_BYTES" in refused.value.hint and "snapd rm" in refused.value.hint
    assert [job.job for job in daemon.status().jobs] == ["holder"]
    with pytest.raises(Refused) as refused:
        trainer.open(job="b", state_bytes_estimate=1 << 45)
    assert refused.value.kind == "arena_full"
    assert trainer.open(job="a", state_bytes_estimate=STATE) == 1
    trainer.capture(1)
    page_wants = trainer.page
    assert page_wants is not None
    page_wants.store("wanted_frames", 50)
    trainer.wake()
    wait_for(
        lambda: "arena_bytes" in daemon.job("a").problem, "growth in the background is refused, and said so"
    )
    trainer.want(6)
    trainer.capture(2)
    trainer.disconnect()


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    with daemon_folders() as daemon:
        daemon.runtime.mkdir(mode=0o755)
        daemon.runtime.chmod(0o755)
        process = daemon.start(is_waiting=False)
        assert process.wait(20) == 2
        assert "is open to others" in daemon.log_file.read_text()
        daemon.runtime.rmdir()
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        daemon.runtime.symlink_to(tmp_path / "elsewhere")
        process = daemon.start(is_waiting=False)
        assert process.wait(20) == 2
        assert "symbolic link" in daemon.log_file.read_text()


def test_bad_settings_are_all_named(tmp_path: Path) -> None:
    with daemon_folders() as daemon:
        process = daemon.start(is_waiting=False, SNAPD_ARENA_SLOTS="1", SNAPD_FAULT_POINTS="nonsense=kill")
        assert process.wait(20) != 0
        assert "arena.slots" in daemon.log_file.read_text()


def test_a_job_in_use_is_removed_only_by_force(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    with pytest.raises(grpc.RpcError) as error:
        daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a"))
    assert "live sessions" in (error.value.details() or "")
    reply = daemon.admin("RemoveJob", admin_pb2.RemoveJobRequest(job="a", force=True))
    assert (reply.snapshots_removed, reply.arena_bytes_freed) == (1, 2 * STATE)
    assert trainer.word("fenced") == 1
    assert not (daemon.arena / "jobs" / "a").exists()
    with pytest.raises(Refused) as refused:
        trainer.plan()
    assert refused.value.kind == "session"
    trainer.disconnect()


def test_the_last_final_close_releases_the_arena(daemon: DaemonProcess) -> None:
    trainers = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(trainers):
        trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        trainer.capture(1)
    trainers[0].close(final=True)
    assert daemon.job("a").complete_step == 1
    trainers[1].close(final=True)
    assert list(daemon.status().jobs) == []
    assert list((daemon.arena / "jobs").iterdir()) == []
    for trainer in trainers:
        trainer.disconnect()
