"""The asking end of a connection: greets, then fetches and pushes. One thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snapd.errors import AuthError, FencedError, LocalProtocolError, RemoteProtocolError, SnapdError
from snapd.peer.base import HOLDS_MAX, FragmentName, Name, Pushed
from snapd.peer.deadline import Deadline
from snapd.peer.dialogue import FrameStream, hello_of
from snapd.peer.framing import (
    DIGEST_BYTES,
    PROTOCOL_NEWEST,
    PROTOCOL_OLDEST,
    FrameKind,
    agreed_version,
    bad_frame,
    pack_fetch,
    pack_frame,
    pack_hello,
    pack_holds,
    pack_push,
    parse_error,
    parse_held,
    parse_hello,
)
from snapd.peer.identity import Admit, Identity, check_certificate, check_cluster, check_names
from snapd.peer.limits import PeerLimits
from snapd.peer.rate import Pacer
from snapd.peer.stream import ByteStream
from snapd.peer.traffic import TrafficMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What all links of a node share."""

    identity: Callable[[], Identity]
    clock: Callable[[], float]
    admit: Admit | None = None
    """Judges the one who answers, beyond its name and cluster."""
    limits: PeerLimits = field(default_factory=PeerLimits)
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    versions: tuple[int, int] = (PROTOCOL_OLDEST, PROTOCOL_NEWEST)


