"""What is particular to S3: credentials, certificates, encryption, clocks, lost answers, servers that stop or die."""

from __future__ import annotations

import datetime
import secrets
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.auth
import botocore.crt.auth
import pytest
from botocore.exceptions import ConnectionClosedError

from snapd.errors import AuthError, ConfigError, IntegrityError, NotFoundError, SnapdError, UnavailableError
from snapd.peer.certificates import make_ca, make_node
from snapd.store import s3_upload
from snapd.store.base import Created, Store
from snapd.store.s3 import S3Store
from snapd.store.s3_requests import S3Requests
from snapd.store.s3_upload import PART_BYTES, PARTS_MAX, part_nbytes
from snapd.units import MIB
from tests.support.seaweed import (
    BUCKET,
    READ_ONLY_KEY,
    READ_ONLY_SECRET,
    SECRET_KEY,
    Seaweed,
    running,
)


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    folder = tmp_path_factory.mktemp("weed")
    now, validity = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=2)
    ca = make_ca("test", now, validity)
    issued = make_node(ca, "localhost", now, validity, also=["127.0.0.1"])
    paths = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    for path, data in zip(paths, (ca.certificate, issued.certificate, issued.key), strict=True):
        path.write_bytes(data)
    with running(folder, certificate=paths) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"tier/{secrets.token_hex(4)}"


@pytest.fixture
def store(weed: Seaweed, prefix: str) -> Iterator[S3Store]:
    store = weed.store(prefix)
    yield store
    store.close()


def upload(store: Store, key: str, data: bytes) -> None:
    begun = store.upload(key, nbytes=len(data))
    begun.write([data])
    begun.commit()


# who may


