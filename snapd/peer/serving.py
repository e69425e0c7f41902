"""The serving end of a connection: admits the other, then answers its requests from a BulkStore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from snapd.errors import InternalError, RemoteProtocolError, SnapdError
from snapd.peer.base import Arrival, BulkStore
from snapd.peer.deadline import Deadline
from snapd.peer.dialogue import FrameStream, hello_of
from snapd.peer.framing import (
    PROTOCOL_NEWEST,
    PROTOCOL_OLDEST,
    FrameHeader,
    FrameKind,
    Hello,
    agreed_version,
    pack_error,
    pack_frame,
    pack_held,
    pack_hello,
    parse_fetch,
    parse_hello,
    parse_holds,
    parse_push,
)
from snapd.peer.identity import Admit, Identity, LogOnce, check_names
from snapd.peer.limits import PeerLimits
from snapd.peer.stream import ByteStream
from snapd.peer.traffic import TrafficMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What all connections of a node's server share."""

    store: BulkStore
    identity: Callable[[], Identity]
    admit: Admit
    clock: Callable[[], float]
    log_once: LogOnce
    limits: PeerLimits = field(default_factory=PeerLimits)
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    versions: tuple[int, int] = (PROTOCOL_OLDEST, PROTOCOL_NEWEST)


def serve_stream(stream: ByteStream, serving: Serving) -> None:
    """Serve until the other end goes, falls silent or misbehaves. Blocking; the caller closes the stream.

    What is refused is told to the other end, if it can be, and logged once.
    """
    try:
        _Conversation(stream, serving).run()
    except OSError:
        pass  # gone, or idle, or stalled: its own client knows, and connects again
    except SnapdError as error:
        log_refusal(serving.log_once, stream.peer, error)


def log_refusal(log_once: LogOnce, peer: str, error: SnapdError) -> None:
    """Once per machine and reason: a peer that is refused tries again and again."""
    host = peer.rpartition(":")[0] or peer
    log_once(f"peer.refused {host} {error.kind}", "peer.refused", peer=host, kind=error.kind, why=str(error))


Serve = Callable[[ByteStream, Serving], None]
"""`serve_stream`, or what a test puts in its place."""


class _Conversation:
    """One connection, on one thread."""

    def __init__(self, stream: ByteStream, serving: Serving) -> None:
        self._stream, self._serving = stream, serving
        self._frames = FrameStream(stream, serving.limits)
        self._counted = (0, 0)
        self._owed: list[tuple[int, Arrival]] = []  # pushes that are being recorded, and not yet answered

    def run(self) -> None:
        hello = self._greet()
        try:
            while True:
                is_full = len(self._owed) >= self._serving.limits.requests_ahead
                if self._owed and (is_full or not self._stream.has_more()):
                    self._answer_owed()
                self._count(hello.node)
                self._serve_request(hello)
        finally:
            self._count(hello.node)
            for _, arrival in self._owed:
                with contextlib.suppress(SnapdError):
                    arrival.wait()

    def _deadline(self, seconds: float) -> Deadline:
        return Deadline(self._serving.clock, seconds)

    def _greet(self) -> Hello:
        serving, deadline = self._serving, self._deadline(self._serving.limits.hello_s)
        header = self._frames.receive_header(deadline, FrameKind.HELLO)
        identity = serving.identity()
        try:
            hello = parse_hello(self._frames.receive_meta(header, deadline))
            agreed_version(serving.versions, hello)
            check_names(hello, identity.node, self._stream.names)
            serving.admit(hello, self._stream.names)
        except SnapdError as error:
            self._answer_error(header.number, error, deadline)
            raise
        ours = pack_hello(hello_of(identity, hello.node, serving.versions))
        self._frames.send(FrameKind.WELCOME, header.number, deadline, meta=ours)
        return hello

    def _serve_request(self, hello: Hello) -> None:
        idle = self._deadline(self._serving.limits.idle_s)
        header = self._frames.receive_header(idle, FrameKind.FETCH, FrameKind.PUSH, FrameKind.HOLDS)
        deadline = self._deadline(self._serving.limits.frame_s(header.body_bytes))
        meta = self._frames.receive_meta(header, deadline)
        try:
            # Again, because an epoch may have begun since the greeting.
            self._serving.admit(hello, self._stream.names)
        except SnapdError as error:
            self._answer_owed()
            self._answer_error(header.number, error, deadline)
            raise
        if header.kind is not FrameKind.PUSH:
            self._answer_owed()
        if header.kind is FrameKind.FETCH:
            self._answer_fetch(header, meta)
        elif header.kind is FrameKind.PUSH:
            self._answer_push(header, meta, deadline)
        else:
            self._answer_holds(header, deadline)

    def _answer_fetch(self, header: FrameHeader, meta: bytes) -> None:
        name, nbytes = parse_fetch(meta)
        deadline = self._deadline(self._serving.limits.frame_s(nbytes))
        is_sent = False
        try:
            with self._serving.store.read(name) as (view, digest):
                if len(view) != nbytes:
                    raise RemoteProtocolError(
                        "asked for another size", kind="size", nbytes=len(view), asked=nbytes
                    )
                self._frames.send(FrameKind.CHUNK, header.number, deadline, meta=digest, body=view)
                is_sent = True
        except SnapdError as error:
            if is_sent:
                raise
            self._answer_error(header.number, error, deadline)

    def _answer_push(self, header: FrameHeader, meta: bytes, deadline: Deadline) -> None:
        name, digest = parse_push(meta)
        is_received = False
        try:
            with self._serving.store.write(name, header.body_bytes, digest) as arrival:
                nbytes = len(arrival.view)
                if nbytes != header.body_bytes:
                    raise InternalError("room of another size", nbytes=nbytes, asked=header.body_bytes)
                self._stream.receive_into(arrival.view, deadline)
                is_received = True
        except SnapdError as error:
            if not is_received:
                self._frames.discard(header.body_bytes, deadline)
            self._answer_owed()
            self._answer_error(header.number, error, deadline)
            return
        self._owed.append((header.number, arrival))

    def _answer_owed(self) -> None:
        """In the order in which they came, in one piece: what was pushed is recorded."""
        if not self._owed:
            return
        answers: list[bytes] = []
        while self._owed:
            number, arrival = self._owed.pop(0)
            try:
                arrival.wait()
            except SnapdError as error:
                answers.append(pack_frame(FrameKind.ERROR, number, pack_error(error)))
            else:
                answers.append(pack_frame(FrameKind.STORED, number))
        self._stream.send((b"".join(answers),), self._deadline(self._serving.limits.stall_s))

    def _answer_holds(self, header: FrameHeader, deadline: Deadline) -> None:
        body = bytearray(header.body_bytes)
        self._stream.receive_into(memoryview(body), deadline)
        names = parse_holds(bytes(body))
        try:
            held = self._serving.store.holds(names)
        except SnapdError as error:
            self._answer_error(header.number, error, deadline)
            return
        self._frames.send(FrameKind.HELD, header.number, deadline, meta=pack_held(held))

    def _answer_error(self, number: int, error: SnapdError, deadline: Deadline) -> None:
        self._frames.send(FrameKind.ERROR, number, deadline, meta=pack_error(error))

    def _count(self, node: str) -> None:
        sent, received = self._stream.sent_bytes, self._stream.received_bytes
        self._serving.meter.add(node, sent - self._counted[0], received - self._counted[1])
        self._counted = (sent, received)
