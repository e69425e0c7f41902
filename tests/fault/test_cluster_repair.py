"""Bits that flip in the memory of a protected snapshot: they come back from parity, or are named when they cannot."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.harness.cluster import Cluster, cluster
from tests.support.cluster_jobs import (
    CHUNKS,
    WAIT_S,
    FakeWorld,
    chunk_bytes,
    flip,
    flip_parity,
    record_of,
    verify,
)
from tests.support.waiting import wait_for

_names = itertools.count()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(3, "2+1", is_tls=False, is_etcd=False, is_namespaced=False) as made:
        made.start()
        made.wait_settled()
        yield made


@pytest.fixture
def world(nodes: Cluster) -> Iterator[FakeWorld]:
    """Three ranks, step 1 protected."""
    made = FakeWorld(nodes.daemons, f"flip{next(_names)}")
    made.protect(1)
    yield made
    made.die()
    nodes.daemons[0].asker.remove(made.job)


def test_verify_brings_a_flipped_bit_back_from_parity(nodes: Cluster, world: FakeWorld) -> None:
    daemon = nodes["n2"]
    record = record_of(daemon, world.job, 1, 1)
    before = chunk_bytes(daemon, record, 3)
    flip(daemon, record, 3)
    found = json.loads(daemon.command("verify", world.job, "--json"))[0]
    assert [chunk["chunk"] for chunk in found["repaired_chunks"]] == [3] and not found["bad_chunks"]
    after = record_of(daemon, world.job, 1, 1)
    assert chunk_bytes(daemon, after, 3) == before
    brought = [event for event in daemon.events("shard.brought") if event["job"] == world.job][-1]
    assert brought["decoded_bytes"] == len(before) and brought["fetched_bytes"] == 2 * len(before)
    assert "chunk 3 decoded from" in brought["origins"] and "at n1" in brought["origins"]
    assert not verify(daemon, world.job, 1).repaired_chunks
    assert daemon.job(world.job).protected_step == 1


def test_a_chunk_that_two_snapshots_share_comes_back_in_both(nodes: Cluster, world: FakeWorld) -> None:
    daemon = nodes["n1"]
    world.capture(2, is_reusing_last=True)
    records = [record_of(daemon, world.job, step, 0) for step in (1, 2)]
    places = {(r.chunks[CHUNKS - 1].segment, r.chunks[CHUNKS - 1].frame) for r in records}
    assert len(places) == 1, "the frame is not shared"
    flip(daemon, records[0], CHUNKS - 1)
    answer = verify(daemon, world.job, 2)
    assert [chunk.chunk_index for chunk in answer.repaired_chunks] == [CHUNKS - 1] and not answer.bad_chunks
    for summary in daemon.asker.snapshots(world.job):
        again = verify(daemon, world.job, summary.step)
        assert not again.bad_chunks and not again.repaired_chunks


def test_a_bad_chunk_that_a_trainer_meets_is_mended_for_another_round(
    nodes: Cluster, world: FakeWorld
) -> None:
    world.die()
    again = FakeWorld(nodes.daemons, world.job, "two")
    world.trainers = again.trainers
    plans = again.each("plan")
    assert {plan.step for plan in plans} == {1}
    flip(nodes["n3"], plans[2].shards[0], 4)
    read = [trainer.read(plan.shards[0])[1] for trainer, plan in zip(again.trainers, plans, strict=True)]
    assert read == [[], [], [4]]
    again.trainers[2].finish, good = _finisher(again, [4]), again
    answers = good.each("finish")
    assert all(not answer.committed and answer.try_again for answer in answers)
    assert "brought anew" in answers[0].reason
    del again.trainers[2].finish
    plans = again.each("plan", 1)
    assert {plan.step for plan in plans} == {1}
    assert [t.read(p.shards[0])[1] for t, p in zip(again.trainers, plans, strict=True)] == [[], [], []]
    assert all(answer.committed for answer in again.each("finish", 1))


def _finisher(world: FakeWorld, bad: list[int]):  # type: ignore[no-untyped-def]
    trainer = world.trainers[2]
    return lambda: type(trainer).finish(trainer, 0, False, bad)


def test_a_daemon_that_restarts_brings_back_what_went_bad_meanwhile(nodes: Cluster, world: FakeWorld) -> None:
    daemon = nodes["n2"]
    record = record_of(daemon, world.job, 1, 1)
    world.die()
    daemon.kill()
    flip(daemon, record, 2, 5)
    daemon.start()
    nodes.wait_settled()

    def repaired() -> bool:
        return any(event["job"] == world.job for event in daemon.events("shard.repaired"))

    wait_for(repaired, "the shard is repaired", WAIT_S, daemon.tail)
    assert not daemon.job(world.job).problem
    again = FakeWorld(nodes.daemons, world.job, "two")
    world.trainers = again.trainers
    assert again.restore() == [1, 1, 1]


@pytest.mark.parametrize("point", ["daemon.repair.before", "daemon.repair.after"])
def test_a_daemon_that_is_killed_at_a_repair_repairs_when_it_is_back(
    nodes: Cluster, world: FakeWorld, point: str
) -> None:
    daemon = nodes["n2"]
    record = record_of(daemon, world.job, 1, 1)
    before = chunk_bytes(daemon, record, 3)
    world.die()
    daemon.kill()
    flip(daemon, record, 3)
    daemon.start(is_waiting=False, SNAPD_FAULT_POINTS=f"{point}=kill")
    wait_for(lambda: not daemon.is_running, f"{point} is reached", WAIT_S, daemon.tail)
    assert daemon.process is not None and daemon.process.returncode == -signal.SIGKILL
    daemon.asker.forget()
    daemon.start()
    nodes.wait_settled()

    def is_good() -> bool:
        now = record_of(daemon, world.job, 1, 1)
        return chunk_bytes(daemon, now, 3) == before and not daemon.job(world.job).problem

    wait_for(is_good, "the chunk is back", WAIT_S, daemon.tail)
    assert not verify(daemon, world.job, 1).bad_chunks


def test_bits_beyond_the_code_condemn_the_snapshot_and_are_named(nodes: Cluster, world: FakeWorld) -> None:
    for rank, daemon in enumerate(nodes.daemons[:2]):
        flip(daemon, record_of(daemon, world.job, 1, rank), *range(CHUNKS))
    answer = verify(nodes["n1"], world.job, 1)
    assert not answer.repair_waits and len(answer.bad_chunks) > 0
    assert "of the 2 fragments" in answer.repair or "wrong bytes" in answer.repair

    def problems() -> list[str]:
        return [d.asker.snapshots(world.job)[0].problem for d in nodes.daemons]

    wait_for(lambda: all(problems()), "all nodes know that it is unusable", WAIT_S, nodes.says)
    assert all("rank 0 chunk" in problem for problem in problems())
    world.protect(2)
    world.die()
    again = FakeWorld(nodes.daemons, world.job, "two")
    world.trainers = again.trainers
    assert again.restore() == [2, 2, 2]


def test_nothing_is_given_up_while_a_node_does_not_answer(nodes: Cluster, world: FakeWorld) -> None:
    daemon = nodes["n1"]
    record = record_of(daemon, world.job, 1, 0)
    before = chunk_bytes(daemon, record, 3)
    frozen = [nodes["n2"], nodes["n3"]]
    for peer in frozen:
        peer.freeze()
    try:
        flip(daemon, record, 3)  # not before: who pulls the chunk says what is wrong with it
        answer = verify(daemon, world.job, 1)
    finally:
        for peer in frozen:
            peer.thaw()
    assert answer.repair_waits and [chunk.chunk_index for chunk in answer.bad_chunks] == [3]
    assert not daemon.asker.snapshots(world.job)[0].problem
    nodes.wait_settled()
    # The frozen were given up meanwhile. If one of them pulls the chunk as it comes back, it is mended unasked.
    again = verify(daemon, world.job, 1)
    unasked = [event for event in daemon.events("shard.repaired") if event["job"] == world.job]
    assert not again.bad_chunks and (again.repaired_chunks or unasked)
    assert chunk_bytes(daemon, record_of(daemon, world.job, 1, 0), 3) == before
    assert not verify(daemon, world.job, 1).repaired_chunks


def test_bad_parity_is_forgotten_and_coded_again(nodes: Cluster, world: FakeWorld) -> None:
    daemon = nodes["n3"]
    count = verify(daemon, world.job, 1).fragments_checked
    assert count > 0
    flip_parity(daemon, world.job)
    answer = verify(daemon, world.job, 1)
    assert answer.fragments_checked == answer.fragments_bad == count

    def is_whole() -> bool:
        found = verify(daemon, world.job, 1)
        return (found.fragments_checked, found.fragments_bad) == (count, 0)

    wait_for(is_whole, "the parity is coded again", WAIT_S, nodes.says, every_s=0.2)
    record = record_of(nodes["n1"], world.job, 1, 0)
    flip(nodes["n1"], record, *range(CHUNKS))  # and it is good for something
    assert len(verify(nodes["n1"], world.job, 1).repaired_chunks) == CHUNKS
