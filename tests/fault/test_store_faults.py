"""S3 behind a proxy that misbehaves: told to come later, cut off, kept waiting, answered with nothing at all.

Every test sees in the proxy's own count, or in the store's, that its fault happened.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapd.errors import ConfigError, SnapdError, UnavailableError
from snapd.store import s3_upload
from snapd.store.base import Created, Store
from snapd.store.opening import StoreOptions, open_store
from snapd.store.probing import check_probe
from snapd.units import MIB
from tests.support.gateways import ACCESS_KEY, GATEWAYS, SECRET_KEY
from tests.support.seaweed import BUCKET, Seaweed, running
from tests.support.stores import surroundings

HAPROXY = shutil.which("haproxy")
SLOW_DOWN = (
    "<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)
FULL = "<?xml version='1.0'?><Error><Code>QuotaExceeded</Code><Message>Quota exceeded</Message></Error>"
PART = 5 * MIB  # the smallest that S3 takes
CONFIG = """
global
  maxconn 200
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  timeout tarpit 1s
frontend s3
  bind 127.0.0.1:{port}
  acl flaky path_beg /{bucket}/flaky/
  acl reset path_beg /{bucket}/reset/
  acl hole path_beg /{bucket}/hole/
  acl slow path_beg /{bucket}/slow/
  acl busy path_beg /{bucket}/busy/
  acl lost path_beg /{bucket}/lost/
  acl full path_beg /{bucket}/full/
  http-request return status 503 content-type application/xml string "{slow_down}" if flaky {{ rand(100) lt 25 }}
  http-request return status 503 content-type application/xml string "{slow_down}" if busy
  http-request return status 403 content-type application/xml string "{quota}" if full METH_PUT
  http-request reject if reset {{ rand(100) lt 25 }}
  http-request silent-drop if hole
  http-request tarpit deny_status 500 if slow {{ rand(100) lt 40 }}
  http-request set-var(txn.lost) bool(true) if lost METH_PUT {{ rand(100) lt 40 }}
  http-response silent-drop if {{ var(txn.lost) -m bool }}
  default_backend weed
backend weed
  server w 127.0.0.1:{weed_port}
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    if HAPROXY is None:
        pytest.skip("haproxy is not installed (Debian: apt-get install haproxy)")
    with running(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(weed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a proxy before the server; which fault strikes depends on the first part of the key."""
    assert HAPROXY is not None
    folder = tmp_path_factory.mktemp("haproxy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "haproxy.cfg"
    file.write_text(
        CONFIG.format(port=port, weed_port=weed.port, bucket=BUCKET, slow_down=SLOW_DOWN, quota=FULL)
    )
    process = subprocess.Popen(
        [HAPROXY, "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("haproxy does not listen")


def work(store: Store, rounds: int = 3) -> None:
    """Everything that a flush and a restore do, checked."""
    data = secrets.token_bytes(2 * PART + 77)
    upload = store.upload("packs/p.pack", nbytes=len(data))
    upload.write([data])
    assert upload.commit() == len(data)
    buffer = bytearray(len(data))
    store.read_into("packs/p.pack", 0, memoryview(buffer))
    assert buffer == data
    for number in range(rounds):
        key = f"shards/{number}"
        assert store.create(key, f"mine {number}".encode()) is Created.OURS
        assert store.create(key, b"another's") is Created.ANOTHERS
        assert store.read(key, max_nbytes=100) == f"mine {number}".encode()
        assert store.head(key).nbytes == len(f"mine {number}")
    store.delete([f"shards/{number}" for number in range(rounds)])
    assert [info.key for info in store.list("")] == ["packs/p.pack"]
    store.delete(["packs/p.pack"])


@pytest.mark.parametrize("fault", ["flaky", "reset", "lost"])
def test_a_store_that_fails_now_and_then_does_its_work(weed: Seaweed, proxy: str, fault: str) -> None:
    """Many requests: told to slow down, reset, or done without an answer."""
    stall_s = 2 if fault == "lost" else 10
    store = weed.store(f"{fault}/{secrets.token_hex(4)}", endpoint=proxy, deadline_s=60, stall_s=stall_s)
    for _ in range(5):
        work(store)
        if store.requests.retries:
            break
    assert store.requests.retries > 0
    if fault == "lost":
        for key, token, _ in list(store.unfinished()):  # beginnings whose answers were lost
            store.abort_unfinished(key, token)
    assert list(store.unfinished()) == []
    store.close()


def test_a_tarpit(weed: Seaweed, proxy: str) -> None:
    """A second's wait, then an error."""
    store = weed.store(f"slow/{secrets.token_hex(4)}", endpoint=proxy, deadline_s=60)
    for number in range(50):
        assert store.create(f"{number}", b"x") is Created.OURS
        if store.requests.retries > 0:
            break
    assert store.requests.retries > 0
    store.close()


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("busy", {"store_throttled"}),
        ("hole", {"store_slow", "store_unreachable"}),
        ("full", {"store_full"}),
    ],
)
def test_a_store_that_never_does_it_is_named_in_time(
    weed: Seaweed, proxy: str, fault: str, kinds: set[str]
) -> None:
    store = weed.store(f"{fault}/x", endpoint=proxy, stall_s=1)

    calls: list[Callable[[], object]] = [lambda: store.create("a", b"x", deadline_s=1.5)]
    if fault != "full":
        calls += [lambda: store.read("a", max_nbytes=9, deadline_s=1.5)]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(SnapdError) as error:
            call()
        assert error.value.kind in kinds
        assert time.monotonic() - started < 8
    store.close()
    if fault == "full":
        with pytest.raises(SnapdError) as full:
            upload = weed.store(f"{fault}/x", endpoint=proxy).upload("p")
            upload.write([b"x"])
            upload.commit()
        assert full.value.kind == "store_full"


