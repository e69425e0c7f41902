"""Frames come back as they were packed, and no bytes whatever do more than raise RemoteProtocolError."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.errors import RemoteProtocolError, SnapdError, all_error_classes
from snapd.peer import framing
from snapd.peer.base import HOLDS_MAX, ChunkName, FragmentName, Name
from snapd.peer.framing import FrameKind, Hello

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
JOBS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
CHUNKS = st.builds(ChunkName, JOBS, U64, U64, U32, U32)
FRAGMENTS = st.builds(FragmentName, JOBS, st.binary(max_size=255), st.integers(0, 255))
NAMES: st.SearchStrategy[Name] = st.one_of(CHUNKS, FRAGMENTS)
HELLOS = st.builds(
    Hello,
    node=JOBS,
    to=JOBS,
    cluster_id=JOBS,
    epoch=U64,
    newest=st.integers(0, 65535),
    oldest=st.integers(0, 65535),
)
PARSERS: list[Callable[[bytes], object]] = [
    framing.parse_hello,
    framing.parse_fetch,
    framing.parse_push,
    framing.parse_holds,
    lambda raw: framing.parse_error(raw, "b"),
    lambda raw: framing.parse_held(raw, 3),
]


@given(NAMES, U64)
def test_fetches_come_back(name: Name, nbytes: int) -> None:
    assert framing.parse_fetch(framing.pack_fetch(name, nbytes)) == (name, nbytes)


@given(FRAGMENTS, st.binary(min_size=16, max_size=16))
def test_pushes_come_back(name: FragmentName, digest: bytes) -> None:
    assert framing.parse_push(framing.pack_push(name, digest)) == (name, digest)


@given(st.lists(FRAGMENTS, max_size=20))
def test_questions_come_back(names: list[FragmentName]) -> None:
    assert framing.parse_holds(framing.pack_holds(names)) == names


@given(HELLOS, st.binary(max_size=20))
def test_greetings_come_back_and_may_have_grown(hello: Hello, more: bytes) -> None:
    assert framing.parse_hello(framing.pack_hello(hello) + more) == hello


@given(st.sampled_from(list(FrameKind)), U32, st.integers(0, framing.META_BYTES_MAX), st.integers(0, 1000))
def test_headers_come_back(kind: FrameKind, number: int, meta_bytes: int, body_bytes: int) -> None:
    has_body = kind in (FrameKind.CHUNK, FrameKind.PUSH, FrameKind.HOLDS)
    raw = framing.pack_frame(kind, number, bytes(meta_bytes), body_bytes if has_body else 0)
    header = framing.parse_header(raw[: framing.HEADER_BYTES], body_bytes_max=1000)
    assert (header.kind, header.number, header.meta_bytes) == (kind, number, meta_bytes)
    assert header.body_bytes == (body_bytes if has_body else 0)


@given(st.sampled_from(range(len(PARSERS))), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(which: int, raw: bytes) -> None:
    try:
        PARSERS[which](raw)
    except RemoteProtocolError as error:
        assert error.kind == "frame"


@given(NAMES, st.data())
def test_what_is_cut_short_is_refused(name: Name, data: st.DataObject) -> None:
    raw = framing.pack_fetch(name, 1)
    with pytest.raises(RemoteProtocolError):
        framing.parse_fetch(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(RemoteProtocolError):
        framing.parse_fetch(raw + b"\0")


@given(st.binary(min_size=framing.HEADER_BYTES, max_size=framing.HEADER_BYTES), st.booleans())
def test_any_header_is_within_its_bounds_or_refused(raw: bytes, is_ours: bool) -> None:
    if is_ours:
        raw = framing.MAGIC + bytes([framing.LAYOUT, raw[5] % 11, 0, 0]) + raw[8:]
    try:
        header = framing.parse_header(raw, body_bytes_max=1 << 20)
    except RemoteProtocolError as error:
        assert error.kind == "frame"
    else:
        assert header.meta_bytes <= framing.META_BYTES_MAX
        assert header.body_bytes <= 1 << 20


@given(st.sampled_from(all_error_classes()), st.text(max_size=2000), st.text(max_size=2000))
def test_errors_arrive_as_what_a_peer_may_raise(cls: type[SnapdError], message: str, hint: str) -> None:
    raw = framing.pack_error(cls(message, hint=hint, step=7))
    assert len(raw) <= framing.META_BYTES_MAX
    error = framing.parse_error(raw, "b")
    assert error.kind == cls.default_kind
    assert error.message.isprintable()
    if cls.__name__ in framing._RAISABLE:
        assert type(error) is cls
    else:
        # Never what stops a daemon, or blames its user: that is the peer's own matter.
        assert type(error).__name__ in ("RemoteProtocolError", "UnavailableError")


def test_a_question_has_a_bound() -> None:
    names = [FragmentName("j" * 128, b"r" * 255, 0)] * HOLDS_MAX
    assert len(framing.pack_holds(names)) <= framing.HOLDS_BYTES_MAX
    with pytest.raises(RemoteProtocolError, match="too many names"):
        framing.parse_holds(framing.pack_holds([*names, names[0]]))
    with pytest.raises(RemoteProtocolError, match="only parity"):
        framing.parse_holds(framing.pack_holds([ChunkName("job", 1, 1, 1, 1)]))  # type: ignore[list-item]
