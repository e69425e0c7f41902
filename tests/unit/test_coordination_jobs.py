"""A job's share of coordination, in virtual time: its generations, its collector, its newest record."""

from __future__ import annotations

import asyncio

import pytest

from snapd.coordination.embedded_kv import LocalKeyValue
from snapd.coordination.job_records import Newest
from snapd.coordination.jobs import ClusterCoordination
from snapd.coordination.kv import Write
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.errors import ConflictError, FencedError, UnavailableError
from tests.support.clusters import KEYS, member, settled
from tests.support.kv_scene import Client, kill, scene, virtually
from tests.support.virtual_time import pass_time


def test_generations_are_given_out_once() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            answers = await asyncio.gather(
                *(job.next_generation(incarnation="x", rollback_count=0, world_size=2) for job in jobs * 4)
            )
            assert {answer.generation.number for answer in answers} == {1}
            assert sum(answer.is_new for answer in answers) == 1
            second = await jobs[1].next_generation(incarnation="y", rollback_count=0, world_size=2)
            assert second.generation.number == 2 and second.is_new
            with pytest.raises(FencedError) as error:
                await jobs[0].next_generation(incarnation="x", rollback_count=0, world_size=2)
            assert error.value.kind == "stale_generation"
            parent = SnapshotId(1, 40)
            await asyncio.gather(jobs[0].commit_parent(2, parent), jobs[1].commit_parent(2, parent))
            with pytest.raises(ConflictError):
                await jobs[0].commit_parent(2, SnapshotId(1, 41))
            assert jobs[0].current() == 2

    virtually(work())


def test_nodes_agree_on_what_a_tier_had_before_the_job() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            assert await jobs[0].agree_tier_floor("/tier", 4) == 4
            first = await jobs[0].next_generation(incarnation="x", rollback_count=0, world_size=2)
            assert first.generation.number == 5
            # a node that comes later finds what this job itself has written there
            assert await jobs[1].agree_tier_floor("/tier", 5) == 4
            assert await jobs[1].agree_tier_floor("s3://other", 9) == 9
            second = await jobs[1].next_generation(incarnation="y", rollback_count=0, world_size=2)
            assert second.generation.number == 10

    virtually(work())


def test_a_generation_waits_for_a_store_that_was_not_looked_at_yet_and_not_for_ever() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemon = cluster.start(member("a"))
            job = ClusterCoordination(daemon.state, "job")
            answer = await job.next_generation(incarnation="x", rollback_count=0, world_size=1)
            assert answer.generation.number == 1 and daemon.state.away is None
            stores.clients[0].cut(True)
            await daemon.until(lambda state: state.away is not None)
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(UnavailableError) as error:
                await job.next_generation(incarnation="y", rollback_count=0, world_size=1)
            assert error.value.kind == "coordination_away" and "cut off" in str(error.value)
            assert 9 <= asyncio.get_running_loop().time() - began_s <= 11

    virtually(work())


def test_a_lost_answer_is_settled_by_reading_back() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemon = cluster.start(member("a"))
            await settled([daemon], "a")
            client = daemon.state.store
            assert isinstance(client, Client)
            job = ClusterCoordination(daemon.state, "job")
            client.lose_answers = 1
            answer = await job.next_generation(incarnation="x", rollback_count=0, world_size=1)
            assert client.lose_answers == 0
            assert answer.generation.number == 1 and answer.is_new, "it was this call that wrote it"

    virtually(work())


def test_after_a_wipe_generations_go_on_above_what_was_seen_and_come_back() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            running = [asyncio.ensure_future(job.run()) for job in jobs]
            for incarnation in "xyz":
                await jobs[0].next_generation(incarnation=incarnation, rollback_count=0, world_size=1)
            stores.replace()
            await daemons[1].until(lambda state: bool(state.distrust), 20.0)
            with pytest.raises(UnavailableError) as error:
                await jobs[1].next_generation(incarnation="w", rollback_count=0, world_size=1)
            assert error.value.kind == "distrusted"
            await settled(daemons, "a", "b")
            answer = await jobs[1].next_generation(incarnation="w", rollback_count=0, world_size=1)
            assert answer.generation.number == 4
            await pass_time(5)
            assert [job.current() for job in jobs] == [4, 4]
            assert jobs[1].generation(2) is not None, "the older ones were given back"
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    virtually(work())


def test_generations_that_went_back_alone_are_noticed() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            table = await settled(daemons, "a", "b")
            job = ClusterCoordination(daemons[0].state, "job")
            running = asyncio.ensure_future(job.run())
            await job.next_generation(incarnation="x", rollback_count=0, world_size=1)
            await LocalKeyValue(stores.server, "vandal").transact([], [Write(KEYS.generations("job"), None)])
            await daemons[0].until(lambda state: bool(state.distrust))
            newer = await settled(daemons, "a", "b")
            assert newer.epoch == table.epoch + 1
            fresh = ClusterCoordination(daemons[1].state, "job")
            answer = await fresh.next_generation(incarnation="y", rollback_count=0, world_size=1)
            assert answer.generation.number == 2
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtually(work())


