"""The script of a faulty store: each fault strikes where and as often as it says, before or after the effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapd.errors import CapacityError, IntegrityError, UnavailableError
from snapd.store.base import Created
from snapd.store.faulty import Effect, Fault, FaultyStore
from tests.support.stores import directory_store


def faulty(tmp_path: Path, *faults: Fault) -> FaultyStore:
    return FaultyStore(directory_store(tmp_path / "root"), faults)


def test_a_refusal_happens_before_the_effect_and_a_lost_answer_after(tmp_path: Path) -> None:
    store = faulty(tmp_path, Fault("create", Effect.REFUSE), Fault("create", Effect.LOSE_ANSWER))
    with pytest.raises(UnavailableError):
        store.create("a", b"x")
    assert list(store.list("")) == []
    with pytest.raises(UnavailableError):
        store.create("a", b"x")
    assert store.read("a", max_nbytes=1) == b"x"
    assert store.create("a", b"x") is Created.OURS
    assert store.struck == [("create", "a", Effect.REFUSE), ("create", "a", Effect.LOSE_ANSWER)]


def test_faults_count_calls_and_know_prefixes(tmp_path: Path) -> None:
    store = faulty(tmp_path, Fault("put", Effect.FILL, prefix="b", skip=1, times=2))
    store.put("a", b"x")
    store.put("b1", b"x")
    for key in ("b2", "b3"):
        with pytest.raises(CapacityError):
            store.put(key, b"x")
    store.put("b4", b"x")
    assert sorted(info.key for info in store.list("")) == ["a", "b1", "b4"]


def test_a_fault_for_ever(tmp_path: Path) -> None:
    store = faulty(tmp_path, Fault("head", Effect.THROTTLE, times=-1))
    store.put("a", b"x")
    for _ in range(5):
        with pytest.raises(UnavailableError) as error:
            store.head("a")
        assert error.value.kind == "store_throttled"
    store.play([])
    assert store.head("a").nbytes == 1


def test_bytes_are_flipped_and_cut(tmp_path: Path) -> None:
    store = faulty(tmp_path, *(Fault(call, Effect.FLIP) for call in ("read", "read_into")))
    store.put("a", b"0123456789")
    assert store.read("a", max_nbytes=10) == b"0123446789"
    buffer = bytearray(10)
    store.read_into("a", 0, memoryview(buffer))
    assert buffer == b"0123446789"
    store.play([Fault("read", Effect.SHORT), Fault("read_into", Effect.SHORT)])
    assert store.read("a", max_nbytes=10) == b"01234"
    with pytest.raises(IntegrityError):
        store.read_into("a", 0, memoryview(buffer))


def test_uploads(tmp_path: Path) -> None:
    store = faulty(
        tmp_path,
        Fault("write", Effect.FILL, skip=1),
        Fault("commit", Effect.LOSE_ANSWER),
        Fault("abort", Effect.REFUSE),
    )
    upload = store.upload("p")
    upload.write([b"x"])
    with pytest.raises(CapacityError):
        upload.write([b"y"])
    upload.abort()
    assert [key for key, _, _ in store.unfinished()] == ["p"]
    again = store.upload("p")
    again.write([b"z"])
    with pytest.raises(UnavailableError):
        again.commit()
    assert store.read("p", max_nbytes=1) == b"z"


def test_stalls_are_the_test_s_own(tmp_path: Path) -> None:
    stalled: list[int] = []
    inner = directory_store(tmp_path / "root")
    store = FaultyStore(inner, [Fault("delete", Effect.STALL, skip=1)], stall=lambda: stalled.append(1))
    store.put("a", b"x")
    store.put("b", b"x")
    store.delete(["a", "b"])
    assert stalled == [1] and list(store.list("")) == []
