"""What every bulk transport keeps to: one suite, run over each of them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapd.core.cluster import Token
from snapd.errors import (
    AuthError,
    CapacityError,
    DeadlineExceeded,
    FencedError,
    IntegrityError,
    NotFoundError,
    RemoteProtocolError,
    SnapdError,
    UnavailableError,
)
from snapd.peer import framing
from snapd.peer.base import HOLDS_MAX, FragmentName, Name, Pushed
from snapd.peer.framing import FrameKind, pack_frame, pack_hello
from snapd.peer.identity import Identity
from snapd.peer.serving import Serving, serve_stream
from snapd.peer.stream import ByteStream
from tests.support.peer_scene import KINDS, LIMITS, Scene, chunk, digest_of, fragment, push, room
from tests.support.waiting import wait_for


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(request.param, tmp_path)
    yield scene
    scene.close()


def fetched(scene: Scene, names: list[Name], sizes: list[int], timeout_s: float = 5) -> list[bytes]:
    """Fetch and check digests; the bytes."""
    views = [room(size) for size in sizes]
    digests = scene.links.to("b").fetch(list(zip(names, views, strict=True)), timeout_s=timeout_s)
    assert digests == [digest_of(view) for view in views]
    return [bytes(view) for view in views]


def greet(scene: Scene, stream: ByteStream) -> None:
    """Say hello as node `a` and read the answer."""
    hello = framing.Hello(node="a", to="b", cluster_id="cluster-1", epoch=5)
    stream.send((pack_frame(FrameKind.HELLO, 0, pack_hello(hello)),), scene.deadline())
    header = bytearray(framing.HEADER_BYTES)
    stream.receive_into(memoryview(header), scene.deadline())
    parsed = framing.parse_header(header, body_bytes_max=0)
    assert parsed.kind is FrameKind.WELCOME
    stream.receive_into(room(parsed.meta_bytes), scene.deadline())


def answer_with(
    scene: Scene, frames: Callable[[int], tuple[bytes, ...]], *, then_stall: bool = False
) -> threading.Event:
    """From now on the server greets as ever, but answers the first request of each connection with `frames`."""
    release = threading.Event()

    def serve(stream: ByteStream, serving: Serving) -> None:
        deadline = scene.deadline(10)

        def receive() -> framing.FrameHeader:
            raw = bytearray(framing.HEADER_BYTES)
            stream.receive_into(memoryview(raw), deadline)
            header = framing.parse_header(raw, body_bytes_max=1 << 30)
            stream.receive_into(room(header.meta_bytes), deadline)
            return header

        try:
            receive()
            ours = framing.Hello(node="b", to="a", cluster_id="cluster-1", epoch=5)
            stream.send((pack_frame(FrameKind.WELCOME, 0, pack_hello(ours)),), deadline)
            stream.send(frames(receive().number), deadline)
            if then_stall:
                release.wait(10)
        except OSError:
            pass

    scene.server.serve = serve
    return release


def behave(scene: Scene) -> None:
    scene.server.serve = serve_stream


def test_chunks_and_fragments_are_fetched(scene: Scene) -> None:
    contents: dict[Name, bytes] = {chunk(i): os.urandom(1000 * i + 1) for i in range(40)}
    contents[fragment(1)] = os.urandom(5 << 20)
    contents[chunk(7, "größer")] = b"x"
    for name, data in contents.items():
        scene.server.store.put(name, data)
    got = fetched(scene, list(contents), [len(data) for data in contents.values()])
    assert got == list(contents.values())
    assert fetched(scene, [], []) == []


def test_fragments_are_pushed(scene: Scene) -> None:
    for number, nbytes in enumerate((0, 1, 70_000, 5 << 20)):
        data = os.urandom(nbytes)
        push(scene.links.to("b"), fragment(number), memoryview(data), digest_of(data), timeout_s=5)
        assert scene.server.store.items[fragment(number)] == data
    assert scene.server.store.open_writes == 0


def test_what_a_peer_holds_is_asked_in_batches(scene: Scene) -> None:
    link = scene.links.to("b")
    scene.server.store.put(fragment(1), b"x")
    names = [fragment(n % 200, bytes([n // 200]) * 32) for n in range(HOLDS_MAX - 1)]
    scene.server.store.put(names[300], b"y")
    held = link.holds([*names, fragment(1)], timeout_s=5)
    assert [i for i, is_held in enumerate(held) if is_held] == [300, HOLDS_MAX - 1]
    assert link.holds([], timeout_s=5) == []
    scene.server.store.unplanned.add(b"r" * 32)
    with pytest.raises(UnavailableError) as caught:
        link.holds([fragment(1)], timeout_s=5)
    assert caught.value.kind == "not_planned"
    with pytest.raises(UnavailableError, match="not_planned"):
        push(link, fragment(1), memoryview(b"x"), digest_of(b"x"), timeout_s=5)


def test_many_threads_at_once(scene: Scene) -> None:
    data = {chunk(i): os.urandom(200_000 + i) for i in range(20)}
    for name, content in data.items():
        scene.server.store.put(name, content)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                assert fetched(scene, list(data), [len(d) for d in data.values()], 20) == list(data.values())
                mine = os.urandom(100_000)
                name = fragment(turn, bytes([number]) * 16)
                push(scene.links.to("b"), name, memoryview(mine), digest_of(mine), timeout_s=20)
                assert scene.server.store.items[name] == mine
        except (AssertionError, SnapdError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[n]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_what_is_not_there_is_named_and_the_rest_arrives(scene: Scene) -> None:
    for index in (0, 1, 3):
        scene.server.store.put(chunk(index), bytes([index]) * 100)
    views = [room(100) for _ in range(4)]
    with pytest.raises(NotFoundError, match="b answers: no such chunk") as caught:
        scene.links.to("b").fetch([(chunk(i), views[i]) for i in range(4)], timeout_s=5)
    assert caught.value.kind == "chunk"
    assert [bytes(views[i]) for i in (0, 1, 3)] == [bytes([i]) * 100 for i in (0, 1, 3)]
    with pytest.raises(NotFoundError, match="fragment"):
        scene.links.to("b").fetch([(fragment(0), room(1))], timeout_s=5)
    assert fetched(scene, [chunk(1)], [100]) == [b"\x01" * 100]


def test_another_size_is_refused(scene: Scene) -> None:
    scene.server.store.put(chunk(0), bytes(100))
    for nbytes in (99, 101):
        with pytest.raises(RemoteProtocolError, match="another size"):
            fetched(scene, [chunk(0)], [nbytes])
    assert fetched(scene, [chunk(0)], [100]) == [bytes(100)]


def test_pushed_bytes_that_are_not_their_digest_are_refused(scene: Scene) -> None:
    link = scene.links.to("b")
    with pytest.raises(IntegrityError) as caught:
        push(link, fragment(0), memoryview(b"abc"), digest_of(b"abd"), timeout_s=5)
    assert caught.value.kind == "digest"
    assert fragment(0) not in scene.server.store.items
    push(link, fragment(0), memoryview(b"abc"), digest_of(b"abc"), timeout_s=5)


def test_no_room_is_said_and_the_link_goes_on(scene: Scene) -> None:
    scene.server.store.capacity_bytes = 1 << 20
    link = scene.links.to("b")
    big = bytes(3 << 20)
    with pytest.raises(CapacityError, match="no room for parity"):
        push(link, fragment(0), memoryview(big), digest_of(big), timeout_s=5)
    push(link, fragment(0), memoryview(b"abc"), digest_of(b"abc"), timeout_s=5)


def test_an_answer_of_another_size_is_a_protocol_error(scene: Scene) -> None:
    answer_with(scene, lambda number: (pack_frame(FrameKind.CHUNK, number, bytes(16), 5), b"12345"))
    with pytest.raises(RemoteProtocolError, match="another size"):
        fetched(scene, [chunk(0)], [6])
    answer_with(scene, lambda number: (pack_frame(FrameKind.CHUNK, number + 1, bytes(16), 6), b"123456"))
    with pytest.raises(RemoteProtocolError, match="another request"):
        fetched(scene, [chunk(0)], [6])
    answer_with(scene, lambda number: (pack_frame(FrameKind.HELD, number, b"\x02"),))
    with pytest.raises(RemoteProtocolError, match="count of answers"):
        scene.links.to("b").holds([fragment(0)], timeout_s=5)


@pytest.mark.parametrize(
    "answer",
    [
        pack_frame(FrameKind.CHUNK, 0, bytes(16), LIMITS.body_bytes_max + 1),
        framing.HEADER.pack(framing.MAGIC, framing.LAYOUT, FrameKind.CHUNK, 0, 0, 0xFFFFFFFF, 1),
        framing.HEADER.pack(framing.MAGIC, framing.LAYOUT, 77, 0, 0, 0, 0),
        framing.HEADER.pack(framing.MAGIC, 9, FrameKind.CHUNK, 0, 0, 0, 0),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        pack_frame(FrameKind.ERROR, 0, b"\xff\xff\xff"),
        pack_frame(FrameKind.FETCH, 0),
    ],
    ids=["body", "meta", "kind", "layout", "garbage", "truncated", "order"],
)
def test_malformed_answers_are_protocol_errors(scene: Scene, answer: bytes) -> None:
    answer_with(scene, lambda number: (answer,))
    with pytest.raises(RemoteProtocolError) as caught:
        fetched(scene, [chunk(0)], [6])
    assert caught.value.kind == "frame"
    behave(scene)
    scene.server.store.put(chunk(0), b"123456")
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]


@pytest.mark.parametrize(
    "request_frame",
    [
        pack_frame(FrameKind.PUSH, 0, bytes(20), LIMITS.body_bytes_max + 1),
        framing.HEADER.pack(framing.MAGIC, framing.LAYOUT, FrameKind.FETCH, 0, 0, 5000, 0),
        pack_frame(FrameKind.FETCH, 0, b"", 8),
        pack_frame(FrameKind.FETCH, 0, b"short"),
        pack_frame(FrameKind.HOLDS, 0, b"", 4) + b"\xff\xff\xff\xff",
        pack_frame(FrameKind.WELCOME, 0),
        bytes(1000),
    ],
    ids=["push body", "meta", "fetch body", "name", "holds count", "order", "garbage"],
)
def test_malformed_requests_end_the_connection_and_nothing_else(scene: Scene, request_frame: bytes) -> None:
    scene.server.store.put(chunk(0), b"123456")
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]
    stream = scene.raw()
    greet(scene, stream)
    stream.send((request_frame,), scene.deadline())
    with pytest.raises(OSError):
        stream.receive_into(room(1), scene.deadline())
    stream.close()
    wait_for(lambda: scene.server.log.kinds() == ["frame"])
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]


def test_garbage_before_the_greeting_is_refused(scene: Scene) -> None:
    for _ in range(2):
        stream = scene.raw()
        stream.send((b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",), scene.deadline())
        with pytest.raises(OSError):
            stream.receive_into(room(1), scene.deadline())
        stream.close()
    wait_for(lambda: scene.server.log.kinds() == ["frame"])


def test_a_peer_that_stalls_in_mid_transfer_ends_at_the_deadline(scene: Scene) -> None:
    half = (pack_frame(FrameKind.CHUNK, 0, bytes(16), 100_000) + bytes(50_000),)
    release = answer_with(scene, lambda number: half, then_stall=True)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        fetched(scene, [chunk(0)], [100_000], timeout_s=0.4)
    assert 0.3 < time.monotonic() - began < 10
    behave(scene)
    scene.server.store.put(chunk(0), bytes(100_000))
    assert fetched(scene, [chunk(0)], [100_000]) == [bytes(100_000)]
    release.set()


def test_a_pusher_that_stalls_gives_its_room_back(scene: Scene) -> None:
    scene.server.stop()
    scene.server.serving = replace(
        scene.server.serving, limits=replace(LIMITS, stall_s=0.3, bytes_per_s_min=1e9)
    )
    scene.server.start()
    stream = scene.raw()
    greet(scene, stream)
    push = pack_frame(FrameKind.PUSH, 0, framing.pack_push(fragment(0), bytes(16)), 100_000)
    stream.send((push, bytes(50_000)), scene.deadline())
    wait_for(lambda: scene.server.store.open_writes == 1)
    assert scene.server.store.freed.wait(5)
    assert scene.server.store.open_writes == 0
    assert fragment(0) not in scene.server.store.items
    stream.close()


def test_a_peer_that_goes_in_mid_transfer_is_unavailable(scene: Scene) -> None:
    half = (pack_frame(FrameKind.CHUNK, 0, bytes(16), 100_000) + bytes(50_000),)
    answer_with(scene, lambda number: half)
    with pytest.raises(UnavailableError) as caught:
        fetched(scene, [chunk(0)], [100_000])
    assert caught.value.kind == "peer_away"
    behave(scene)
    stream = scene.raw()
    greet(scene, stream)
    push = pack_frame(FrameKind.PUSH, 0, framing.pack_push(fragment(0), bytes(16)), 100_000)
    stream.send((push, bytes(50_000)), scene.deadline())
    wait_for(lambda: scene.server.store.open_writes == 1)
    stream.close()
    assert scene.server.store.freed.wait(5)
    assert fragment(0) not in scene.server.store.items


def test_links_outlive_a_restart_of_the_peer(scene: Scene) -> None:
    scene.server.store.put(chunk(0), b"123456")
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]
    scene.server.stop()
    scene.server.start()
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]  # at once, without an error
    scene.server.stop()
    with pytest.raises(UnavailableError) as caught:
        fetched(scene, [chunk(0)], [6])
    assert caught.value.kind == "peer_away"
    scene.server.start()

    def is_back() -> bool:
        try:
            return fetched(scene, [chunk(0)], [6]) == [b"123456"]
        except UnavailableError:
            return False

    wait_for(is_back)


def test_links_follow_the_address(scene: Scene) -> None:
    scene.server.store.put(chunk(0), b"123456")
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]
    scene.server.stop()
    scene.server.port = 0
    scene.server.start()
    scene.addresses["b"] = f"127.0.0.1:{scene.server.port}"
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]
    del scene.addresses["b"]
    with pytest.raises(UnavailableError) as caught:
        fetched(scene, [chunk(0)], [6])
    assert caught.value.kind == "peer_unknown"


def test_an_address_where_nobody_is_fails_soon_and_is_not_hammered(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        scene.addresses["b"] = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(UnavailableError):
            fetched(scene, [chunk(0)], [6])
    assert time.monotonic() - began < 20  # not the time limit, over and over


def test_the_rate_is_kept_to_and_can_be_changed(scene: Scene) -> None:
    contents = {chunk(i): bytes(100_000) for i in range(20)}
    for name, data in contents.items():
        scene.server.store.put(name, data)
    wanted = [(name, room(100_000)) for name in contents]
    scene.pacer.set_rate(2_000_000, 100_000)
    link = scene.links.paced.to("b")
    began = time.monotonic()
    link.fetch(wanted, timeout_s=10)
    push(link, fragment(0), memoryview(bytes(100_000)), digest_of(bytes(100_000)), timeout_s=10)
    took = time.monotonic() - began
    assert 0.9 < took < 8  # 2.1 MB less burst and last transfer
    scene.pacer.set_rate(1000, 1000)
    scene.links.to("b").fetch(wanted, timeout_s=10)  # restores do not wait for tokens: half an hour
    with pytest.raises(DeadlineExceeded):
        link.fetch(wanted, timeout_s=0.3)
    opener = threading.Timer(0.2, lambda: scene.pacer.set_rate(None))
    opener.start()
    assert len(link.fetch(wanted, timeout_s=5)) == 20
    opener.join()


def test_who_waits_for_tokens_does_not_hold_up_a_restore(scene: Scene) -> None:
    scene.server.store.put(chunk(0), bytes(100_000))
    scene.pacer.set_rate(1, 1)
    paced = scene.links.paced.to("b")
    paced.fetch([(chunk(0), room(100_000))], timeout_s=5)  # on credit; the next would wait a day
    refused: list[SnapdError] = []

    def wait_in_vain() -> None:
        with pytest.raises(DeadlineExceeded) as caught:
            paced.fetch([(chunk(0), room(100_000))], timeout_s=3)
        refused.append(caught.value)

    threads = [threading.Thread(target=wait_in_vain) for _ in range(LIMITS.connections_per_peer + 1)]
    for thread in threads:
        thread.start()
    assert fetched(scene, [chunk(0)], [100_000]) == [bytes(100_000)]
    assert not refused, "it waited until the others gave up"
    for thread in threads:
        thread.join()
    assert len(refused) == len(threads)


def test_another_cluster_is_refused(scene: Scene) -> None:
    scene.identity = Identity("a", Token("cluster-2", 5))
    with pytest.raises(AuthError, match="another cluster") as caught:
        fetched(scene, [chunk(0)], [6])
    assert caught.value.kind == "cluster"
    wait_for(lambda: scene.server.log.kinds() == ["cluster"])
    scene.server.store.put(chunk(0), b"123456")
    scene.identity = Identity("a", Token("cluster-1", 5))
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]  # without the pause after a failure


def test_an_older_epoch_is_refused_until_it_is_made_good(scene: Scene) -> None:
    scene.server.store.put(chunk(0), b"123456")
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]
    scene.server.identity = Identity("b", Token("cluster-1", 6))
    with pytest.raises(FencedError, match="older epoch") as caught:
        fetched(scene, [chunk(0)], [6])  # on a connection that was admitted under the old one
    assert caught.value.kind == "stale_epoch"
    wait_for(lambda: scene.server.log.kinds() == ["stale_epoch"])
    scene.identity = Identity("a", Token("cluster-1", 6))
    assert fetched(scene, [chunk(0)], [6]) == [b"123456"]


def test_a_server_that_is_somebody_else_is_refused(scene: Scene) -> None:
    scene.addresses["c"] = scene.addresses["b"]
    with pytest.raises(AuthError) as caught:
        scene.links.to("c").fetch([(chunk(0), room(6))], timeout_s=5)
    assert caught.value.kind == "peer_name"


def test_neighbouring_versions_work_together_and_others_do_not(scene: Scene) -> None:
    scene.server.store.put(chunk(0), b"123456")
    newer = scene.links_with(replace(scene.asking, versions=(1, 2)))
    assert newer.to("b").fetch([(chunk(0), room(6))], timeout_s=5) == [digest_of(b"123456")]
    much_newer = scene.links_with(replace(scene.asking, versions=(2, 3)))
    with pytest.raises(RemoteProtocolError, match="no protocol version in common") as caught:
        much_newer.to("b").fetch([(chunk(0), room(6))], timeout_s=5)
    assert caught.value.kind == "protocol_version"


def test_bytes_are_counted_at_both_ends(scene: Scene) -> None:
    scene.server.store.put(chunk(0), bytes(1_000_000))
    fetched(scene, [chunk(0)], [1_000_000])
    data = bytes(500_000)
    push(scene.links.to("b"), fragment(0), memoryview(data), digest_of(data), timeout_s=5)
    at_a = scene.asking.meter.by_node()["b"]
    assert 1_000_000 < at_a.received_bytes < 1_001_000
    assert 500_000 < at_a.sent_bytes < 501_000
    at_b = scene.server.serving.meter
    wait_for(lambda: at_b.total().sent_bytes == at_a.received_bytes)
    assert at_b.by_node()["a"].received_bytes == at_a.sent_bytes


def test_closed_links_say_so(scene: Scene) -> None:
    link = scene.links.to("b")
    scene.links.close()
    with pytest.raises(UnavailableError) as caught:
        push(link, fragment(0), memoryview(b""), digest_of(b""), timeout_s=5)
    assert caught.value.kind == "closed"
    with pytest.raises(UnavailableError):
        scene.links.to("b")


def test_closing_ends_a_call_that_waits(scene: Scene) -> None:
    half = (pack_frame(FrameKind.CHUNK, 0, bytes(16), 100_000) + bytes(50_000),)
    release = answer_with(scene, lambda number: half, then_stall=True)
    closer = threading.Timer(0.2, scene.links.close)
    closer.start()
    with pytest.raises(UnavailableError):
        fetched(scene, [chunk(0)], [100_000], timeout_s=10)
    closer.join()
    release.set()


def test_names_of_fragments_may_be_long(scene: Scene) -> None:
    name = FragmentName("j" * 128, b"\x07" * 255, 7)
    scene.server.store.put(name, b"x")
    assert fetched(scene, [name], [1]) == [b"x"]
    assert scene.links.to("b").holds([name], timeout_s=5) == [True]


def test_many_fragments_go_in_one_call_and_each_gets_its_own_answer(scene: Scene) -> None:
    data, wrong = [bytes([number]) * (1000 + number) for number in range(40)], {7, 31}
    said = [digest_of(b"other" if number in wrong else part) for number, part in enumerate(data)]
    pushed = [Pushed(fragment(i), memoryview(part), said[i]) for i, part in enumerate(data)]
    refusals = scene.links.to("b").push(pushed, timeout_s=10)
    assert [i for i, refusal in enumerate(refusals) if isinstance(refusal, IntegrityError)] == sorted(wrong)
    assert sum(refusal is None for refusal in refusals) == 38
    stored = [scene.server.store.items.get(fragment(i)) for i in range(40)]
    assert stored == [None if i in wrong else part for i, part in enumerate(data)]
