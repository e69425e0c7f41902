"""The frames that daemons exchange for bulk bytes: the same on the side channel and inside gRPC messages.

    header, 24 bytes, big-endian: magic (4), layout (1), kind (1), zero (2), request number (4), bytes of meta (4),
                                  bytes of body (8)
    meta                          at most META_BYTES_MAX: names, digests, what went wrong
    body                          the bytes of a chunk or fragment, of CHUNK and PUSH only; the names of HOLDS

A connection begins with HELLO and WELCOME. Then each FETCH is answered by CHUNK, each PUSH by STORED, each HOLDS by
HELD, and any of them by ERROR, in the order in which they were asked; requests may be sent before earlier ones are
answered.

Every length is checked here, against a bound, before anything of that length is read. Pure: no sockets, no clock.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from snapd.errors import RemoteProtocolError, SnapdError
from snapd.errors import all_error_classes as _all_error_classes
from snapd.peer.base import HOLDS_MAX, ChunkName, FragmentName, Name

MAGIC = b"snpB"
LAYOUT = 1
PROTOCOL_NEWEST = 1
PROTOCOL_OLDEST = 1
DIGEST_BYTES = 16
META_BYTES_MAX = 4096
HEADER = struct.Struct("!4sBBHIIQ")
HEADER_BYTES = HEADER.size

HOLDS_BYTES_MAX = 1 << 20
_TEXT_BYTES_MAX = 512
_CHUNK, _FRAGMENT = 1, 2
_KIND_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,39}")
# What a peer may make us raise. Its own bugs and settings are its own matter: they arrive as RemoteProtocolError.
_RAISABLE = (
    "AuthError",
    "CapacityError",
    "FencedError",
    "IntegrityError",
    "JobUnusable",
    "NotFoundError",
    "RemoteProtocolError",
    "UnavailableError",
)
_CLASSES = {cls.__name__: cls for cls in _all_error_classes() if cls.__name__ in _RAISABLE}


class FrameKind(enum.IntEnum):
    """Numbers on the wire: append-only."""

    HELLO = 1
    WELCOME = 2
    FETCH = 3
    CHUNK = 4
    PUSH = 5
    STORED = 6
    ERROR = 7
    HOLDS = 8
    HELD = 9


_WITH_BODY = (FrameKind.CHUNK, FrameKind.PUSH)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What follows it, in bytes; `number` is the request's."""

    kind: FrameKind
    number: int
    meta_bytes: int
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who speaks, to whom, under which token, and the protocol versions that it speaks."""

    node: str
    to: str
    cluster_id: str
    epoch: int
    newest: int = PROTOCOL_NEWEST
    oldest: int = PROTOCOL_OLDEST


def bad_frame(message: str, **context: str | int) -> RemoteProtocolError:
    """What the other end must not send; the connection cannot be used any more."""
    error = RemoteProtocolError(message, kind="frame")
    error.context.update(context)
    return error


def pack_frame(kind: FrameKind, number: int, meta: bytes = b"", body_bytes: int = 0) -> bytes:
    """Header and meta; the body, if any, follows."""
    return HEADER.pack(MAGIC, LAYOUT, kind, 0, number, len(meta), body_bytes) + meta


def parse_header(raw: bytes | bytearray, *, body_bytes_max: int) -> FrameHeader:
    """Raise RemoteProtocolError (kind `frame`) for anything that is not a header within its bounds."""
    magic, layout, kind_number, zero, number, meta_bytes, body_bytes = HEADER.unpack(raw)
    if magic != MAGIC:
        raise bad_frame("these bytes are not snapd's")
    if layout != LAYOUT or zero != 0:
        raise bad_frame("unknown layout of frames", layout=layout)
    try:
        kind = FrameKind(kind_number)
    except ValueError:
        raise bad_frame("unknown kind of frame", number=kind_number) from None
    if meta_bytes > META_BYTES_MAX:
        raise bad_frame("oversized frame", meta_bytes=meta_bytes, meta_bytes_max=META_BYTES_MAX)
    bound = body_bytes_max if kind in _WITH_BODY else HOLDS_BYTES_MAX if kind is FrameKind.HOLDS else 0
    if body_bytes > bound:
        raise bad_frame("oversized frame", body_bytes=body_bytes, body_bytes_max=bound)
    return FrameHeader(kind, number, meta_bytes, body_bytes)


def pack_hello(hello: Hello) -> bytes:
    """Later versions append fields; readers leave what they do not know."""
    texts = b"".join(_pack_text(text) for text in (hello.node, hello.to, hello.cluster_id))
    return struct.pack("!HHQ", hello.newest, hello.oldest, hello.epoch) + texts


def parse_hello(meta: bytes) -> Hello:
    cursor = _Cursor(meta)
    newest, oldest, epoch = cursor.unpack("!HHQ")
    node, to, cluster_id = cursor.text(), cursor.text(), cursor.text()
    return Hello(node=node, to=to, cluster_id=cluster_id, epoch=epoch, newest=newest, oldest=oldest)


def agreed_version(ours: tuple[int, int], hello: Hello) -> int:
    """The newest version that both speak; `ours` is (oldest, newest).

    Raises:
        RemoteProtocolError: kind `protocol_version`: there is none.
    """
    version = min(ours[1], hello.newest)
    if version < max(ours[0], hello.oldest):
        raise RemoteProtocolError(
            "no protocol version in common",
            kind="protocol_version",
            hint="neighbouring versions of snapd work together, others do not",
            node=hello.node[:64],
            ours=f"{ours[0]}-{ours[1]}",
            theirs=f"{hello.oldest}-{hello.newest}",
        )
    return version


def pack_fetch(name: Name, nbytes: int) -> bytes:
    return struct.pack("!Q", nbytes) + _pack_name(name)


def parse_fetch(meta: bytes) -> tuple[Name, int]:
    cursor = _Cursor(meta)
    (nbytes,) = cursor.unpack("!Q")
    name = _parse_name(cursor)
    cursor.end()
    return name, nbytes


def pack_push(name: FragmentName, digest: bytes) -> bytes:
    return digest + _pack_name(name)


def parse_push(meta: bytes) -> tuple[FragmentName, bytes]:
    cursor = _Cursor(meta)
    digest = cursor.take(DIGEST_BYTES)
    name = _parse_name(cursor)
    cursor.end()
    if not isinstance(name, FragmentName):
        raise bad_frame("only parity is pushed")
    return name, digest


def pack_holds(names: Sequence[FragmentName]) -> bytes:
    return struct.pack("!I", len(names)) + b"".join(map(_pack_name, names))


def parse_holds(body: bytes) -> list[FragmentName]:
    cursor = _Cursor(body)
    (count,) = cursor.unpack("!I")
    if count > HOLDS_MAX:
        raise bad_frame("too many names", count=count, count_max=HOLDS_MAX)
    names = [_parse_name(cursor) for _ in range(count)]
    cursor.end()
    fragments = [name for name in names if isinstance(name, FragmentName)]
    if len(fragments) != count:
        raise bad_frame("only parity is asked about")
    return fragments


def pack_held(held: Sequence[bool]) -> bytes:
    return bytes(held)


def parse_held(meta: bytes, count: int) -> list[bool]:
    if len(meta) != count or not set(meta) <= {0, 1}:
        raise bad_frame("another count of answers", answers=len(meta), asked=count)
    return [byte == 1 for byte in meta]


def pack_error(error: SnapdError) -> bytes:
    """Class, kind, and one line with its context. What is longer than the bounds is cut."""
    line = error.message + "".join(f" {key}={value}" for key, value in error.context.items())
    return b"".join(_pack_text(text) for text in (type(error).__name__, error.kind, line, error.hint))


def parse_error(meta: bytes, node: str) -> SnapdError:
    """The error that `node` answered with, ready to be raised."""
    cursor = _Cursor(meta)
    name, kind, message, hint = (cursor.text() for _ in range(4))
    cursor.end()
    cls = _CLASSES.get(name, UnavailableFromPeer if name == "DeadlineExceeded" else RemoteProtocolError)
    known = kind if _KIND_PATTERN.fullmatch(kind) else None
    return cls(f"{node} answers: {message}", kind=known, hint=hint)


UnavailableFromPeer = _CLASSES["UnavailableError"]


def _pack_name(name: Name) -> bytes:
    if isinstance(name, ChunkName):
        numbers = (name.generation, name.step, name.rank, name.index)
        return struct.pack("!BQQII", _CHUNK, *numbers) + _pack_text(name.job)
    return struct.pack("!BBB", _FRAGMENT, name.number, len(name.row_id)) + name.row_id + _pack_text(name.job)


def _parse_name(cursor: _Cursor) -> Name:
    (what,) = cursor.unpack("!B")
    if what == _CHUNK:
        generation, step, rank, index = cursor.unpack("!QQII")
        return ChunkName(cursor.text(), generation, step, rank, index)
    if what != _FRAGMENT:
        raise bad_frame("unknown kind of name", number=what)
    number, id_bytes = cursor.unpack("!BB")
    row_id = cursor.take(id_bytes)
    return FragmentName(cursor.text(), row_id, number)


def _pack_text(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")[:_TEXT_BYTES_MAX]
    return struct.pack("!H", len(raw)) + raw


class _Cursor:
    """Reads a meta from its beginning; every step raises RemoteProtocolError where there is not enough left."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def take(self, count: int) -> bytes:
        if count > len(self._raw) - self._at:
            raise bad_frame("truncated frame")
        self._at += count
        return self._raw[self._at - count : self._at]

    def unpack(self, fields: str) -> tuple[int, ...]:
        return struct.unpack(fields, self.take(struct.calcsize(fields)))

    def text(self) -> str:
        (count,) = self.unpack("!H")
        if count > _TEXT_BYTES_MAX:
            raise bad_frame("oversized text", nbytes=count)
        # Only printable characters: texts end up in log lines and error messages.
        text = self.take(count).decode("utf-8", "replace")
        return "".join(c if c.isprintable() else "?" for c in text)

    def end(self) -> None:
        if self._at != len(self._raw):
            raise bad_frame("bytes behind the end of a frame")
