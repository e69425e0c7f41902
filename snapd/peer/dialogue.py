"""What both ends of a connection do alike: whole frames, and the greeting."""

from __future__ import annotations

from snapd.peer.deadline import Deadline
from snapd.peer.framing import (
    HEADER_BYTES,
    FrameHeader,
    FrameKind,
    Hello,
    bad_frame,
    pack_frame,
    parse_header,
)
from snapd.peer.identity import Identity
from snapd.peer.limits import PeerLimits
from snapd.peer.stream import ByteStream


class FrameStream:
    """Frames over a byte stream; bodies go from and to the caller's views."""

    def __init__(self, stream: ByteStream, limits: PeerLimits) -> None:
        self.bytes = stream
        self._limits = limits
        self._header = memoryview(bytearray(HEADER_BYTES))

    def receive_header(self, deadline: Deadline, *allowed: FrameKind) -> FrameHeader:
        """Raise RemoteProtocolError for what is not a header, or not one of the `allowed` kinds."""
        self.bytes.receive_into(self._header, deadline)
        header = parse_header(bytes(self._header), body_bytes_max=self._limits.body_bytes_max)
        if header.kind not in allowed:
            raise bad_frame("a frame out of order", frame=header.kind.name)
        return header

    def receive_meta(self, header: FrameHeader, deadline: Deadline) -> bytes:
        meta = bytearray(header.meta_bytes)
        self.bytes.receive_into(memoryview(meta), deadline)
        return bytes(meta)

    def discard(self, nbytes: int, deadline: Deadline) -> None:
        """Receive a body that nobody wants, so that the next frame can be read."""
        scratch = memoryview(bytearray(min(nbytes, 64 << 10)))
        while nbytes:
            count = min(nbytes, len(scratch))
            self.bytes.receive_into(scratch[:count], deadline)
            nbytes -= count

    def send(
        self,
        kind: FrameKind,
        number: int,
        deadline: Deadline,
        *,
        meta: bytes = b"",
        body: memoryview | None = None,
    ) -> None:
        head = pack_frame(kind, number, meta, len(body) if body is not None else 0)
        self.bytes.send((head,) if body is None else (head, body), deadline)


def hello_of(identity: Identity, to: str, versions: tuple[int, int]) -> Hello:
    """`versions`: (oldest, newest) that we speak."""
    token = identity.token
    return Hello(
        node=identity.node,
        to=to,
        cluster_id=token.cluster_id,
        epoch=token.epoch,
        oldest=versions[0],
        newest=versions[1],
    )
