"""etcd as production has it: three members, TLS with client certificates, a user whose role ends at our prefix."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from snapd.coordination.etcd_kv import EtcdKeyValue
from snapd.coordination.etcd_url import open_etcd
from snapd.coordination.kv import Change, Check, Write
from snapd.errors import FencedError, UnavailableError
from tests.support.etcd import require_etcd
from tests.support.etcd_quorum import PASSWORD, USER, EtcdQuorum, make_certificates

ROOT = "/snapd/test/"
LEASE_S = 5.0
BACK_WITHIN_S = 20.0
Answer = TypeVar("Answer")


@pytest.fixture(scope="module")
def quorum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdQuorum]:
    require_etcd()
    made = EtcdQuorum(tmp_path_factory.mktemp("quorum"))
    made.start()
    try:
        asyncio.run(made.ask_for_users())
        yield made
    finally:
        made.kill()


@asynccontextmanager
async def client(quorum: EtcdQuorum, **changes: object) -> AsyncIterator[EtcdKeyValue]:
    access = {"ca": quorum.ca, "cert": quorum.cert, "key": quorum.key, "user": USER, "password": PASSWORD}
    made = open_etcd(quorum.url, **{**access, **changes})  # type: ignore[arg-type]
    try:
        yield made
    finally:
        with contextlib.suppress(UnavailableError):
            await made.end_lease()
        await made.close()


async def insist(work: Callable[[], Awaitable[Answer]]) -> Answer:
    """As daemons do: again, until the store answers."""
    async with asyncio.timeout(BACK_WITHIN_S):
        while True:
            try:
                return await work()
            except UnavailableError:
                await asyncio.sleep(0.2)


async def written(store: EtcdKeyValue, name: str, value: bytes) -> None:
    """Whatever was answered to the first try."""
    key = ROOT + name

    async def attempt() -> None:
        found = (await store.read(key)).items.get(key)
        if found is None or found.value != value:
            assert await store.transact([Check(key, found.version if found else 0)], [Write(key, value)])

    await insist(attempt)


def test_leases_watches_and_transactions_go_on_while_single_members_die(quorum: EtcdQuorum) -> None:
    async def work() -> None:
        async with client(quorum) as store, client(quorum) as other:
            await insist(lambda: store.keep_lease(LEASE_S))
            leased = [Write(ROOT + "leased", b"x", is_leased=True)]
            assert await store.transact([Check(ROOT + "leased", 0)], leased)
            seen: list[Change] = []

            async def watch() -> None:
                while True:
                    with contextlib.suppress(UnavailableError):
                        reading = await insist(lambda: other.read(ROOT))
                        async for change in other.watch(ROOT, reading.revision):
                            seen.append(change)

            watching = asyncio.ensure_future(watch())
            for member in (0, 1, 2):  # one of them leads, and one serves each of us
                quorum.kill(member)
                await written(store, f"without-{member}", b"1")
                await insist(lambda: store.keep_lease(LEASE_S))
                await written(other, f"after-{member}", b"1")
                quorum.start(member)
                await insist(lambda: store.keep_lease(LEASE_S))
                await asyncio.sleep(1.5)  # it joins again before the next one goes
                await insist(lambda: store.keep_lease(LEASE_S))
            await written(store, "last", b"1")
            async with asyncio.timeout(BACK_WITHIN_S):
                while not any(change.key == ROOT + "last" for change in seen):
                    await asyncio.sleep(0.1)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            items = (await other.read(ROOT)).items
            assert {f"{ROOT}{kind}-{n}" for kind in ("without", "after") for n in range(3)} <= set(items)
            assert ROOT + "leased" in items, "its lease was renewed all the time"
            await insist(lambda: store.compact(4))

    asyncio.run(work())


def test_without_a_quorum_the_store_is_away_and_comes_back_with_all_that_it_had(quorum: EtcdQuorum) -> None:
    async def work() -> None:
        async with client(quorum) as store:
            await written(store, "kept", b"before")
            await insist(lambda: store.keep_lease(LEASE_S))
            quorum.kill(0)
            quorum.stop_answering(1)
            with pytest.raises(UnavailableError):
                await store.read(ROOT)
            with pytest.raises(UnavailableError):
                await store.transact([], [Write(ROOT + "kept", b"alone")])
            quorum.kill(1)
            quorum.start(0, 1)
            reading = await insist(lambda: store.read(ROOT))
            assert reading.items[ROOT + "kept"].value in (b"before", b"alone")
            with contextlib.suppress(FencedError):
                await insist(lambda: store.keep_lease(LEASE_S))
            await written(store, "kept", b"after")

    asyncio.run(work())


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"password": "wrong"}, "etcd_user", "refuses user 'snapd'"),
        ({"user": ""}, "etcd_user", "permission denied"),  # the name in the certificate is no user
        ({"cert": None, "key": None}, "etcd", ""),
        ({"ca": b""}, "etcd", ""),
    ],
)
def test_who_may_not_is_refused_in_words(
    quorum: EtcdQuorum, tmp_path: Path, changes: dict[str, object], kind: str, words: str
) -> None:
    async def work() -> None:
        if changes.get("ca") == b"":
            make_certificates(tmp_path)
            changes["ca"] = (tmp_path / "ca.crt").read_bytes()
        async with client(quorum) as known:
            await insist(lambda: known.read(ROOT))
        async with client(quorum, **changes) as store:
            with pytest.raises(UnavailableError) as error:
                await store.read(ROOT)
        assert error.value.kind == kind and words in str(error.value), error.value

    asyncio.run(work())


def test_a_role_ends_at_its_prefix(quorum: EtcdQuorum) -> None:
    async def work() -> None:
        async with client(quorum) as store:
            await insist(lambda: store.read(ROOT))
            with pytest.raises(UnavailableError) as error:
                await store.transact([], [Write("/other/key", b"x")])
        assert error.value.kind == "etcd_user" and "permission denied" in str(error.value)

    asyncio.run(work())