def test_a_stop_in_the_middle_of_an_upload_and_of_a_download(weed: Seaweed) -> None:
    """SIGSTOP for longer than a request waits."""
    store = weed.store(f"stops/{secrets.token_hex(4)}", stall_s=1, connect_s=1, deadline_s=60)
    data = secrets.token_bytes(3 * PART)
    upload = store.upload("p", nbytes=len(data))
    upload.write([data[: PART + 1]])
    with stopped(weed, 2.5):
        upload.write([data[PART + 1 :]])
        assert upload.commit() == len(data)
    retries = store.requests.retries
    assert retries > 0
    buffer = bytearray(len(data))
    with stopped(weed, 2.5):
        store.read_into("p", 0, memoryview(buffer))
    assert buffer == data
    assert store.requests.retries > retries
    store.close()


@contextmanager
def stopped(weed: Seaweed, seconds: float) -> Iterator[None]:
    """It stops now, and goes on after `seconds`."""
    weed.hang()
    back = threading.Timer(seconds, weed.go_on)
    back.start()
    try:
        yield
    finally:
        back.join()


def test_an_outage_is_an_outage_until_it_ends(weed: Seaweed) -> None:
    store = weed.store(f"outage/{secrets.token_hex(4)}")
    assert store.create("a", b"1") is Created.OURS
    weed.kill()
    with pytest.raises(UnavailableError) as error:
        store.create("b", b"2", deadline_s=0.5)
    assert error.value.kind == "store_unreachable"
    weed.start()
    assert store.create("b", b"2") is Created.OURS
    assert store.read("a", max_nbytes=1) == b"1"
    store.close()


@pytest.mark.parametrize("gateway", sorted(GATEWAYS))
def test_a_server_that_ignores_conditions_is_refused(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ones that do. They are large, and tried only where somebody has installed them."""
    if shutil.which(gateway) is None:
        pytest.skip(f"{gateway} is not installed (pip install {gateway}-bin)")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with GATEWAYS[gateway](tmp_path) as url:
        for single_writer in (False, True):
            options = StoreOptions(endpoint=url, single_writer=single_writer, deadline_s=20)
            store = open_store(f"s3://{BUCKET}/tier", options, surroundings())
            probe = store.probe()
            assert (probe.refuses_existing, probe.keeps_checksums) == (False, False)
            if not single_writer:
                with pytest.raises(ConfigError) as error:
                    check_probe(store, probe, single_writer=False)
                assert error.value.kind == "store_conditional"
                assert "overwrites objects" in str(error.value) and "single_writer" in error.value.hint
            else:
                check_probe(store, probe, single_writer=True)
                assert store.create("a", b"1") is Created.OURS
                assert store.create("a", b"2") is Created.ANOTHERS
                assert store.read("a", max_nbytes=1) == b"1"
                store.delete(["a"])
                work(store)
            store.close()
