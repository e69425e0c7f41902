"""Plain byte streams, where the kernel waits: whole in both directions, and no longer than the deadline says."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from snapd.peer import stream as module
from snapd.peer.deadline import Deadline
from snapd.peer.stream import PlainStream

BODY = hashlib.shake_128(b"body").digest(3 << 20)  # more than a socket takes at once
SHORT_S = 0.1


@pytest.fixture
def pair() -> Iterator[tuple[PlainStream, PlainStream]]:
    ours, theirs = (PlainStream(end, "peer") for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic, seconds)


def test_parts_arrive_whole_and_in_order_over_many_slices_of_time(
    pair: tuple[PlainStream, PlainStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_S", 0.01)
    ours, theirs = pair
    parts = (b"head", b"", memoryview(BODY), b"tail")
    sender = threading.Thread(target=ours.send, args=(parts, soon()))
    sender.start()
    sender.join(0.05)  # it waits in the middle
    assert sender.is_alive()
    room = memoryview(bytearray(4 + len(BODY) + 4))
    for start, stop in ((0, 4), (4, 100), (100, len(room))):
        theirs.receive_into(room[start:stop], soon())
    sender.join(10.0)
    assert bytes(room) == b"head" + BODY + b"tail"
    assert ours.sent_bytes == theirs.received_bytes == len(room)


def test_what_does_not_come_or_go_in_time_is_a_timeout(pair: tuple[PlainStream, PlainStream]) -> None:
    ours, theirs = pair
    ours.send((b"half",), soon())
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        theirs.receive_into(memoryview(bytearray(8)), soon(SHORT_S))
    with pytest.raises(TimeoutError):
        ours.send((BODY,), soon(SHORT_S))  # nobody receives it
    assert 2 * SHORT_S <= time.monotonic() - began < 5.0
    assert theirs.received_bytes == 4
    assert 0 < ours.sent_bytes < len(BODY)


def test_the_next_wait_has_its_own_deadline(pair: tuple[PlainStream, PlainStream]) -> None:
    ours, theirs = pair
    with pytest.raises(TimeoutError):
        theirs.receive_into(memoryview(bytearray(1)), soon(0.01))
    timer = threading.Timer(0.2, ours.send, ((b"late",), soon()))
    timer.start()
    room = bytearray(4)
    theirs.receive_into(memoryview(room), soon())
    timer.join(10.0)
    assert room == b"late"


def test_interrupt_ends_a_wait(pair: tuple[PlainStream, PlainStream]) -> None:
    _, theirs = pair
    timer = threading.Timer(0.05, theirs.interrupt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        theirs.receive_into(memoryview(bytearray(1)), soon())
    timer.join(10.0)
    assert time.monotonic() - began < 3.0