@pytest.mark.parametrize(
    ("key_id", "secret", "kind"),
    [
        ("AKNOBODY", "wrong-secret-1234", "store_credentials"),
        ("AKSNAPD", "wrong-secret-1234", "store_credentials"),
        (READ_ONLY_KEY, READ_ONLY_SECRET, "store_denied"),
    ],
)
def test_credentials_that_do_not_suffice(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch, key_id: str, secret: str, kind: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = weed.store(prefix)
    begun = store.upload("b", nbytes=20 * MIB)

    def write() -> None:
        begun.write([bytes(20 * MIB)])
        begun.commit()

    calls: list[Callable[[], object]] = [lambda: store.create("a", b"x"), write, lambda: store.delete(["a"])]
    if kind == "store_credentials":
        calls += [lambda: store.head("a"), lambda: list(store.list("")), store.probe]
    for call in calls:
        with pytest.raises(AuthError) as error:
            call()
        assert error.value.kind == kind
        assert secret not in str(error.value) + error.value.hint and key_id not in str(error.value)
    assert store.requests.retries == 0
    begun.abort()
    store.close()


def test_without_credentials_it_says_where_they_come_from(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AuthError) as error:
        weed.store(prefix).create("a", b"x")
    assert error.value.kind == "store_credentials" and "chain of AWS" in error.value.hint


def test_credentials_of_a_file_and_profile(
    weed: Seaweed, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(f"[team]\naws_access_key_id = AKSNAPD\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert weed.store(prefix).create("a", b"x") is Created.OURS


def test_credentials_that_were_corrected_are_used_without_a_new_start(
    weed: Seaweed, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = weed.store(prefix)
    for secret in ("", "wrong-secret-1234"):
        if secret:
            file.write_text(f"[default]\naws_access_key_id = AKSNAPD\naws_secret_access_key = {secret}\n")
        with pytest.raises(AuthError) as error:
            store.create("a", b"x")
        assert error.value.kind == "store_credentials"
    file.write_text(f"[default]\naws_access_key_id = AKSNAPD\naws_secret_access_key = {SECRET_KEY}\n")
    assert store.create("a", b"x") is Created.OURS
    store.close()


# how it is reached


def test_a_certificate_of_an_own_authority(weed: Seaweed, prefix: str, tmp_path: Path) -> None:
    ca = weed.authority
    trusted = weed.store(prefix, endpoint=weed.tls_endpoint, ca=str(ca))
    data = secrets.token_bytes(PART_BYTES + 5)
    upload(trusted, "p", data)
    assert trusted.create("a", b"x") is Created.OURS
    assert trusted.create("a", b"y") is Created.ANOTHERS
    assert trusted.read("p", max_nbytes=len(data)) == data
    trusted.close()
    stranger = weed.store(prefix, endpoint=weed.tls_endpoint)
    with pytest.raises(UnavailableError) as error:
        stranger.create("a", b"x")
    assert error.value.kind == "store_tls" and "tier.ca" in error.value.hint
    assert stranger.requests.retries == 0
    wrong = weed.store(prefix, endpoint=weed.endpoint.replace("http:", "https:"))
    with pytest.raises(UnavailableError) as error:
        wrong.create("a", b"x")
    assert error.value.kind == "store_tls" and "tier.endpoint" in error.value.hint
    assert wrong.requests.retries == 0
    with pytest.raises(ConfigError) as missing:
        weed.store(prefix, endpoint=weed.tls_endpoint, ca=str(tmp_path / "none.pem")).create("a", b"x")
    assert missing.value.kind == "store"


def test_both_styles_of_urls(weed: Seaweed, prefix: str) -> None:
    """The virtual host needs a name that leads here; the path does not."""
    assert weed.store(prefix, path_style=True).create("a", b"x") is Created.OURS
    requests: S3Requests = weed.store(prefix, path_style=False, endpoint="http://s3.example:1")._requests
    url = requests._client(10).generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "a"})
    assert url.startswith(f"http://{BUCKET}.s3.example:1/a")


@pytest.mark.parametrize(("sse", "shown"), [("s3", "AES256"), ("kms", "aws:kms")])
def test_encryption_by_the_server(weed: Seaweed, prefix: str, sse: str, shown: str) -> None:
    store = weed.store(prefix, sse=sse, sse_kms_key="snapd-key" if sse == "kms" else "")
    data = secrets.token_bytes(PART_BYTES + 500)
    upload(store, "large", data)
    upload(store, "small", data[:9])
    assert store.create("record", b"x") is Created.OURS
    assert store.read("large", max_nbytes=len(data)) == data
    buffer = bytearray(100)
    store.read_into("large", PART_BYTES - 50, memoryview(buffer))
    assert buffer == data[PART_BYTES - 50 : PART_BYTES + 50]
    client = store._requests._client(10)
    for key in ("large", "small", "record"):
        head = client.head_object(Bucket=BUCKET, Key=f"{prefix}/{key}")
        assert head["ServerSideEncryption"] == shown
    store.close()


# clocks


@pytest.mark.parametrize(("minutes", "words"), [(20, "0:20:00 ahead of"), (-45, "0:45:00 behind")])
def test_a_clock_that_is_off_is_named_with_how_much(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch, minutes: int, words: str
) -> None:
    def now(remove_tzinfo: bool = True) -> datetime.datetime:
        found = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
        return found.replace(tzinfo=None) if remove_tzinfo else found

    for module in (botocore.auth, botocore.crt.auth):
        monkeypatch.setattr(module, "get_current_datetime", now)
    store = weed.store(prefix, wall_s=lambda: time.time() + 60 * minutes)
    with pytest.raises(ConfigError) as error:
        store.create("a", b"x")
    assert error.value.kind == "store_clock"
    assert _rounded(words) in str(error.value) or words in str(error.value)
    assert abs(store.now_s() - time.time()) < 3  # the store's own
    store.close()


def _rounded(words: str) -> str:
    """A second either way: the header has whole ones."""
    return words.replace("0:20:00", "0:20:01").replace("0:45:00", "0:44:59")


# answers that are lost


class Losing:
    """A client whose answers to some calls are lost, after the server has done what it was asked."""

    def __init__(self, client: Any, losses: dict[str, int]) -> None:
        self._client = client
        self._losses = losses

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)

        def call(**arguments: Any) -> Any:
            answer = real(**arguments)
            if self._losses.get(name, 0) > 0:
                self._losses[name] -= 1
                raise ConnectionClosedError(endpoint_url="http://lost")
            return answer

        return call if name in self._losses else real


def losing(store: S3Store, monkeypatch: pytest.MonkeyPatch, **losses: int) -> dict[str, int]:
    """From now on; how many are left to lose."""
    real = store._requests._client
    monkeypatch.setattr(store._requests, "_client", lambda left_s: Losing(real(left_s), losses))
    return losses


def test_a_creation_whose_answer_is_lost_is_ours(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    left = losing(store, monkeypatch, put_object=1)
    assert store.create("a", b"mine") is Created.OURS
    assert left == {"put_object": 0}
    assert store.requests.retries == 1
    left["put_object"] = 1
    assert store.create("a", b"another's") is Created.ANOTHERS
    left["put_object"] = 0
    assert store.read("a", max_nbytes=10) == b"mine"


def test_a_creation_that_is_never_answered_is_not_guessed(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = weed.store(prefix)
    losing(store, monkeypatch, put_object=10**6, get_object=10**6)
    with pytest.raises(UnavailableError) as error:
        store.create("a", b"mine", deadline_s=1)
    assert error.value.kind == "store_unreachable"
    assert weed.store(prefix).read("a", max_nbytes=10) == b"mine"
    store.close()


@pytest.mark.parametrize("size", [9, PART_BYTES + 9])
def test_an_upload_whose_last_answer_is_lost_is_there(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    data = secrets.token_bytes(size)
    left = losing(
        store,
        monkeypatch,
        put_object=1,
        complete_multipart_upload=1,
        upload_part=1,
        create_multipart_upload=1,
    )
    upload(store, "p", data)
    assert store.read("p", max_nbytes=size) == data
    assert left["put_object" if size == 9 else "complete_multipart_upload"] == 0
    # A beginning whose answer was lost has left an upload that nobody knows: a collector's work.
    assert len(list(store.unfinished())) == (0 if size == 9 else 1)
    for key, token, _ in list(store.unfinished()):
        store.abort_unfinished(key, token)


def test_a_deletion_whose_answer_is_lost_is_done(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("a", b"x")
    store.create("b", b"x")
    losing(store, monkeypatch, delete_object=1, delete_objects=1)
    store.delete(["a"])
    store.delete(["b", "a"])
    assert list(store.list("")) == []


# a server that stops, dies, comes back


def test_deadlines_are_kept_when_the_server_stops(weed: Seaweed, store: S3Store) -> None:
    store.create("a", bytes(20 * MIB))
    begun = store.upload("p")
    calls: list[Callable[[], object]] = [
        lambda: store.create("b", b"x", deadline_s=1.5),
        lambda: store.put("b", b"x", deadline_s=1.5),
        lambda: store.read("a", max_nbytes=30 * MIB, deadline_s=1.5),
        lambda: store.read_into("a", 0, memoryview(bytearray(20 * MIB)), deadline_s=1.5),
        lambda: store.head("a", deadline_s=1.5),
    ]

    def give_up(call: Callable[[], object]) -> tuple[str, float]:
        started = time.monotonic()
        with pytest.raises(UnavailableError) as error:
            call()
        return error.value.kind, time.monotonic() - started

    weed.hang()
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            outcomes = list(threads.map(give_up, calls))
        assert {kind for kind, _ in outcomes} <= {"store_slow", "store_unreachable"}
        slowest_s = max(seconds for _, seconds in outcomes)
        assert slowest_s < 8  # on a busy machine; the store's own deadline is 20 s
    finally:
        weed.go_on()
    assert store.create("c", b"x") is Created.OURS
    begun.abort()


def test_a_server_that_dies_and_comes_back_is_waited_for(weed: Seaweed, store: S3Store) -> None:
    data = secrets.token_bytes(3 * PART_BYTES)
    begun = store.upload("p")
    begun.write([data[:PART_BYTES]])
    weed.kill()
    started = time.monotonic()
    with pytest.raises(UnavailableError) as error:
        store.create("a", b"x", deadline_s=1)
    assert error.value.kind == "store_unreachable"
    assert time.monotonic() - started < 8
    back = threading.Timer(1.0, weed.start)
    back.start()
    begun.write([data[PART_BYTES:]])
    assert begun.commit() == len(data)
    back.join()
    assert store.read("p", max_nbytes=len(data)) == data
    assert store.requests.retries > 0


def test_an_upload_is_given_up_soon_while_the_server_hangs(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "_ABORT_WITHIN_S", 3.0)
    store = weed.store(prefix, stall_s=1, deadline_s=60, concurrency=2)
    begun = store.upload("p")
    begun.write([bytes(PART_BYTES + 1)])
    weed.hang()
    try:
        begun.write([bytes(PART_BYTES)])
        started = time.monotonic()
        begun.abort()
        assert time.monotonic() - started < 8  # not the store's own deadline of a minute
    finally:
        weed.go_on()
    for key, token, _ in list(store.unfinished()):  # what could not be aborted is found later
        store.abort_unfinished(key, token)
    store.close()
    for call in (
        lambda: store.create("a", b"x"),
        lambda: store.read_into("a", 0, memoryview(bytearray(20 * MIB))),
    ):
        with pytest.raises(UnavailableError) as error:
            call()
        assert "closed" in str(error.value)


# sizes


@pytest.mark.parametrize("nbytes", [0, 1, PART_BYTES, 64 * MIB, PARTS_MAX * PART_BYTES + 1, 5 * 1024**4])
def test_no_object_needs_more_parts_than_there_may_be(nbytes: int) -> None:
    size = part_nbytes(1, nbytes)
    assert size >= 8 * MIB and size % MIB == 0
    assert -(-nbytes // size) <= PARTS_MAX


def test_parts_of_an_unknown_size_grow() -> None:
    assert part_nbytes(1, None) == PART_BYTES
    assert sum(part_nbytes(number, None) for number in range(1, PARTS_MAX + 1)) > 5 * 1024**4


def test_an_upload_holds_a_few_parts_at_most(
    weed: Seaweed, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 * MIB
    monkeypatch.setattr(s3_upload, "PART_BYTES", part)
    store = weed.store(prefix, concurrency=2)
    piece = secrets.token_bytes(MIB)
    assert store.create("warm", b"") is Created.OURS
    begun = store.upload("p")
    tracemalloc.start()
    try:
        for _ in range(60):
            begun.write([piece])
        assert begun.commit() == 60 * MIB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert part < peak < 3 * part + 4 * MIB  # one being filled, two in flight; and what they send
    assert store.requests.count["part"] == 12
    store.close()


def test_keys_of_others_are_left_alone(weed: Seaweed, prefix: str, store: S3Store) -> None:
    client = store._requests._client(10)
    for key in (f"{prefix}/odd name", f"{prefix}/.hidden", f"{prefix}-beside/a", f"{prefix}x"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    store.create("ours", b"x")
    assert [info.key for info in store.list("")] == ["ours"]


def test_a_store_that_takes_wrong_checksums_is_told_of(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores them: the header never gets there."""
    real = store._requests._client

    class Ignoring(Losing):
        def __getattr__(self, name: str) -> Any:
            call = getattr(self._client, name)
            if name != "put_object":
                return call
            return lambda **given: call(
                **{k: v for k, v in given.items() if k not in ("ChecksumCRC32", "IfNoneMatch")}
            )

    monkeypatch.setattr(store._requests, "_client", lambda left_s: Ignoring(real(left_s), {}))
    probe = store.probe()
    assert (probe.refuses_existing, probe.keeps_checksums) == (False, False)
    assert len(probe.problems) == 2
    assert list(store.list("")) == []


def test_damage_on_the_way_is_tried_again_and_then_told(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store._requests._client
    sent: list[int] = []

    class Damaging(Losing):
        def put_object(self, **given: Any) -> Any:
            sent.append(1)
            if len(sent) <= limit:
                del given["ChecksumAlgorithm"]
                given["ChecksumCRC32"] = "AAAAAQ=="
            return self._client.put_object(**given)

    monkeypatch.setattr(store._requests, "_client", lambda left_s: Damaging(real(left_s), {}))
    limit = 1
    store.put("a", b"x")
    assert len(sent) == 2
    sent.clear()
    limit = 10
    with pytest.raises(IntegrityError) as error:
        store.put("b", b"x")
    assert error.value.kind == "store_bytes" and len(sent) == 3
    with pytest.raises(NotFoundError):
        store.head("b")


def test_no_error_is_of_another_kind(weed: Seaweed, prefix: str) -> None:
    with pytest.raises(SnapdError) as error:
        weed.store(prefix, endpoint="http://127.0.0.1:1").create("a", b"x", deadline_s=0.5)
    assert error.value.kind == "store_unreachable"
    assert "127.0.0.1:1" in str(error.value)
