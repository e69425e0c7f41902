"""Replicas of one node at the daemon: compared when all are captured in full, told to the trainers, never believed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import snapd_native as native
from snapd_proto import format_pb2, trainer_pb2

from tests.support.daemon_process import DaemonProcess, daemon_folders
from tests.support.fake_trainer import FakeTrainer, content
from tests.support.waiting import wait_for

CHUNK = 1 << 16
STATE = 6 * CHUNK
WORD = "replicas_equal_step_plus_one"


class ReplicaTrainer(FakeTrainer):
    """Rank r of two that hold tensors `names` alike, each as long as a chunk; `holders` says who keeps which."""

    def __init__(self, runtime: Path) -> None:
        super().__init__(runtime)
        self.names = ["a", "b"]
        self.holders: dict[str, int] = {}
        self.shift = 0  # bytes before the first tensor
        self.spoilt = ""
        self.bad_region = 0

    def begin(self, rank: int, job: str = "r") -> ReplicaTrainer:
        self.open(job=job, rank=rank, world_size=2, state_bytes_estimate=STATE)
        assert self.page is not None and self.page.chunk_bytes == CHUNK
        self.page.store("node_first_rank", 0)
        self.page.store("node_rank_count", 2)
        return self

    def mine(self) -> list[str]:
        return [name for name in self.names if self.holders.get(name, self.rank) == self.rank]

    def layout(self) -> bytes:
        message = format_pb2.ShardLayout.FromString(super().layout())
        mine = self.mine()
        for number, name in enumerate(self.names):
            region = message.regions.add(nbytes=CHUNK)
            if name in mine:
                region.shard_offset = 2 * CHUNK + self.shift + mine.index(name) * CHUNK
            else:
                region.held_by_rank_plus_one = self.holders[name] + 1
            tensor = message.tensors.add(name=name, dtype="uint8", shape=[CHUNK], strides=[1], nbytes=CHUNK)
            tensor.region = number + self.bad_region
            tensor.replica_set.ranks.extend((0, 1))
        return message.SerializeToString()

    def chunks(self, step: int, seed: int, chunk_count: int) -> list[bytes]:
        early = format_pb2.EarlyValues(generation=self.word("generation"), step=step).SerializeToString()
        data = bytes(self.shift)
        for name in self.mine():
            part = bytearray(content(CHUNK, name, 0, step, seed, 0))
            if name == self.spoilt:
                part[CHUNK // 2] ^= 1
            data += part
        return [self.layout(), early, *(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))]

    def take(self, step: int, *, is_waiting: bool = True) -> None:
        self.capture(step, chunk_count=len(self.chunks(step, 0, 0)), is_waiting=is_waiting)


@pytest.fixture(scope="module")
def shared() -> Iterator[DaemonProcess]:
    with daemon_folders(SNAPD_CHUNK_BYTES=str(CHUNK)) as found:
        found.start()
        yield found
        assert found.stop() == 0, found.log_file.read_text()[-3000:]


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[DaemonProcess]:
    yield shared
    shared.clear()


@pytest.fixture
def world(daemon: DaemonProcess) -> Iterator[list[ReplicaTrainer]]:
    trainers = [ReplicaTrainer(daemon.runtime).begin(rank) for rank in range(2)]
    yield trainers
    for trainer in trainers:
        trainer.disconnect()


def take(world: list[ReplicaTrainer], step: int) -> None:
    for trainer in world:
        trainer.take(step)


def wait_words(world: list[ReplicaTrainer], value: int) -> None:
    wait_for(lambda: all(trainer.word(WORD) == value for trainer in world), f"{WORD} is {value} for both")


def test_equal_replicas_are_told_so(daemon: DaemonProcess, world: list[ReplicaTrainer]) -> None:
    world[0].take(4)
    assert world[0].word(WORD) == 0, "told before the other rank was captured"
    world[1].take(4)
    wait_words(world, 5)
    take(world, 9)
    wait_words(world, 10)
    assert daemon.events("replicas.differ") == []


@pytest.mark.parametrize("shift", [64, CHUNK])
def test_equal_bytes_at_other_places_are_equal(
    daemon: DaemonProcess, world: list[ReplicaTrainer], shift: int
) -> None:
    world[1].shift = shift
    take(world, 1)
    wait_words(world, 2)


@pytest.mark.parametrize("shift", [0, 64])
def test_a_difference_is_named_and_is_for_good(
    daemon: DaemonProcess, world: list[ReplicaTrainer], shift: int
) -> None:
    take(world, 1)
    wait_words(world, 2)
    world[1].shift = shift
    world[1].spoilt = "b"
    take(world, 2)
    wait_words(world, native.REPLICAS_DIFFER)
    found = [(event["tensor"], event["ranks"], event["step"]) for event in daemon.events("replicas.differ")]
    assert found == [("b", [0, 1], 2)]
    assert "b" in daemon.job("r").problem
    last = world[0].call("Last", trainer_pb2.LastRequest(session_id=world[0].session.session_id))
    assert "b" in last.replica_difference
    world[1].spoilt = ""
    take(world, 3)
    assert {trainer.word(WORD) for trainer in world} == {native.REPLICAS_DIFFER}
    assert {trainer.rollback(1) for trainer in world} == {2}
    take(world, 4)
    assert {trainer.word(WORD) for trainer in world} == {native.REPLICAS_DIFFER}
    assert "b" in daemon.job("r").problem, "forgotten with the rollback"
    assert len(daemon.events("replicas.differ")) == 1
    assert max(snapshot.step for snapshot in daemon.snapshots("r") if snapshot.complete) == 4


def test_a_tensor_that_only_one_rank_has_is_a_difference(
    daemon: DaemonProcess, world: list[ReplicaTrainer]
) -> None:
    world[1].names = ["a"]
    take(world, 1)
    wait_words(world, native.REPLICAS_DIFFER)
    (event,) = daemon.events("replicas.differ")
    assert (event["tensor"], event["reason"]) == ("b", "only the first has it")


def test_after_a_restart_and_after_a_rollback_replicas_are_compared_anew(
    daemon: DaemonProcess, world: list[ReplicaTrainer]
) -> None:
    take(world, 1)
    wait_words(world, 2)
    daemon.restart()
    for trainer in world:
        trainer.reconnect()
    assert {trainer.word(WORD) for trainer in world} == {0}
    take(world, 2)
    wait_words(world, 3)
    assert {trainer.rollback(1) for trainer in world} == {2}
    assert {trainer.word(WORD) for trainer in world} == {0}
    take(world, 2)
    wait_words(world, 3)


def test_shards_that_are_shared_out_are_restored_with_those_that_keep_their_bytes(
    daemon: DaemonProcess, world: list[ReplicaTrainer]
) -> None:
    take(world, 1)
    wait_words(world, 2)
    for trainer in world:
        trainer.holders = {"a": 0, "b": 1}
    take(world, 2)
    world[0].wait_complete(2)
    assert {trainer.word(WORD) for trainer in world} == {2}, "a part was compared as if it were the whole"
    again = [ReplicaTrainer(daemon.runtime) for _ in world]
    for rank, trainer in enumerate(again):
        trainer.open(job="r", rank=rank, world_size=2, incarnation="two", state_bytes_estimate=STATE)
    for rank, trainer in enumerate(again):
        plan = trainer.plan()
        assert (plan.outcome, plan.step) == (trainer_pb2.PlanRestoreReply.FOUND, 2)
        assert [shard.rank for shard in plan.shards] == [rank, 1 - rank]
        for record in plan.shards:
            chunks, bad = trainer.read(record)
            assert bad == [] and chunks[2] == content(CHUNK, "ab"[record.rank], 0, 2, 0, 0)
        trainer.disconnect()


def test_a_shard_that_leaves_bytes_to_one_that_does_not_keep_them_is_refused(
    daemon: DaemonProcess, world: list[ReplicaTrainer]
) -> None:
    take(world, 1)
    wait_words(world, 2)
    world[0].holders, world[1].holders = {"a": 1}, {"a": 0}
    world[0].take(2)
    world[1].take(2, is_waiting=False)
    wait_for(lambda: daemon.events("lane.refused"), "the second shard is refused")
    wait_words(world, native.REPLICAS_DIFFER)
    assert [snapshot.step for snapshot in daemon.snapshots("r") if snapshot.complete] == [1]
    for trainer in world:
        trainer.holders = {}
    take(world, 3)
    world[0].wait_complete(3)


def test_a_layout_that_contradicts_itself_is_refused(
    daemon: DaemonProcess, world: list[ReplicaTrainer]
) -> None:
    world[0].bad_region = 7
    world[0].take(1, is_waiting=False)
    wait_for(lambda: daemon.events("lane.refused"), "the lane is refused")
    world[0].bad_region = 0
    take(world, 2)
    wait_words(world, 3)


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 1 << 63), (1, 2), (7, 2)])
def test_nothing_is_compared_where_the_node_is_not_stated_rightly(
    daemon: DaemonProcess, world: list[ReplicaTrainer], first: int, count: int
) -> None:
    for trainer in world:
        assert trainer.page is not None
        trainer.page.store("node_first_rank", first)
        trainer.page.store("node_rank_count", count)
        trainer.spoilt = "a" if trainer.rank else ""
    take(world, 1)
    world[1].wait_complete(1)
    take(world, 2)
    assert daemon.events("replicas.differ") == [] and {trainer.word(WORD) for trainer in world} == {0}
