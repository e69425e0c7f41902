"""etcd killed, hung, restarted, compacted, wiped, set back to a copy: what its client and the cluster make of it.

A real etcd on loopback, in real time; each test asserts that its fault took place.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from snapd.coordination.cluster import ClusterState
from snapd.coordination.etcd_kv import EtcdKeyValue
from snapd.coordination.jobs import ClusterCoordination
from snapd.coordination.kv import Change, KeyValue, Write
from snapd.coordination.settings import ClusterSettings
from snapd.errors import ConflictError, FencedError, UnavailableError
from tests.support.clusters import ASKED, KEYS, Cluster, Daemon, member, settled
from tests.support.etcd import EtcdServer, require_etcd
from tests.support.waiting import wait_for

TIMEOUT_S = 1.0
SETTINGS = ClusterSettings(asked=ASKED, lease_s=2.0, lost_after_s=4.0, retry_max_s=1.0)
DEAD = "127.0.0.1:1"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    require_etcd()
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def client(*endpoints: str) -> AsyncIterator[EtcdKeyValue]:
    store = EtcdKeyValue(endpoints, timeout_s=TIMEOUT_S)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def cluster_on(server: EtcdServer) -> AsyncIterator[Cluster]:
    stores: list[EtcdKeyValue] = []

    def connect(node: str) -> KeyValue:
        stores.append(EtcdKeyValue([server.endpoint], timeout_s=TIMEOUT_S))
        return stores[-1]

    cluster = Cluster(connect, SETTINGS)
    try:
        yield cluster
    finally:
        await cluster.stop()
        for store in stores:
            await store.close()


def really(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


async def off_loop(act: Callable[[], Any]) -> Any:
    """What tests do to the server blocks; the daemons go on meanwhile."""
    return await asyncio.to_thread(act)


async def patient(act: Callable[[], Coroutine[Any, Any, Any]], within_s: float = 10.0) -> Any:
    """Try until it is answered."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await act()
        except UnavailableError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def all_see(daemons: list[Daemon], is_so: Callable[[ClusterState], bool]) -> None:
    for daemon in daemons:
        await daemon.until(is_so, 20.0)


def test_a_watch_ends_when_the_server_is_killed_and_the_client_goes_on_with_the_next(
    server: EtcdServer,
) -> None:
    async def work() -> None:
        async with client(server.endpoint) as store:
            await store.keep_lease(5)
            await store.transact([], [Write("/snapd/t/a", b"1", is_leased=True)])
            seen: list[Change] = []

            async def watch() -> None:
                async for change in store.watch("/snapd/t/", 1):
                    seen.append(change)

            watching = asyncio.ensure_future(watch())
            while not seen:
                await asyncio.sleep(0.02)
            killed = server.pid
            await off_loop(server.kill)
            with pytest.raises(UnavailableError):
                await asyncio.wait_for(watching, 10)
            with pytest.raises(UnavailableError):
                await store.read("/snapd/t/")
            await off_loop(server.start)
            assert server.pid != killed
            assert "/snapd/t/a" in (await patient(lambda: store.read("/snapd/t/"))).items
            await patient(lambda: store.keep_lease(5))  # the lease outlived the server
            await store.end_lease()
            assert (await store.read("/snapd/t/")).items == {}

    really(work)


def test_a_server_that_hangs_holds_nobody(server: EtcdServer) -> None:
    async def work() -> None:
        async with client(server.endpoint) as store:
            await store.keep_lease(30)
            revision = (await store.read("/snapd/t/")).revision
            server.hang()
            try:
                calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                    lambda: store.read("/snapd/t/"),
                    lambda: store.transact([], [Write("/snapd/t/a", b"1")]),
                    lambda: store.keep_lease(30),
                    lambda: anext(store.watch("/snapd/t/", revision)),  # type: ignore[arg-type, return-value]
                ]
                for call in calls:
                    began = time.monotonic()
                    with pytest.raises(UnavailableError):
                        await call()
                    assert 0.5 < time.monotonic() - began < 10.0, "it hung, and was given up in time"
            finally:
                server.go_on()
            await patient(lambda: store.keep_lease(30))
            assert await patient(lambda: store.transact([], [Write("/snapd/t/b", b"1")]))

    really(work)


