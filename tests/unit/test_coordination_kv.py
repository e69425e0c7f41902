"""The embedded store beyond the conformance suite: its file, its leases over a restart, its bounds."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.coordination import embedded_kv
from snapd.coordination.counted_kv import CountedKeyValue
from snapd.coordination.embedded_kv import KvServer, LocalKeyValue
from snapd.coordination.etcd_url import endpoints_of
from snapd.coordination.highwater import HighwaterFile
from snapd.coordination.kv import Change, Check, Write
from snapd.core.cluster import Code, Group, GroupTable
from snapd.core.membership import Highwater
from snapd.errors import ConfigError, FencedError, UnavailableError
from tests.support.virtual_time import pass_time, run_virtually


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordination.db"


@pytest.fixture
def server(path: Path, clock: Clock) -> Iterator[KvServer]:
    server = KvServer(path, monotonic_s=clock)
    yield server
    server.close()


def values(server: KvServer) -> dict[str, tuple[bytes, int]]:
    return {key: (entry.value, entry.version) for key, entry in server.read("/a").items.items()}


def test_what_was_written_is_there_after_a_restart(path: Path, server: KvServer, clock: Clock) -> None:
    server.transact("", [], [Write("/a", b"1"), Write("/a/b", b"2")])
    server.transact("", [], [Write("/a", b"3")])
    server.transact("", [], [Write("/a/b", None)])
    # A second one on the same file is what a kill -9 and a restart look like.
    again = KvServer(path, monotonic_s=clock)
    assert values(again) == {"/a": (b"3", 2)}
    assert again.revision == server.revision == 3
    assert again.transact("", [Check("/a", 2), Check("/a/b", 0)], [Write("/a", b"4")])
    assert again.revision == 4
    again.close()


def test_leases_are_whole_again_after_a_restart_and_end_if_nobody_renews(
    path: Path, server: KvServer, clock: Clock
) -> None:
    for lease in ("alive", "dead"):
        server.keep_lease(lease, 5.0, is_new=True)
        server.transact(lease, [], [Write(f"/a/{lease}", b"1", is_leased=True)])
    server.transact("", [], [Write("/a/free", b"1")])
    server.close()
    clock.now_s += 1000
    again = KvServer(path, monotonic_s=clock)
    again.expire()
    assert sorted(values(again)) == ["/a/alive", "/a/dead", "/a/free"]
    clock.now_s += 4
    again.keep_lease("alive", 5.0, is_new=False)
    clock.now_s += 2
    again.expire()
    assert sorted(values(again)) == ["/a/alive", "/a/free"]
    with pytest.raises(FencedError):
        again.keep_lease("dead", 5.0, is_new=False)
    again.end_lease("alive")
    assert sorted(values(again)) == ["/a/free"]
    again.close()
    last = KvServer(path, monotonic_s=clock)
    with pytest.raises(FencedError):
        last.keep_lease("alive", 5.0, is_new=False)
    last.close()


def test_a_refused_transaction_leaves_no_trace(path: Path, server: KvServer, clock: Clock) -> None:
    server.transact("", [], [Write("/a", b"1")])
    assert not server.transact("", [Check("/a", 2)], [Write("/a", b"2"), Write("/a/b", b"2")])
    with pytest.raises(FencedError):
        server.transact("nobody", [], [Write("/a", b"3"), Write("/a/b", b"3", is_leased=True)])
    again = KvServer(path, monotonic_s=clock)
    assert values(again) == values(server) == {"/a": (b"1", 1)} and again.revision == 1
    again.close()


def test_deleting_what_is_not_there_changes_nothing(server: KvServer) -> None:
    assert server.transact("", [], [Write("/a", None)])
    assert server.revision == 0


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, clock: Clock) -> None:
    for name, content in (("text", b"not a database, but long enough to be looked at" * 40),):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as error:
            KvServer(tmp_path / name, monotonic_s=clock)
        assert error.value.kind == "coordination_file"
        assert (tmp_path / name).read_bytes() == content
    newer = tmp_path / "newer"
    KvServer(newer, monotonic_s=clock).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE meta SET value = 2 WHERE name = 'format'")
    connection.close()
    with pytest.raises(ConfigError, match="another version"):
        KvServer(newer, monotonic_s=clock)


def test_the_history_is_bounded_and_says_so(server: KvServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_kv, "HISTORY_MAX", 10)

    async def work() -> None:
        for i in range(30):
            server.transact("", [], [Write("/a", str(i).encode())])
        client = LocalKeyValue(server, "c")
        assert (await anext(client.watch("/a", 20))).revision == 21  # type: ignore[arg-type]
        with pytest.raises(UnavailableError) as error:
            await anext(client.watch("/a", 19))  # type: ignore[arg-type]
        assert error.value.kind == "compacted"

    asyncio.run(work())


def test_a_watcher_that_does_not_keep_up_is_cut_off(
    server: KvServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_kv, "BACKLOG_MAX", 5)

    async def work() -> None:
        changes = LocalKeyValue(server, "c").watch("/a", 0)
        first = asyncio.ensure_future(anext(changes))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for i in range(20):
            server.transact("", [], [Write("/a", str(i).encode())])
        with pytest.raises(UnavailableError) as error:
            await first
        assert error.value.kind == "watch_behind"

    asyncio.run(work())


def test_closing_ends_watches(server: KvServer) -> None:
    async def work() -> None:
        changes = LocalKeyValue(server, "c").watch("/a", 0)
        waiting = asyncio.ensure_future(anext(changes))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        server.close()
        with pytest.raises(UnavailableError) as error:
            await waiting
        assert error.value.kind == "closed"

    asyncio.run(work())


def test_leases_end_in_time_but_not_for_a_stall_of_the_server() -> None:
    async def work() -> None:
        stalled_s = 0.0
        loop_time = asyncio.get_running_loop().time
        server = KvServer(None, monotonic_s=lambda: loop_time() + stalled_s)
        running = asyncio.ensure_future(server.run())
        server.keep_lease("a", 5.0, is_new=True)
        server.transact("a", [], [Write("/a", b"", is_leased=True)])
        await pass_time(4)
        stalled_s = 60.0  # the process was stopped for a minute
        await pass_time(0.9)
        assert server.read("/a").items, "nobody could renew meanwhile"
        await pass_time(1)
        assert not server.read("/a").items
        running.cancel()

    run_virtually(work())


def test_counts(server: KvServer) -> None:
    async def work() -> None:
        store = CountedKeyValue(LocalKeyValue(server, "c"))
        await store.keep_lease(5)
        await store.transact([], [Write("/a", b"12"), Write("/b", b"3", is_leased=True)])
        await store.transact([Check("/a", 9)], [Write("/a", b"4")])
        await store.read("/a")
        change: Change = await anext(store.watch("/a", 0))  # type: ignore[arg-type]
        assert change.value == b"12"
        counts = store.counts
        assert (counts.reads, counts.writes, counts.refused, counts.renewals) == (1, 1, 1, 1)
        assert (counts.keys_written, counts.bytes_written) == (2, 7)
        assert (counts.watches, counts.changes_seen) == (1, 1)
        await store.end_lease()
        assert not server.read("/b").items

    asyncio.run(work())


def test_the_highwater_mark_is_kept_and_a_damaged_one_is_not_taken_for_none(tmp_path: Path) -> None:
    file = HighwaterFile(tmp_path / "highwater.json")
    assert file.load() == Highwater()
    table = GroupTable(
        7, Code(1, 1), (Group(0, ("a", "b"), Code(1, 1)), Group(1, ("c",), None)), "why", "less"
    )
    seen = Highwater("c0ffee", table, {"job": 4})
    file.save(seen)
    assert file.load() == seen
    assert [path.name for path in tmp_path.iterdir()] == ["highwater.json"]
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"cluster_id": 1, "table": null}',
        b'{"cluster_id": "x", "table": {}x',
    ):
        (tmp_path / "highwater.json").write_bytes(damage)
        with pytest.raises(ConfigError) as error:
            file.load()
        assert error.value.kind == "highwater"
    with pytest.raises(UnavailableError):
        HighwaterFile(tmp_path / "nowhere" / "file").save(seen)


@pytest.mark.parametrize(
    "url", ["etcd://", "etcd://a", "etcd://a:0", "etcd://a:1,", "http://a:1", "etcd://a:x"]
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        endpoints_of(url)
    assert error.value.kind == "etcd_url"


def test_urls() -> None:
    assert endpoints_of("etcd://a:1, b.c:2379/") == ("a:1", "b.c:2379")
    assert endpoints_of("etcds://[::1]:2379") == ("[::1]:2379",)