def test_one_daemon_collects_and_another_follows_when_it_dies() -> None:
    async def work() -> None:
        async with scene() as (_, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            running = [asyncio.ensure_future(job.run()) for job in jobs]
            await pass_time(1)
            assert {await job.claim_collector() for job in jobs} == {"a"}
            assert jobs[0].is_collector and not jobs[1].is_collector
            running[0].cancel()
            await asyncio.gather(running[0], return_exceptions=True)
            await jobs[1].changed(2.0)
            assert jobs[1].collector == "" and await jobs[1].claim_collector() == "b"
            await kill(daemons[1])
            running[1].cancel()
            again = ClusterCoordination(daemons[0].state, "job")
            assert await again.claim_collector() == "b"
            await pass_time(6)
            assert await again.claim_collector() == "a", "the lease had ended"

    virtually(work())


def test_the_newest_record_is_written_once_a_second_at_most() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            running = asyncio.ensure_future(jobs[0].run())
            await jobs[0].claim_collector()
            await pass_time(1)
            before = stores.server.revision
            for step in range(100):
                jobs[0].publish_newest(Newest(SnapshotId(1, step), None, 1))
                await pass_time(0.1)
            assert 9 <= stores.server.revision - before <= 11
            await pass_time(2)
            assert await jobs[1].read_newest() == Newest(SnapshotId(1, 99), None, 1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtually(work())


def test_what_is_protected_is_written_at_once_and_said_to_be_when_it_is() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemon = cluster.start(member("a"))
            await settled([daemon], "a")
            job = ClusterCoordination(daemon.state, "job")
            running = asyncio.ensure_future(job.run())
            await job.claim_collector()
            written: list[Newest] = []
            job.publish_newest(Newest(SnapshotId(1, 1), None, 1), written.append)
            await pass_time(0.1)
            assert written == []
            protected = Newest(SnapshotId(1, 1), SnapshotId(1, 1), 1, 1, 1, Interval(2, 4, 64))
            job.publish_newest(protected, written.append)
            await pass_time(0.05)
            assert written == [protected] == [await job.read_newest()]
            job.publish_newest(protected, written.append)
            await pass_time(2)
            assert written == [protected] * 2, "the store has it already"
            daemon.state.store.lose_answers = 1  # type: ignore[attr-defined]
            before = stores.server.revision
            again = Newest(SnapshotId(1, 2), SnapshotId(1, 2), 1, 1)
            job.publish_newest(again, written.append)
            await pass_time(0.5)
            assert len(written) == 2
            await pass_time(2)
            assert written[2:] == [again]
            assert stores.server.revision == before + 1, "it was written the first time"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtually(work())


def test_the_store_takes_no_record_of_a_collector_whose_lease_has_ended() -> None:
    async def work() -> None:
        async with scene() as (stores, cluster):
            daemons = [cluster.start(member(name)) for name in "ab"]
            await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            running = asyncio.ensure_future(jobs[0].run())
            assert await jobs[0].claim_collector() == "a"
            written: list[Newest] = []
            stores.server.end_lease(stores.clients[0]._lease)
            assert await jobs[1].claim_collector() == "b"
            assert jobs[0].is_collector, "it has not heard of it"
            jobs[0].publish_newest(Newest(SnapshotId(1, 1), SnapshotId(1, 1), 1, 1), written.append)
            await pass_time(0.001)
            assert await jobs[1].read_newest() is None
            assert not jobs[0].is_collector, "now it knows"
            await pass_time(3)
            assert written == [] and await jobs[1].read_newest() is None
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtually(work())


def test_what_a_collector_before_in_the_same_daemon_has_under_way_comes_too_late() -> None:
    """Found by the simulation (seed 1524): it was recorded after the next one had read."""

    async def work() -> None:
        async with scene() as (stores, cluster):
            daemon = cluster.start(member("a"))
            await settled([daemon], "a")
            job = ClusterCoordination(daemon.state, "job")
            running = asyncio.ensure_future(job.run())
            await job.claim_collector()
            assert await job.take_over_newest() is None
            first, second = (Newest(SnapshotId(1, n), SnapshotId(1, n), 1, 1) for n in (1, 2))
            written: list[Newest] = []
            job.publish_newest(first, written.append)
            await pass_time(1)
            stores.clients[0].cut(True)
            job.publish_newest(second, written.append)
            await pass_time(0.5)
            stores.clients[0].cut(False)
            assert await job.take_over_newest() == first, "by the next one"
            await pass_time(5)
            assert written == [first] and await job.read_newest() == first
            job.publish_newest(second, written.append)
            await pass_time(1)
            assert written == [first, second] and await job.read_newest() == second
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    virtually(work())