def test_an_idle_watch_on_a_server_that_hangs_ends(server: EtcdServer) -> None:
    async def work() -> None:
        async with client(server.endpoint) as store:
            await store.transact([], [Write("/snapd/t/a", b"1")])
            changes = store.watch("/snapd/t/", 1)
            assert (await anext(changes)).value == b"1"  # type: ignore[arg-type]
            server.hang()
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                await anext(changes)  # type: ignore[arg-type]
            assert 1 < time.monotonic() - began < 15
            server.go_on()

    really(work)


def test_another_endpoint_is_taken_when_one_is_dead(server: EtcdServer) -> None:
    async def work() -> None:
        async with client(DEAD, server.endpoint) as store:
            await store.keep_lease(5)
            assert await store.transact([], [Write("/snapd/t/a", b"1", is_leased=True)])
            assert list((await store.read("/snapd/t/")).items) == ["/snapd/t/a"]
        async with client(DEAD) as store:
            with pytest.raises(UnavailableError) as error:
                await store.read("/snapd/t/")
            assert DEAD in str(error.value)

    really(work)


def test_compaction_bounds_the_history_and_ends_watches_that_need_it(server: EtcdServer) -> None:
    async def work() -> None:
        async with client(server.endpoint) as store:
            for i in range(50):
                await store.transact([], [Write("/snapd/t/a", str(i).encode())])
            newest = (await store.read("/snapd/t/")).revision
            await store.compact(10)
            await store.compact(10)
            await store.compact(1000)
            with pytest.raises(UnavailableError) as error:
                await anext(store.watch("/snapd/t/", newest - 20))  # type: ignore[arg-type]
            assert error.value.kind == "compacted"
            assert (await anext(store.watch("/snapd/t/", newest - 5))).revision == newest - 4  # type: ignore[arg-type]

    really(work)


def test_a_lease_that_etcd_has_forgotten_is_told_and_opened_anew(server: EtcdServer) -> None:
    async def work() -> None:
        async with client(server.endpoint) as store:
            await store.keep_lease(5)
            await store.transact([], [Write("/snapd/t/a", b"1", is_leased=True)])
            await off_loop(server.wipe)
            with pytest.raises(FencedError):
                await patient(lambda: store.transact([], [Write("/snapd/t/a", b"2", is_leased=True)]))
            await store.keep_lease(5)
            assert await store.transact([], [Write("/snapd/t/a", b"2", is_leased=True)])

    really(work)


def test_a_cluster_outlives_a_restart_of_etcd_unchanged(server: EtcdServer) -> None:
    async def work() -> None:
        async with cluster_on(server) as cluster:
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            token = daemons[0].state.token
            await off_loop(server.kill)
            await all_see(daemons, lambda state: state.away is not None)
            assert all(daemon.state.table == table and daemon.state.token == token for daemon in daemons)
            await asyncio.sleep(SETTINGS.lost_after_s + 1)  # nobody is lost because the store is
            await off_loop(server.start)
            assert await settled(daemons, *"abc") == table
            await asyncio.sleep(SETTINGS.lease_s + 1)
            assert all(daemon.state.token == token for daemon in daemons)
            assert all(len(daemon.state.members) == 3 for daemon in daemons)
            assert not any(daemon.events("cluster.distrusted") for daemon in daemons)

    really(work)


def test_a_hung_etcd_is_away_and_comes_back(server: EtcdServer) -> None:
    async def work() -> None:
        async with cluster_on(server) as cluster:
            daemons = [cluster.start(member(name)) for name in "ab"]
            table = await settled(daemons, "a", "b")
            server.hang()
            await all_see(daemons, lambda state: state.away is not None)
            assert all(daemon.state.away and daemon.state.away.reason for daemon in daemons)
            server.go_on()
            assert (await settled(daemons, "a", "b")).groups == table.groups

    really(work)


