"""One suite for every store that coordination may stand on: in memory and file, a leader's over gRPC, etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from snapd_proto import peer_pb2, peer_pb2_grpc

from snapd.coordination.counted_kv import CountedKeyValue
from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.coordination.kv import Change, Check, KeyValue, Write
from snapd.errors import ConfigError, FencedError, UnavailableError
from snapd.rpc.kv_service import KeyValueService
from snapd.rpc.remote_kv import CHANNEL_OPTIONS, RemoteKeyValue
from tests.support.etcd import EtcdServer, require_etcd

ROOT = "/snapd/test/"
LEASE_S = 2.0  # etcd grants no shorter ones
Make = Callable[[], KeyValue]


@asynccontextmanager
async def embedded(path: Path) -> AsyncIterator[Make]:
    server = KvServer(path / "kv.db", monotonic_s=time.monotonic)
    running = asyncio.ensure_future(server.run())
    names = iter(range(100))
    try:
        yield lambda: LocalKeyValue(server, f"client-{next(names)}")
    finally:
        running.cancel()
        server.close()


class Service(KeyValueService, peer_pb2_grpc.PeerServicer):
    class node:
        class context:
            class log:
                @staticmethod
                def info(event: str, **fields: object) -> None:
                    """The log of a daemon; nobody reads it here."""

    def _admit(self, sender: peer_pb2.Sender, context: Any) -> None:
        assert sender.node and not sender.cluster_id


@asynccontextmanager
async def remote(path: Path) -> AsyncIterator[Make]:
    server = KvServer(path / "kv.db", monotonic_s=time.monotonic)
    running = asyncio.ensure_future(server.run())
    rpc_server = grpc.aio.server()
    peer_pb2_grpc.add_PeerServicer_to_server(Service(server), rpc_server)
    port = rpc_server.add_insecure_port("127.0.0.1:0")
    await rpc_server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", CHANNEL_OPTIONS)
    stub = peer_pb2_grpc.PeerStub(channel)
    names = iter(range(100))

    def make() -> KeyValue:
        name = f"node-{next(names)}"
        sender = peer_pb2.Sender(node=name, cluster_id="old", epoch=7)
        return RemoteKeyValue(lambda: stub, lambda: sender, client="life", timeout_s=3.0)

    try:
        yield make
    finally:
        await channel.close()
        await rpc_server.stop(0)
        running.cancel()
        server.close()


@asynccontextmanager
async def etcd(server: EtcdServer) -> AsyncIterator[Make]:
    from snapd.coordination.etcd_kv import EtcdKeyValue

    made: list[EtcdKeyValue] = []

    def make() -> KeyValue:
        made.append(EtcdKeyValue([server.endpoint]))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            await each.close()


@pytest.fixture(scope="module")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["embedded", "remote", "etcd"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], None]:
    """Runs `work(make)` on a store: `make()` is a further client of it."""
    if request.param == "etcd":
        require_etcd()
        server = request.getfixturevalue("etcd_server")

    def go(work: Callable[[Make], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            opened = {
                "embedded": lambda: embedded(tmp_path),
                "remote": lambda: remote(tmp_path),
                "etcd": lambda: etcd(server),
            }[request.param]()
            async with opened as make, asyncio.timeout(30):
                cleaner = make()
                left = (await cleaner.read(ROOT)).items
                await cleaner.transact([], [Write(key, None) for key in left])
                await work(make)

        asyncio.run(main())

    return go


async def collect(store: KeyValue, after: int, into: list[Change]) -> None:
    async for change in store.watch(ROOT, after):
        into.append(change)


async def until(is_so: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "not within the time given"
        await asyncio.sleep(0.02)


def test_what_is_written_is_read_with_its_version(run: Any) -> None:
    async def work(make: Make) -> None:
        store = make()
        empty = await store.read(ROOT)
        assert empty.items == {}
        assert await store.transact([], [Write(ROOT + "a", b"1"), Write(ROOT + "b/c", b"\x00\xff")])
        assert await store.transact([], [Write(ROOT + "a", b"2")])
        found = await store.read(ROOT)
        assert {key: (entry.value, entry.version) for key, entry in found.items.items()} == {
            ROOT + "a": (b"2", 2),
            ROOT + "b/c": (b"\x00\xff", 1),
        }
        assert found.revision == empty.revision + 2
        assert list((await store.read(ROOT + "b/")).items) == [ROOT + "b/c"]
        assert (await make().read(ROOT)).items == found.items

    run(work)


def test_a_key_that_was_deleted_begins_again(run: Any) -> None:
    async def work(make: Make) -> None:
        store = make()
        await store.transact([], [Write(ROOT + "a", b"1")])
        await store.transact([], [Write(ROOT + "a", None)])
        assert (await store.read(ROOT)).items == {}
        assert await store.transact([Check(ROOT + "a", 0)], [Write(ROOT + "a", b"")])
        entry = (await store.read(ROOT)).items[ROOT + "a"]
        assert (entry.value, entry.version) == (b"", 1)

    run(work)


def test_a_transaction_is_all_or_nothing(run: Any) -> None:
    async def work(make: Make) -> None:
        store = make()
        await store.transact([], [Write(ROOT + "a", b"1")])
        before = await store.read(ROOT)
        checks = [Check(ROOT + "a", 1), Check(ROOT + "b", 1)]
        assert not await store.transact(checks, [Write(ROOT + "a", b"2"), Write(ROOT + "c", b"2")])
        assert await store.read(ROOT) == before
        assert await store.transact([Check(ROOT + "a", 1), Check(ROOT + "b", 0)], [Write(ROOT + "a", b"2")])

    run(work)


def test_of_two_clients_that_race_one_wins(run: Any) -> None:
    async def work(make: Make) -> None:
        stores = [make() for _ in range(4)]
        for turn in range(5):
            outcomes = await asyncio.gather(
                *(
                    store.transact([Check(ROOT + "a", turn)], [Write(ROOT + "a", f"{i}".encode())])
                    for i, store in enumerate(stores)
                )
            )
            assert sum(outcomes) == 1
            winner = f"{outcomes.index(True)}".encode()
            assert (await stores[0].read(ROOT)).items[ROOT + "a"].value == winner

    run(work)


def test_counters_by_compare_and_set_lose_nothing(run: Any) -> None:
    async def work(make: Make) -> None:
        counted = [CountedKeyValue(make()) for _ in range(3)]

        async def count(store: KeyValue) -> None:
            for _ in range(10):
                while True:
                    entry = (await store.read(ROOT + "n")).items.get(ROOT + "n")
                    number = int(entry.value) if entry else 0
                    check = Check(ROOT + "n", entry.version if entry else 0)
                    if await store.transact([check], [Write(ROOT + "n", str(number + 1).encode())]):
                        break

        await asyncio.gather(*(count(store) for store in counted))
        assert (await counted[0].read(ROOT + "n")).items[ROOT + "n"].value == b"30"
        assert sum(store.counts.writes for store in counted) == 30
        assert all(store.counts.reads >= 10 for store in counted)

    run(work)


def test_a_watch_tells_every_change_in_order(run: Any) -> None:
    async def work(make: Make) -> None:
        store, other = make(), make()
        start = (await store.read(ROOT)).revision
        await other.transact([], [Write(ROOT + "early", b"x")])  # after the reading, before the watch
        seen: list[Change] = []
        watching = asyncio.ensure_future(collect(store, start, seen))
        await until(lambda: len(seen) == 1)
        await other.transact([], [Write(ROOT + "a", b"1"), Write(ROOT + "b", b"1")])
        await other.transact([], [Write("/snapd/another/a", b"1")])
        await other.transact([], [Write(ROOT + "a", b"2"), Write(ROOT + "b", None)])
        await until(lambda: len(seen) == 5)
        assert [(change.key, change.value, change.version) for change in seen] == [
            (ROOT + "early", b"x", 1),
            (ROOT + "a", b"1", 1),
            (ROOT + "b", b"1", 1),
            (ROOT + "a", b"2", 2),
            (ROOT + "b", None, 0),
        ]
        revisions = [change.revision - start for change in seen]
        assert revisions == [1, 2, 2, 4, 4]
        assert (await store.read(ROOT)).revision == seen[-1].revision
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run(work)


def test_a_watch_from_the_future_is_refused(run: Any) -> None:
    """As after the store was set back: the revision that was read is not there any more."""

    async def work(make: Make) -> None:
        store = make()
        revision = (await store.read(ROOT)).revision
        with pytest.raises(UnavailableError) as error:
            await asyncio.wait_for(collect(store, revision + 1000, []), 10)
        assert error.value.kind == "compacted"

    run(work)


def test_leased_keys_go_with_their_lease(run: Any) -> None:
    async def work(make: Make) -> None:
        store, other = make(), make()
        for each in (store, other):
            await each.keep_lease(LEASE_S)
        await store.transact([], [Write(ROOT + "mine", b"1", is_leased=True), Write(ROOT + "stays", b"1")])
        await other.transact([], [Write(ROOT + "theirs", b"1", is_leased=True)])
        seen: list[Change] = []
        start = (await other.read(ROOT)).revision
        watching = asyncio.ensure_future(collect(other, start, seen))
        began = time.monotonic()
        while not seen:
            await other.keep_lease(LEASE_S)
            await asyncio.sleep(LEASE_S / 10)
            assert time.monotonic() - began < 10
        assert LEASE_S * 0.8 <= time.monotonic() - began <= LEASE_S + 2, "nobody renewed it"
        assert [(change.key, change.value) for change in seen] == [(ROOT + "mine", None)]
        assert sorted((await other.read(ROOT)).items) == [ROOT + "stays", ROOT + "theirs"]
        with pytest.raises(FencedError) as error:
            await store.keep_lease(LEASE_S)
        assert error.value.kind == "lease"
        await store.keep_lease(LEASE_S)
        assert await store.transact([Check(ROOT + "mine", 0)], [Write(ROOT + "mine", b"2", is_leased=True)])
        await store.end_lease()
        await until(lambda: len(seen) == 3)
        assert (seen[-1].key, seen[-1].value) == (ROOT + "mine", None)
        await store.end_lease()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run(work)


def test_a_key_belongs_to_the_lease_that_wrote_it_last(run: Any) -> None:
    async def work(make: Make) -> None:
        store, other = make(), make()
        await store.keep_lease(LEASE_S)
        await other.keep_lease(LEASE_S)
        await store.transact(
            [], [Write(ROOT + "a", b"1", is_leased=True), Write(ROOT + "b", b"1", is_leased=True)]
        )
        await other.transact([], [Write(ROOT + "a", b"2", is_leased=True)])
        await other.transact([], [Write(ROOT + "b", b"2")])
        await store.end_lease()
        assert sorted((await other.read(ROOT)).items) == [ROOT + "a", ROOT + "b"]
        await other.end_lease()
        assert sorted((await other.read(ROOT)).items) == [ROOT + "b"]

    run(work)


def test_a_leased_write_needs_a_lease(run: Any) -> None:
    async def work(make: Make) -> None:
        store = make()
        with pytest.raises(FencedError) as error:
            await store.transact([], [Write(ROOT + "a", b"1", is_leased=True)])
        assert error.value.kind == "lease"
        assert (await store.read(ROOT)).items == {}

    run(work)


@pytest.mark.parametrize(
    ("writes", "kind"),
    [
        ([Write("no-slash", b"")], "key"),
        ([Write("/a b", b"")], "key"),
        ([Write("/" + "x" * 600, b"")], "key"),
        ([Write(ROOT + "a", b"x" * ((1 << 20) + 1))], "value_size"),
        ([Write(ROOT + "a", b"1"), Write(ROOT + "a", b"2")], "transaction_size"),
        ([Write(f"{ROOT}{i}", b"1") for i in range(200)], "transaction_size"),
    ],
)
def test_what_no_store_would_take_is_refused_alike(run: Any, writes: list[Write], kind: str) -> None:
    async def work(make: Make) -> None:
        with pytest.raises(ConfigError) as error:
            await make().transact([], writes)
        assert error.value.kind == kind

    run(work)


def test_large_values_pass(run: Any) -> None:
    async def work(make: Make) -> None:
        store = make()
        for name in "abcdefgh":
            await store.transact([], [Write(ROOT + name, name.encode() * (1 << 20))])
        found = await store.read(ROOT)
        assert sum(len(entry.value) for entry in found.items.values()) == 8 << 20

    run(work)