class PeerConnection:
    """A stream to `node`. After an OSError or a RemoteProtocolError from itself it is broken: `is_usable` is false."""

    def __init__(self, node: str, stream: ByteStream, asking: Asking) -> None:
        self.stream = stream
        self.identity = asking.identity()
        self.is_greeted = False
        self.is_usable = True
        self.answered_count = 0
        self._node, self._asking = node, asking
        self._frames = FrameStream(stream, asking.limits)
        self._number = 0
        self._counted = (0, 0)

    def greet(self, deadline: Deadline) -> None:
        """The first frames.

        Raises:
            AuthError: we are refused, or it is not who it should be. FencedError: our epoch is old.
        """
        asking, identity = self._asking, self.identity
        check_certificate(self._node, self.stream.names)
        ours = pack_hello(hello_of(identity, self._node, asking.versions))
        self._frames.send(FrameKind.HELLO, 0, deadline, meta=ours)
        header = self._frames.receive_header(deadline, FrameKind.WELCOME, FrameKind.ERROR)
        meta = self._frames.receive_meta(header, deadline)
        if header.kind is FrameKind.ERROR:
            raise parse_error(meta, self._node)
        answer = parse_hello(meta)
        agreed_version(asking.versions, answer)
        check_names(answer, identity.node, self.stream.names)
        if answer.node != self._node:
            raise bad_frame("another node answers than was asked", node=self._node, answers=answer.node)
        check_cluster(answer, identity.token)
        if asking.admit is not None:
            asking.admit(answer, self.stream.names)
        self.is_greeted = True

    def fetch(
        self, wanted: Sequence[tuple[Name, memoryview]], deadline: Deadline, pacer: Pacer | None
    ) -> list[bytes]:
        """See `PeerLink.fetch`; OSError where the stream breaks. An item that the peer refuses breaks nothing:
        what was asked for already still arrives, then the first refusal is raised.
        """
        digests: list[bytes] = []
        refusal: SnapdError | None = None
        first, asked, answered = self._number, 0, 0
        try:
            while answered < asked or (asked < len(wanted) and refusal is None):
                if refusal is None:
                    asked += self._ask_ahead(wanted, asked, answered, deadline, pacer)
                result = self._receive_chunk(first + answered, wanted[answered][1], deadline)
                answered += 1
                if isinstance(result, bytes):
                    digests.append(result)
                else:
                    refusal = refusal or result
        except (OSError, RemoteProtocolError):
            self.is_usable = False
            raise
        finally:
            self._count()
        if refusal is not None:
            raise refusal
        return digests

    def push(
        self, pushed: Sequence[Pushed], deadline: Deadline, pacer: Pacer | None
    ) -> list[SnapdError | None]:
        """See `PeerLink.push`; OSError where the stream breaks."""
        refusals: list[SnapdError | None] = []
        first = self._number
        try:
            for sent, one in enumerate(pushed):
                if sent - len(refusals) >= self._asking.limits.requests_ahead:
                    refusals.append(self._receive_stored(first + len(refusals), deadline))
                if pacer is not None:
                    pacer.wait_take(len(one.data), deadline)
                meta = pack_push(one.name, one.digest)
                self._frames.send(FrameKind.PUSH, self._take_number(), deadline, meta=meta, body=one.data)
            while len(refusals) < len(pushed):
                refusals.append(self._receive_stored(first + len(refusals), deadline))
        except (OSError, RemoteProtocolError):
            self.is_usable = False
            raise
        finally:
            self._count()
        for refusal in refusals:
            if isinstance(refusal, AuthError | FencedError):
                raise refusal  # of us, not of the fragment
        return refusals

    def _receive_stored(self, number: int, deadline: Deadline) -> SnapdError | None:
        """None, or the peer's refusal."""
        header = self._frames.receive_header(deadline, FrameKind.STORED, FrameKind.ERROR)
        meta = self._frames.receive_meta(header, deadline)
        if header.number != number & 0xFFFFFFFF:
            raise bad_frame("an answer to another request")
        self.answered_count += 1
        return parse_error(meta, self._node) if header.kind is FrameKind.ERROR else None

    def holds(self, names: Sequence[FragmentName], deadline: Deadline) -> list[bool]:
        """See `PeerLink.holds`; OSError where the stream breaks."""
        if len(names) > HOLDS_MAX:
            raise LocalProtocolError("too many names at once", count=len(names), count_max=HOLDS_MAX)
        body = memoryview(pack_holds(names))
        meta = self._ask(FrameKind.HOLDS, FrameKind.HELD, b"", body, deadline)
        try:
            return parse_held(meta, len(names))
        except RemoteProtocolError:
            self.is_usable = False
            raise

    def _ask(
        self, kind: FrameKind, answer: FrameKind, meta: bytes, body: memoryview, deadline: Deadline
    ) -> bytes:
        """One request and its answer's meta; what the peer refuses it with is raised."""
        number = self._take_number()
        try:
            self._frames.send(kind, number, deadline, meta=meta, body=body)
            header = self._frames.receive_header(deadline, answer, FrameKind.ERROR)
            result = self._frames.receive_meta(header, deadline)
            if header.number != number:
                raise bad_frame("an answer to another request")
            refusal = parse_error(result, self._node) if header.kind is FrameKind.ERROR else None
        except (OSError, RemoteProtocolError):
            self.is_usable = False
            raise
        finally:
            self._count()
        self.answered_count += 1
        if refusal is not None:
            raise refusal
        return result

    def _ask_ahead(
        self,
        wanted: Sequence[tuple[Name, memoryview]],
        asked: int,
        answered: int,
        deadline: Deadline,
        pacer: Pacer | None,
    ) -> int:
        """Send as many requests as the window and the rate allow, at least one if none is under way."""
        frames: list[bytes] = []
        while asked + len(frames) < len(wanted):
            name, view = wanted[asked + len(frames)]
            under_way = asked + len(frames) - answered
            if under_way >= self._asking.limits.requests_ahead:
                break
            if pacer is not None and not pacer.try_take(len(view)):
                # What is under way is received first: the peer must not wait for our tokens in mid-transfer.
                if under_way:
                    break
                pacer.wait_take(len(view), deadline)
            frames.append(pack_frame(FrameKind.FETCH, self._take_number(), pack_fetch(name, len(view))))
        if frames:
            self.stream.send((b"".join(frames),), deadline)
        return len(frames)

    def _receive_chunk(self, number: int, view: memoryview, deadline: Deadline) -> bytes | SnapdError:
        """Its digest, or the peer's refusal."""
        header = self._frames.receive_header(deadline, FrameKind.CHUNK, FrameKind.ERROR)
        meta = self._frames.receive_meta(header, deadline)
        if header.number != number & 0xFFFFFFFF:
            raise bad_frame("an answer to another request")
        if header.kind is FrameKind.ERROR:
            self.answered_count += 1
            return parse_error(meta, self._node)
        if header.body_bytes != len(view) or len(meta) != DIGEST_BYTES:
            raise bad_frame("a chunk of another size", nbytes=header.body_bytes, asked=len(view))
        self.stream.receive_into(view, deadline)
        self.answered_count += 1
        return meta

    def _take_number(self) -> int:
        number = self._number
        self._number += 1
        return number & 0xFFFFFFFF

    def _count(self) -> None:
        sent, received = self.stream.sent_bytes, self.stream.received_bytes
        self._asking.meter.add(self._node, sent - self._counted[0], received - self._counted[1])
        self._counted = (sent, received)
