"""What every store keeps to: one suite over a directory, a real S3 server, and the faulty wrapper without faults."""

from __future__ import annotations

import array
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd.errors import ConfigError, IntegrityError, NotFoundError, UnavailableError
from snapd.store.base import Created, Store
from snapd.store.directory import DirectoryStore
from snapd.store.faulty import FaultyStore
from snapd.store.probing import check_probe
from snapd.units import MIB
from tests.support.seaweed import Seaweed, running
from tests.support.stores import directory_store, surroundings

KINDS = ("directory", "s3", "faulty")
FAR_LARGER = 20 * MIB + 12345  # than a part, than what is read in one piece


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running(tmp_path_factory.mktemp("weed")) as server:
        yield server


class Scene:
    """Stores of one place. `another()`: the same place, opened by somebody else."""

    def __init__(self, kind: str, make: Callable[[], Store], missing: Callable[[], Store]) -> None:
        self.kind = kind
        self._make = make
        self._missing = missing
        self._opened: list[Store] = []
        self.store = self.another()

    def another(self) -> Store:
        return self._kept(self._make())

    def missing(self) -> Store:
        """A store whose bucket or folder is not there."""
        return self._kept(self._missing())

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def _kept(self, store: Store) -> Store:
        self._opened.append(store)
        return store


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    if request.param == "s3":
        server: Seaweed = request.getfixturevalue("weed")
        prefix = f"tier/{secrets.token_hex(4)}"
        made = Scene(
            "s3", lambda: server.store(prefix), lambda: server.store(prefix, bucket="no-such-bucket")
        )
    else:
        root = tmp_path / "root"

        def make() -> Store:
            store = directory_store(root)
            return FaultyStore(store) if request.param == "faulty" else store

        made = Scene(request.param, make, lambda: DirectoryStore(tmp_path / "nowhere", surroundings()))
    yield made
    made.close()


@pytest.fixture
def store(scene: Scene) -> Store:
    return scene.store


@pytest.fixture(scope="module")
def large() -> bytes:
    return secrets.token_bytes(FAR_LARGER)


def put_large(store: Store, key: str, data: bytes) -> None:
    upload = store.upload(key, nbytes=len(data))
    upload.write([data])
    assert upload.commit() == len(data)


def keys_of(store: Store, prefix: str = "") -> list[str]:
    return sorted(info.key for info in store.list(prefix))


# creating


def test_the_first_creation_wins_and_equal_bytes_are_ours(store: Store) -> None:
    assert store.create("jobs/j/a", b"first") is Created.OURS
    assert store.create("jobs/j/a", b"other") is Created.ANOTHERS
    assert store.create("jobs/j/a", b"first and more") is Created.ANOTHERS
    assert store.create("jobs/j/a", b"fir") is Created.ANOTHERS
    assert store.create("jobs/j/a", bytearray(b"first")) is Created.OURS
    assert store.read("jobs/j/a", max_nbytes=100) == b"first"


def test_of_eight_creators_at_once_one_wins(scene: Scene) -> None:
    stores = [scene.store, *(scene.another() for _ in range(3))] * 2
    for round_number in range(4):
        key = f"race/{round_number}"
        start = threading.Barrier(8)

        def create(number: int, key: str = key, start: threading.Barrier = start) -> Created:
            start.wait()
            return stores[number].create(key, f"writer {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(create, range(8)))
        [winner] = [number for number, result in enumerate(results) if result is Created.OURS]
        assert stores[0].read(key, max_nbytes=100) == f"writer {winner}".encode()


def test_of_eight_creators_of_equal_bytes_all_win(scene: Scene) -> None:
    stores = [scene.store, scene.another()] * 4
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda each: each.create("same", b"same bytes"), stores))
    assert results == [Created.OURS] * 8
    assert keys_of(scene.store) == ["same"]


def test_put_replaces(store: Store) -> None:
    store.put("intents/i", b"one")
    store.put("intents/i", memoryview(b"another"))
    assert store.read("intents/i", max_nbytes=7) == b"another"
    info = store.head("intents/i")
    assert (info.key, info.nbytes) == ("intents/i", 7)
    assert abs(info.modified_s - store.now_s()) < 5


def test_empty_objects(store: Store) -> None:
    assert store.create("empty", b"") is Created.OURS
    assert store.create("empty", b"") is Created.OURS
    assert store.create("empty", b"x") is Created.ANOTHERS
    put_large(store, "empty.large", b"")
    for key in ("empty", "empty.large"):
        assert store.read(key, max_nbytes=0) == b""
        assert store.head(key).nbytes == 0
        store.read_into(key, 0, memoryview(bytearray()))


# uploads


