"""Byte planes come back, at every length and offset, and are those of the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapd_native import byte_filter, shuffle_bytes, unshuffle_bytes


def planes(data: bytes, width: int) -> bytes:
    whole = len(data) // width * width
    return b"".join(data[plane:whole:width] for plane in range(width)) + data[whole:]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.binary(min_size=1, max_size=200),
    nbytes=st.integers(0, 3000),
    offset=st.integers(0, 40),
    width=st.sampled_from([2, 4, 8]),
)
def test_planes_come_back(seed: bytes, nbytes: int, offset: int, width: int) -> None:
    data = (seed * (nbytes // len(seed) + 1))[:nbytes]
    room = bytearray(b"\xa5" * (nbytes + offset + 40))
    shuffle_bytes(data, memoryview(room)[offset : offset + nbytes], width)
    assert room[offset : offset + nbytes] == planes(data, width)
    assert set(room[:offset] + room[offset + nbytes :]) <= {0xA5}
    back = bytearray(nbytes)
    unshuffle_bytes(memoryview(room)[offset : offset + nbytes], back, width)
    assert back == data


@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_tail(width: int) -> None:
    data = bytes(range(256)) * 2
    for nbytes in range(len(data)):
        out, back = bytearray(nbytes), bytearray(nbytes)
        shuffle_bytes(data[:nbytes], out, width)
        assert out == planes(data[:nbytes], width)
        unshuffle_bytes(out, back, width)
        assert back == data[:nbytes]


def test_what_cannot_be_is_refused() -> None:
    assert byte_filter() in ("avx2", "sse2", "scalar")
    place = bytearray(16)
    for src, dst, width, what in (
        (bytes(16), place, 3, "width is 3, wanted 2, 4 or 8"),
        (bytes(16), place, 16, "width is 16"),
        (bytes(16), place, -2, "width is -2"),
        (bytes(15), place, 2, "dst has 16 bytes, src has 15"),
        (bytes(16), bytes(16), 2, "dst is bytes, wanted a writable"),
        (place, memoryview(place), 2, "dst and src overlap"),
        ("text", place, 2, "src is str"),
        (memoryview(bytes(32))[::2], place, 2, "wanted a contiguous buffer"),
    ):
        for call in (shuffle_bytes, unshuffle_bytes):
            with pytest.raises(ValueError, match=what):
                call(src, dst, width)  # type: ignore[arg-type]
