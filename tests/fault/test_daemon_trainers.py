"""Trainers that are killed, stopped or overtaken, in every state of a lane."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import snapd_native as native

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import Refused
from tests.support.waiting import wait_for

STATE = 6 << 16


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


def chunks_free_again(daemon: DaemonProcess, job: str) -> bool:
    status = daemon.job(job)
    return (
        all(s.state != "attached" for s in status.sessions)
        and sum(s.chunks_set_aside for s in status.sessions) == 0
    )


@pytest.mark.parametrize("state", ["granted", "open", "half_written", "complete", "discarded"])
def test_a_trainer_killed_in_any_lane_state_loses_at_most_what_was_in_flight(
    daemon: DaemonProcess, state: str
) -> None:
    trainer = daemon.trainer_process()
    trainer.do("open", job="a", state_bytes_estimate=STATE)
    trainer.do("capture", step=1)
    if state == "granted":
        trainer.do("take_lane", frames=6)
    else:
        trainer.do("open_lane", step=2)
    if state in ("half_written", "complete"):
        trainer.do("write", step=2)
    if state == "complete":
        trainer.do("commit")
    if state == "discarded":
        trainer.do("discard")
    trainer.kill()
    wait_for(lambda: chunks_free_again(daemon, "a"), "the dead trainer's frames are free")

    second = daemon.trainer()
    assert second.open(job="a", incarnation="two", state_bytes_estimate=STATE) == 2
    assert second.session.has_parent
    assert second.restore() == (2 if state == "complete" else 1)
    before = daemon.job("a").arena_bytes
    for step in range(3, 6):
        second.capture(step)
    second.wait_complete(5)
    assert daemon.job("a").arena_bytes == before == 2 * 6 << 16
    assert daemon.events("session.died")
    second.disconnect()


def test_a_stopped_trainer_keeps_its_frames_and_is_refused_when_it_goes_on(daemon: DaemonProcess) -> None:
    zombie = daemon.trainer_process()
    zombie.do("open", job="a", state_bytes_estimate=STATE)
    zombie.do("capture", step=1)
    zombie.do("open_lane", step=2)
    zombie.signal(signal.SIGSTOP)

    second = daemon.trainer()
    second.open(job="a", incarnation="two", state_bytes_estimate=STATE)
    fenced = [s for s in daemon.job("a").sessions if s.state == "fenced"]
    assert [s.chunks_set_aside for s in fenced] == [6]
    assert second.restore() == 1
    second.capture(2, seed=5)
    second.wait_complete(2)

    zombie.signal(signal.SIGCONT)
    zombie.do("write", step=2)
    assert zombie.do("commit")
    assert zombie.do("word", name="fenced") == 1
    wait_for(lambda: daemon.events("lane.refused"), "the late lane is refused")
    plan = second.plan(round=1)
    found, bad = second.read(plan.shards[0])
    assert not bad and found[2] == second.chunks(2, 5, 6)[2]
    assert daemon.job("a").sessions[0].chunks_set_aside == 6

    zombie.kill()
    wait_for(lambda: chunks_free_again_of_fenced(daemon), "set-aside frames are free once the zombie is dead")
    second.disconnect()


def chunks_free_again_of_fenced(daemon: DaemonProcess) -> bool:
    return all(s.chunks_set_aside == 0 for s in daemon.job("a").sessions)


def test_what_an_overtaken_trainer_completed_before_the_cut_counts(daemon: DaemonProcess) -> None:
    first = daemon.trainer_process()
    first.do("open", job="a", state_bytes_estimate=STATE)
    first.do("capture", step=1)
    first.do("open_lane", step=2)
    first.do("write", step=2)
    first.do("commit")
    second = daemon.trainer()
    second.open(job="a", incarnation="two", state_bytes_estimate=STATE)
    assert second.restore() == 2
    second.disconnect()


def test_two_jobs_and_two_ranks_do_not_disturb_each_other(daemon: DaemonProcess) -> None:
    trainers = []
    for job in ("a", "b"):
        for rank in range(2):
            trainer = daemon.trainer()
            trainer.open(
                job=job, rank=rank, world_size=2, incarnation=f"of-{job}", state_bytes_estimate=STATE
            )
            trainers.append(trainer)
    for step in range(1, 12):
        for trainer in trainers:
            trainer.capture(step, is_waiting=False)
        for trainer in trainers:
            trainer.wait_complete(step)
    for job in ("a", "b"):
        status = daemon.job(job)
        assert (status.complete_generation, status.complete_step) == (1, 11)
        assert status.arena_bytes == 2 * STATE * 2
    for trainer in trainers:
        trainer.disconnect()


def test_one_rank_killed_leaves_the_newest_snapshot_that_both_have(daemon: DaemonProcess) -> None:
    first, second = daemon.trainer_process(), daemon.trainer_process()
    for rank, trainer in enumerate((first, second)):
        trainer.do("open", job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
    for trainer in (first, second):
        trainer.do("capture", step=1)
    first.do("capture", step=2)
    second.do("open_lane", step=2)
    second.kill()
    first.kill()
    again = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(again):
        trainer.open(job="a", rank=rank, world_size=2, incarnation="two", state_bytes_estimate=STATE)
    plans = [trainer.plan() for trainer in again]
    assert [plan.step for plan in plans] == [1, 1]
    assert [s.step for s in daemon.snapshots("a")] == [1]
    for trainer in again:
        trainer.disconnect()


def test_a_skipped_step_is_dropped_on_all_ranks_and_the_interval_is_widened(daemon: DaemonProcess) -> None:
    trainers = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(trainers):
        trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        trainer.capture(1)
    trainers[0].capture(2)
    trainers[1].skip(2)
    wait_for(lambda: [s.step for s in daemon.snapshots("a")] == [1], "step 2 is dropped")
    assert trainers[0].word("captured_step_plus_one") == 2
    words = {(t.word("interval_from_step"), t.word("interval_steps")) for t in trainers}
    assert len(words) == 1
    from_step, steps = words.pop()
    assert steps == 2 and from_step >= 2 + 16
    for trainer in trainers:
        trainer.capture(3)
    trainers[0].wait_complete(3)
    assert daemon.job("a").sessions[1].skipped_steps == 1
    for trainer in trainers:
        trainer.disconnect()


def test_a_discarded_lane_is_granted_again(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    for step in range(2, 6):
        trainer.open_lane(step)
        trainer.write(step)
        assert trainer.discard(reason=2)
    trainer.capture(6)
    trainer.wait_complete(6)
    assert daemon.job("a").sessions[0].discarded_steps == 4
    assert {event["reason"] for event in daemon.events("lane.discarded")} == {"sample"}
    trainer.disconnect()


def test_a_grant_grows_with_the_state(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    trainer.capture(2, chunk_count=9)
    trainer.capture(3, chunk_count=9)
    trainer.wait_complete(3)
    assert daemon.job("a").arena_bytes == 2 * 9 << 16
    trainer.disconnect()


def test_frozen_chunks_are_stored_once(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    trainer.capture(2, is_reusing_last=True)
    trainer.wait_complete(2)
    assert [s.nbytes_shared for s in daemon.snapshots("a")] == [0]
    trainer.capture(3, is_reusing_last=True)
    found, bad = trainer.read(trainer.plan().shards[0])
    assert not bad and found[5] == trainer.chunks(3, 0, 6)[5]
    trainer.disconnect()


def test_rubbish_in_a_lane_is_refused_and_the_lane_comes_back(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    page = trainer.page
    assert page is not None
    for field, value in (
        ("generation", 9),
        ("layout_nbytes", 1 << 40),
        ("step", 1),
        ("early_values_nbytes", 1 << 50),
    ):
        trainer.open_lane(2)
        trainer.write(2)
        page.lane_store(trainer.lane, field, value)
        trainer.commit()
        wait_for(lambda: page.lane_state(trainer.lane) != native.LANE_COMPLETE, "the lane was looked at")
    trainer.open_lane(2)
    segments, frames, nbytes, flags = page.read_entries(trainer.lane)
    page.write_entries(trainer.lane, segments, [frames[0]] * 6, nbytes, flags)
    trainer.commit()
    wait_for(lambda: page.lane_state(trainer.lane) != native.LANE_COMPLETE, "the lane was looked at")
    assert len(daemon.events("lane.refused")) == 5
    assert [s.step for s in daemon.snapshots("a")] == [1]
    trainer.capture(2)
    trainer.disconnect()


def test_the_arena_files_are_private(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    files = [path for path in Path(daemon.arena).rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*files, daemon.runtime, daemon.arena])
    sockets = [daemon.runtime / "snapd.sock", daemon.runtime / "handshake.sock"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in sockets)
    trainer.disconnect()


def test_a_snapshotter_that_was_overtaken_in_its_own_process_gives_its_frames_back(
    daemon: DaemonProcess,
) -> None:
    trainers = []
    for number in range(4):
        trainer = daemon.trainer()
        trainer.open(job="a", incarnation=f"n{number}", state_bytes_estimate=STATE)
        trainer.capture(number + 1)
        trainer.take_lane(6)
        if trainers:
            trainers[-1].close()
            wait_for(lambda: chunks_free_again_of_fenced(daemon), "set-aside frames came back")
        trainers.append(trainer)
    assert daemon.job("a").arena_bytes <= 3 * STATE
    for trainer in trainers:
        trainer.disconnect()


def test_a_thousand_snapshots_leak_nothing(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    for step in range(1, 200):
        trainer.capture(step)
    before = daemon.status()
    for step in range(200, 1200):
        trainer.capture(step)
    after = daemon.status()
    assert after.anonymous_bytes - before.anonymous_bytes < 1 << 20
    assert (after.jobs[0].arena_bytes, after.jobs[0].arena_bytes_in_use) == (
        before.jobs[0].arena_bytes,
        before.jobs[0].arena_bytes_in_use,
    )
    assert after.anonymous_bytes < 120 << 20
    trainer.disconnect()


def test_words_that_cannot_be_are_ignored(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE)
    trainer.capture(1)
    page = trainer.page
    assert page is not None
    for word in ("step_seen_plus_one", "skipped_step_plus_one", "skipped_count", "wanted_frames"):
        page.store(word, (1 << 64) - 1)
        trainer.wake()
        daemon.status()
    trainer.want(6)
    page.store("step_seen_plus_one", 1)
    trainer.capture(2)
    trainer.wait_complete(2)
    trainer.disconnect()


def test_a_rollback_of_two_ranks_goes_back_in_place(daemon: DaemonProcess) -> None:
    trainers = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(trainers):
        trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
    for step in (1, 2, 3):
        for trainer in trainers:
            trainer.capture(step, is_waiting=False)
        for trainer in trainers:
            trainer.wait_complete(step)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda t: t.rollback(1), trainers)) == [2, 2]
        assert [t.word("generation") for t in trainers] == [2, 2]
        assert list(pool.map(lambda t: t.restore(), trainers)) == [3, 3]
        for trainer in trainers:
            trainer.capture(4)
        trainers[0].wait_complete(4)
        summary = daemon.snapshots("a")[0]
        assert (summary.generation, summary.step, summary.parent_generation, summary.parent_step) == (
            2,
            4,
            1,
            3,
        )
        with pytest.raises(Refused) as refused:
            trainers[0].rollback(5)
        assert refused.value.kind == "rollback_count"
    for trainer in trainers:
        trainer.disconnect()


def test_the_barrier_of_a_restore_ends_when_a_rank_dies(daemon: DaemonProcess) -> None:
    first = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(first):
        trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        trainer.capture(1)
    stays, dies = daemon.trainer(), daemon.trainer_process()
    stays.open(job="a", rank=0, world_size=2, incarnation="two", state_bytes_estimate=STATE)
    dies.do("open", job="a", rank=1, world_size=2, incarnation="two", state_bytes_estimate=STATE)
    assert stays.plan().step == 1
    dies.do("plan")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(stays.finish)
        dies.kill()
        assert not answer.result().committed and "rank 1 is gone" in answer.result().reason
    for trainer in (*first, stays):
        trainer.disconnect()


def test_the_widened_interval_outlives_the_daemon(daemon: DaemonProcess) -> None:
    trainer = daemon.trainer()
    trainer.open(job="a", state_bytes_estimate=STATE, interval_steps=5)
    trainer.capture(5)
    trainer.skip(10)
    wait_for(lambda: trainer.word("interval_steps") == 10, "the interval is widened")
    daemon.restart()
    trainer.reconnect()
    trainer.skip(10_000)
    wait_for(lambda: trainer.word("interval_steps") == 20, "it is widened further, not begun anew")
    trainer.disconnect()


def test_a_smaller_world_releases_what_the_larger_had(daemon: DaemonProcess) -> None:
    larger = [daemon.trainer_process(), daemon.trainer_process()]
    for rank, trainer in enumerate(larger):
        trainer.do("open", job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        trainer.do("capture", step=1)
    for trainer in larger:
        trainer.kill()
    alone = daemon.trainer()
    alone.open(job="a", incarnation="two", state_bytes_estimate=STATE, fresh=True)
    assert daemon.job("a").arena_bytes == 4 * STATE
    alone.capture(1)
    alone.wait_complete(1)
    wait_for(lambda: daemon.job("a").arena_bytes == 2 * STATE, "rank 1's segments are released")
    daemon.restart()
    alone.reconnect()
    alone.capture(2)
    assert daemon.job("a").arena_bytes == 2 * STATE
    alone.disconnect()


def test_a_restore_that_is_overtaken_ends_at_once(daemon: DaemonProcess) -> None:
    first = [daemon.trainer(), daemon.trainer()]
    for rank, trainer in enumerate(first):
        trainer.open(job="a", rank=rank, world_size=2, state_bytes_estimate=STATE)
        trainer.capture(1)
    second = daemon.trainer()
    second.open(job="a", rank=0, world_size=2, incarnation="two", state_bytes_estimate=STATE)
    assert second.plan().step == 1
    third = daemon.trainer()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(second.finish)
        wait_for(lambda: not waiting.done(), "rank 0 waits for rank 1")
        third.open(job="a", rank=0, world_size=2, incarnation="three", state_bytes_estimate=STATE)
        with pytest.raises(Refused) as refused:
            waiting.result(timeout=10)
    assert refused.value.kind == "stale_generation"
    assert third.plan().step == 1
    for trainer in (*first, second, third):
        trainer.disconnect()


def test_a_trainer_in_another_pid_namespace_lives_as_long_as_its_connection() -> None:
    with daemon_folders() as daemon:
        probe = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False)
        if probe.returncode != 0:
            pytest.skip("no new pid namespace can be made here")
        daemon.start(prefix=["unshare", "--pid", "--fork", "--kill-child"])
        trainer = daemon.trainer_process()
        trainer.do("open", job="a", state_bytes_estimate=STATE)
        trainer.do("capture", step=1)
        trainer.do("open_lane", step=2)
        assert [(s.pid, s.state) for s in daemon.job("a").sessions] == [(0, "attached")]
        second = daemon.trainer()
        second.open(job="a", incarnation="two", state_bytes_estimate=STATE)
        assert second.restore() == 1
        assert sum(s.chunks_set_aside for s in daemon.job("a").sessions) == 6
        trainer.kill()
        wait_for(lambda: chunks_free_again_of_fenced(daemon), "its end is the end of its connection")
        second.disconnect()