def test_an_upload_appears_whole_and_its_buffers_may_be_used_again(scene: Scene, large: bytes) -> None:
    store, other = scene.store, scene.another()
    upload = store.upload("packs/p.pack")
    buffer = bytearray(3 * MIB)
    at = 0
    while at < len(large):
        count = min(len(buffer), len(large) - at)
        buffer[:count] = large[at : at + count]
        upload.write([memoryview(buffer)[: count // 3], b"", memoryview(buffer)[count // 3 : count]])
        buffer[:count] = bytes(count)
        at += count
        assert keys_of(other) == []
    assert upload.commit() == len(large)
    assert other.read("packs/p.pack", max_nbytes=len(large)) == large
    assert list(other.unfinished()) == []
    upload.abort()
    assert other.head("packs/p.pack").nbytes == len(large)


def test_any_buffer_can_be_written(store: Store) -> None:
    numbers = array.array("I", range(1000))
    upload = store.upload("p", nbytes=4000 + 2)
    upload.write([memoryview(numbers), b"a", bytearray(b"b")])
    upload.commit()
    assert store.read("p", max_nbytes=5000) == numbers.tobytes() + b"ab"


def test_an_aborted_upload_leaves_nothing(store: Store, large: bytes) -> None:
    for data in (large, b"small"):
        upload = store.upload("packs/q.pack")
        upload.write([data])
        upload.abort()
        upload.abort()
    assert keys_of(store) == []
    assert list(store.unfinished()) == []


def test_an_upload_that_somebody_left_is_found_and_removed(scene: Scene, large: bytes) -> None:
    left = scene.another().upload("packs/left.pack")
    left.write([large])
    [(key, token, begun_s)] = list(scene.store.unfinished())
    assert key == "packs/left.pack"
    assert abs(begun_s - scene.store.now_s()) < 30
    scene.store.abort_unfinished(key, token)
    scene.store.abort_unfinished(key, token)
    assert list(scene.store.unfinished()) == []
    with pytest.raises(UnavailableError) as error:
        left.write([b"more"])
        left.commit()
    assert error.value.kind == "store_failing"
    left.abort()
    assert keys_of(scene.store) == []


def test_an_upload_does_not_replace_other_bytes(store: Store, large: bytes) -> None:
    for size in (10, len(large)):
        key = f"packs/{size}.pack"
        put_large(store, key, large[:size])
        upload = store.upload(key)
        upload.write([large[:size][::-1]])
        with pytest.raises(IntegrityError) as error:
            upload.commit()
        assert error.value.kind == "store_bytes" and key in str(error.value)
        upload.abort()
        assert store.read(key, max_nbytes=size) == large[:size]
        assert list(store.unfinished()) == []


# reading


def test_ranges(store: Store, large: bytes) -> None:
    put_large(store, "packs/r.pack", large)
    for offset, size in (
        (0, 1),
        (1, 100),
        (len(large) - 7, 7),
        (0, len(large)),
        (12345, 15 * MIB),
        (777, 8 * MIB + 1),
    ):
        buffer = bytearray(size)
        store.read_into("packs/r.pack", offset, memoryview(buffer))
        assert buffer == large[offset : offset + size], (offset, size)


@pytest.mark.parametrize(("offset", "size"), [(0, 11), (4, 7), (10, 1), (1000, 5), (0, 20 * MIB)])
def test_a_range_that_the_object_does_not_have(store: Store, offset: int, size: int) -> None:
    store.create("ten", b"0123456789")
    with pytest.raises(IntegrityError) as error:
        store.read_into("ten", offset, memoryview(bytearray(size)))
    assert error.value.kind == "store_bytes"
    assert "ten" in str(error.value) and store.description in str(error.value)


def test_an_object_that_became_shorter_or_longer(store: Store) -> None:
    store.put("changing", b"0123456789")
    nbytes = store.head("changing").nbytes
    store.put("changing", b"01234")
    with pytest.raises(IntegrityError):
        store.read_into("changing", 0, memoryview(bytearray(nbytes)))
    store.put("changing", b"0123456789 and more")
    with pytest.raises(IntegrityError) as error:
        store.read("changing", max_nbytes=nbytes)
    assert error.value.kind == "store_bytes"


def test_what_is_not_there(store: Store) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.read("jobs/none", max_nbytes=10),
        lambda: store.head("jobs/none"),
        lambda: store.read_into("jobs/none", 0, memoryview(bytearray(10))),
        lambda: store.read_into("jobs/none", 0, memoryview(bytearray(20 * MIB))),
        lambda: store.read_into("jobs/none", 0, memoryview(bytearray())),
    ]
    for call in calls:
        with pytest.raises(NotFoundError) as error:
            call()
        assert error.value.kind == "object"
        assert "jobs/none" in str(error.value) and store.description in str(error.value)


# listing and deleting


def test_more_keys_than_a_page_has(store: Store) -> None:
    wanted = sorted(f"jobs/j/{number % 7}/{number:05d}" for number in range(1105))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), wanted))
    found = list(store.list("jobs/"))
    assert sorted(info.key for info in found) == wanted
    assert {info.nbytes for info in found} == {len("jobs/j/0/00000")}
    assert keys_of(store, "jobs/j/3/") == [key for key in wanted if key.startswith("jobs/j/3/")]
    store.delete([*wanted, "jobs/j/none"])
    assert keys_of(store) == []


