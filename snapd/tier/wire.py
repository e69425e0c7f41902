"""A look at a protobuf message before it is parsed: how many of each field there are, how long its columns are.

Parsing allocates by what the bytes say; a few bytes of an empty message or of a packed zero become many in memory. What
a reader is about to parse is therefore counted first, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX = 10
_CONTINUED = bytes(range(0x80, 0x100))
OTHER_FIELDS_MAX = 64  # of a field that is there once, or that a later snapd has added


class WireError(ValueError):
    """The bytes are no message, or one out of its bounds; the text says what is wrong."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES_MAX):
        if at + index >= len(data):
            raise WireError("a number is cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise WireError("a number has more than 10 bytes")


def fields(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each field's value, in the order in which they lie.

    Raises:
        WireError: the bytes are no message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError("a field has the number 0")
        start = at
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            nbytes, start = _varint(data, at)
            at = start + nbytes
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise WireError(f"field {number} has the wire type {kind}")
        if at > len(data):
            raise WireError(f"field {number} ends behind the message")
        yield number, start, at


def check_counts(data: memoryview, most: Mapping[int, int]) -> dict[int, memoryview]:
    """Refuse a message with more of a field than `most` allows; returns the last value of each field.

    Raises:
        WireError: names the field.
    """
    counts: dict[int, int] = {}
    last: dict[int, memoryview] = {}
    for number, start, end in fields(data):
        counts[number] = counts.get(number, 0) + 1
        if counts[number] > most.get(number, OTHER_FIELDS_MAX):
            raise WireError(f"more than {most.get(number, OTHER_FIELDS_MAX)} of field {number}")
        last[number] = data[start:end]
    return last


def column_length(column: memoryview) -> int:
    """Entries of a packed column of varints: bytes that end one."""
    return len(bytes(column).translate(None, _CONTINUED))