def test_a_wiped_etcd_is_rebuilt_from_the_daemons(server: EtcdServer) -> None:
    async def work() -> None:
        async with cluster_on(server) as cluster:
            daemons = [cluster.start(member(name)) for name in "abc"]
            table = await settled(daemons, *"abc")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            for incarnation in "xyz":
                await jobs[0].next_generation(incarnation=incarnation, rollback_count=0, world_size=3)
            old_id = daemons[0].state.token
            assert old_id is not None
            await off_loop(server.wipe)
            await all_see(
                daemons, lambda state: bool(state.distrust) or state.seen.cluster_id != old_id.cluster_id
            )
            newer = await settled(daemons, *"abc")
            assert newer.epoch > table.epoch and newer.groups == table.groups
            assert "rebuilt above epoch" in newer.reason
            assert all(daemon.events("cluster.distrusted") for daemon in daemons), "the fault was noticed"
            token = daemons[2].state.token
            assert token is not None and token.cluster_id != old_id.cluster_id
            answer = await jobs[2].next_generation(incarnation="w", rollback_count=0, world_size=3)
            assert answer.generation.number == 4

    really(work)


def test_an_etcd_that_was_set_back_is_rebuilt_above_what_was_seen(server: EtcdServer) -> None:
    async def work() -> None:
        async with cluster_on(server) as cluster:
            daemons = [cluster.start(member(name)) for name in "ab"]
            early = await settled(daemons, "a", "b")
            jobs = [ClusterCoordination(daemon.state, "job") for daemon in daemons]
            await jobs[0].next_generation(incarnation="x", rollback_count=0, world_size=2)
            copy = await off_loop(server.copy_data)
            await settled(daemons, "a", "b")
            daemons.append(cluster.start(member("c")))
            table = await settled(daemons, *"abc")
            assert table.epoch > early.epoch
            for incarnation in "yz":
                await patient(
                    lambda name=incarnation: jobs[0].next_generation(
                        incarnation=name, rollback_count=0, world_size=2
                    )
                )
            await off_loop(lambda: server.set_back(copy))
            await daemons[0].until(lambda _: bool(daemons[0].events("cluster.distrusted")), 20)
            newer = await settled(daemons, *"abc")
            assert newer.epoch > table.epoch
            answer = await jobs[1].next_generation(incarnation="w", rollback_count=0, world_size=2)
            assert answer.generation.number == 4
            for daemon in daemons:
                epochs = [fields["epoch"] for fields in daemon.events("epoch.changed")]
                assert epochs == sorted(epochs), "no daemon ever went back"

    really(work)


def test_a_duplicate_node_is_refused_and_the_first_one_stays(server: EtcdServer) -> None:
    async def work() -> None:
        async with cluster_on(server) as cluster:
            first = cluster.start(member("a"))
            await settled([first], "a")
            twin = cluster.start(member("a", host="elsewhere"))
            with pytest.raises(ConflictError) as error:
                await twin.until(lambda _: False, 20)
            assert error.value.kind == "duplicate_node"
            await settled([first], "a")
            other = cluster.start(member("b"))
            await settled([first, other], "a", "b")
            assert KEYS.member("a") in (await first.state.store.read(KEYS.members)).items

    really(work)


class Process:
    """A member of the cluster as a process, and the last line that it printed."""

    def __init__(self, endpoint: str, node: str, folder: Path) -> None:
        self._output = folder / f"{node}.out"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.cluster_member", endpoint, node, str(folder / f"{node}.json")],
                cwd=ROOT, stdout=output, env=os.environ,
            )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        lines = self._output.read_text().splitlines()
        return json.loads(lines[-1]) if lines else {"planner": False, "epoch": 0, "nodes": [], "away": True}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_planner_that_is_killed_is_followed_by_another(server: EtcdServer, tmp_path: Path) -> None:
    processes = {name: Process(server.endpoint, name, tmp_path) for name in "abc"}
    try:
        wait_for(lambda: all(each.facts()["nodes"] == list("abc") for each in processes.values()))
        planner = next(name for name, each in processes.items() if each.facts()["planner"])
        epoch = processes[planner].facts()["epoch"]
        processes.pop(planner).kill()
        rest = sorted(processes)
        wait_for(lambda: sum(each.facts()["planner"] for each in processes.values()) == 1)
        wait_for(lambda: all(each.facts()["nodes"] == rest for each in processes.values()))
        assert all(each.facts()["epoch"] > epoch for each in processes.values())
        processes[planner] = Process(server.endpoint, planner, tmp_path)
        wait_for(lambda: all(each.facts()["nodes"] == list("abc") for each in processes.values()))
    finally:
        for each in processes.values():
            each.kill()