def test_prefixes(store: Store) -> None:
    for key in ("a/b", "a/b.c", "a/bc/d", "ab", "a-b/c"):
        store.put(key, b"x")
    assert keys_of(store, "a/") == ["a/b", "a/b.c", "a/bc/d"]
    assert keys_of(store, "a/b") == ["a/b", "a/b.c", "a/bc/d"]
    assert keys_of(store, "a/bc/") == ["a/bc/d"]
    assert keys_of(store, "a/bcd") == []
    assert keys_of(store, "none/") == []
    assert keys_of(store, "a/b/") == []
    assert keys_of(store) == ["a-b/c", "a/b", "a/b.c", "a/bc/d", "ab"]


def test_what_was_deleted_can_be_created_again(store: Store) -> None:
    assert store.create("a/b/c", b"1") is Created.OURS
    store.delete(["a/b/c"])
    store.delete(["a/b/c", "a/x/y"])
    with pytest.raises(NotFoundError):
        store.read("a/b/c", max_nbytes=1)
    assert store.create("a/b/c", b"2") is Created.OURS


BAD_KEYS = (
    "",
    "/x",
    "../x",
    "a/../x",
    "a/./x",
    "a//x",
    "a/",
    ".tmp/x",
    "a/.x",
    "a\\b",
    "a\0b",
    "\u00fc",
    "a b",
    "x" * 300,
)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_no_key_leaves_the_root(store: Store, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.create(key, b"x"),
        lambda: store.put(key, b"x"),
        lambda: store.upload(key),
        lambda: store.read(key, max_nbytes=1),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.head(key),
        lambda: store.delete([key]),
        lambda: store.abort_unfinished(key, "0" * 32),
    ]
    if key not in ("", "a/"):
        calls.append(lambda: list(store.list(key)))
    for call in calls:
        with pytest.raises(ConfigError) as error:
            call()
        assert error.value.kind == "store"
    assert keys_of(store) == []


# the place itself


def test_a_place_that_is_missing_is_told_and_not_made(scene: Scene) -> None:
    store = scene.missing()
    calls: list[Callable[[], object]] = [
        lambda: store.create("a", b"x"),
        lambda: store.put("a", b"x"),
        lambda: _written(store),
        lambda: store.read("a", max_nbytes=1),
        lambda: store.read_into("a", 0, memoryview(bytearray(1))),
        lambda: store.head("a"),
        lambda: list(store.list("")),
        lambda: list(store.unfinished()),
        lambda: store.delete(["a"]),
        store.probe,
        scene.missing().now_s,
    ]
    for call in calls:
        with pytest.raises(NotFoundError) as error:
            call()
        assert error.value.kind == "bucket"


def _written(store: Store) -> None:
    upload = store.upload("a")
    upload.write([b"x"])
    upload.commit()


def test_the_probe(store: Store) -> None:
    store.put("jobs/x", b"not new")
    probe = store.probe()
    assert (probe.refuses_existing, probe.keeps_checksums, probe.problems) == (True, True, ())
    assert abs(probe.skew_s) < 5
    check_probe(store, probe, single_writer=False)
    assert keys_of(store) == ["jobs/x"]
    assert list(store.unfinished()) == []


def test_the_clock(store: Store) -> None:
    first = store.now_s()
    assert abs(first - time.time()) < 5
    time.sleep(0.02)
    assert store.now_s() >= first
    assert list(store.unfinished()) == []


def test_what_is_asked_is_counted(store: Store, large: bytes) -> None:
    def count(kind: str) -> int:
        return store.requests.count.get(kind, 0)

    store.create("a", b"12345")
    assert (count("put"), store.requests.sent_nbytes >= 5) == (1, True)
    before = store.requests.received_nbytes
    store.read("a", max_nbytes=5)
    assert store.requests.received_nbytes == before + 5
    assert count("get") == 1
    put_large(store, "b", large)
    assert count("part") >= 1 and count("complete") == 1
    assert store.requests.sent_nbytes >= 5 + len(large)
    store.head("a")
    assert count("head") == 1
    list(store.list(""))
    assert count("list") >= 1
    store.delete(["a", "b"])
    assert count("delete") >= 1
    assert store.requests.retries == 0
