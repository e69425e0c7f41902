"""Cauchy Reed-Solomon over GF(256), computed by ISA-L through pyeclib.

A fragment's bytes depend on code and data alone, position by position: neither on the pieces in which they were
computed nor on the fragment's size. They are part of what is stored under a row's id, so they never change; a golden
test holds them.

pyeclib takes and gives `bytes` and puts a header of 80 bytes before each fragment. It says sizes and numbers, nothing
about the data, so the headers of an encoding of zeros serve for every other: they are cut off before bytes are
stored, and put back before a decode.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from pyeclib.ec_iface import ECDriver, ECDriverError

from snapd.core.cluster import DATA_FRAGMENTS_MAX, PARITY_FRAGMENTS_MAX, Code
from snapd.errors import InternalError, LocalProtocolError, NotRestorable

EC_TYPE = "isa_l_rs_cauchy"
HEADER_BYTES = 80
# All fragments of one piece that is encoded. pyeclib copies each of them twice; all that together has to stay below the
# 128 KiB above which glibc gives a thread's memory back at each call: the next one would then clear fresh pages, at ten
# times the CPU of the coding itself.
ENCODE_PIECE_BYTES = 64 << 10
# The same for a piece that is decoded: k fragments go in, one comes out and is copied. No smaller than that asks for:
# each call inverts a matrix anew.
DECODE_PIECE_BYTES = 96 << 10
PIECE_ALIGN = 64
_HEADER_SETS_MAX = 64


class ErasureCodec:
    """The `Codec` of a code. Holds the GIL while it computes a piece; its memory is a few pieces per calling thread."""

    def __init__(self, code: Code) -> None:
        """Raise LocalProtocolError for a code out of bounds."""
        if not (1 <= code.k <= DATA_FRAGMENTS_MAX and 1 <= code.m <= PARITY_FRAGMENTS_MAX):
            raise LocalProtocolError("code out of bounds", code=str(code))
        self._code = code
        # The driver keeps nothing between calls but its tables, so that all threads share one.
        self._driver = ECDriver(k=code.k, m=code.m, ec_type=EC_TYPE)
        self._encode_bytes = _aligned(ENCODE_PIECE_BYTES // code.size)
        self._decode_bytes = _aligned(DECODE_PIECE_BYTES // (code.k + 2))
        # Parity of 1+1 is the data itself, by the code and not only here: a test compares the two.
        self._is_copy = code == Code(1, 1)
        self._zeros = bytes(max(self._encode_bytes, self._decode_bytes))
        self._lock = threading.Lock()
        self._headers: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()

    @property
    def k(self) -> int:
        return self._code.k

    @property
    def m(self) -> int:
        return self._code.m

    def encode(self, data: Sequence[memoryview | None], parity: Sequence[memoryview]) -> None:
        """See `Codec.encode`. Raises LocalProtocolError for wrong counts and sizes."""
        if len(data) != self.k or len(parity) != self.m:
            raise LocalProtocolError("wrong number of fragments", data=len(data), parity=len(parity))
        nbytes = len(parity[0])
        if any(len(view) != nbytes for view in parity):
            raise LocalProtocolError("parity fragments differ in size")
        _check_sizes(data, nbytes)
        self._encode(data, parity, nbytes)

    def _encode(self, data: Sequence[memoryview | None], parity: Sequence[memoryview], nbytes: int) -> None:
        for start, stop in _pieces(nbytes, self._encode_bytes):
            if self._is_copy:
                _fill(parity[0], start, self._part(data[0], start, stop))
                continue
            fragments = self._encode_piece(data, start, stop)
            for view, fragment in zip(parity, fragments[self.k :], strict=True):
                view[start:stop] = memoryview(fragment)[-(stop - start) :]

    def decode(
        self, present: Mapping[int, memoryview | None], wanted: Mapping[int, memoryview], nbytes: int
    ) -> None:
        """See `Codec.decode`. Raises LocalProtocolError for wrong numbers and sizes."""
        self._check_decode(present, wanted, nbytes)
        if self._is_copy:
            source = next(iter(present.values()))
            present = {0: source, 1: source}
        for number in present.keys() & wanted.keys():
            self._copy(present[number], wanted[number])
        lost = {number: view for number, view in wanted.items() if number not in present}
        if lost:
            self._decode(present, lost, nbytes)

    def _copy(self, source: memoryview | None, view: memoryview) -> None:
        for start, stop in _pieces(len(view), self._decode_bytes):
            _fill(view, start, self._part(source, start, stop))

    def _decode(
        self, present: Mapping[int, memoryview | None], lost: Mapping[int, memoryview], nbytes: int
    ) -> None:
        """`lost`: fragments that are not present; their views have at most `nbytes`."""
        for start, stop in _pieces(max(map(len, lost.values())), self._decode_bytes):
            asked = {number: view for number, view in lost.items() if len(view) > start}
            self._decode_piece(present, asked, start, stop)

    def _check_decode(
        self, present: Mapping[int, memoryview | None], wanted: Mapping[int, memoryview], nbytes: int
    ) -> None:
        for number in (*present, *wanted):
            if not 0 <= number < self._code.size:
                raise LocalProtocolError("no such fragment", number=number, code=str(self._code))
        for number, view in present.items():
            if number >= self.k and (view is None or len(view) != nbytes):
                raise LocalProtocolError("a parity fragment must be whole", number=number, nbytes=nbytes)
        _check_sizes(list(present.values()), nbytes)
        _check_sizes(list(wanted.values()), nbytes)
        if len(present) < self.k:
            raise NotRestorable(
                f"{len(present)} fragments of a row are there and {self.k} are needed",
                kind="fragments",
                code=str(self._code),
            )

    def _encode_piece(self, data: Sequence[memoryview | None], start: int, stop: int) -> list[bytes]:
        """All fragments of a piece, with headers."""
        parts: list[memoryview | bytes] = []
        for view in data:
            parts += self._part(view, start, stop)
        return self._encoded(b"".join(parts))

    def _decode_piece(
        self,
        present: Mapping[int, memoryview | None],
        wanted: Mapping[int, memoryview],
        start: int,
        stop: int,
    ) -> None:
        """Compute [start, stop) of fragments that are not there."""
        chosen = sorted(present)[: self.k]
        headers = self._headers_of(stop - start)
        given = [b"".join([headers[i], *self._part(present[i], start, stop)]) for i in chosen]
        try:
            if len(wanted) == 1:
                results = dict(zip(wanted, self._driver.reconstruct(given, list(wanted)), strict=True))
                cut = {number: memoryview(result)[HEADER_BYTES:] for number, result in results.items()}
            else:
                cut = self._decoded(given, wanted, stop - start)
        except ECDriverError as error:
            raise InternalError("the codec failed", code=str(self._code)) from error
        for number, view in wanted.items():
            _fill(view, start, [cut[number]])

    def _decoded(
        self, given: list[bytes], wanted: Mapping[int, memoryview], size: int
    ) -> dict[int, memoryview]:
        data = self._driver.decode(given)
        cut = {i: memoryview(data)[i * size : (i + 1) * size] for i in range(self.k)}
        if any(number >= self.k for number in wanted):
            fragments = self._encoded(data)
            cut |= {i: memoryview(fragments[i])[HEADER_BYTES:] for i in range(self.k, self._code.size)}
        return cut

    def _part(self, view: memoryview | None, start: int, stop: int) -> list[memoryview | bytes]:
        """[start, stop) of a fragment, with the zeros that a short one lacks."""
        have = view[start:stop] if view is not None else memoryview(b"")
        missing = stop - start - len(have)
        if not missing:
            return [have]
        zeros = self._zeros if missing == len(self._zeros) else memoryview(self._zeros)[:missing]
        return [have, zeros] if len(have) else [zeros]

    def _encoded(self, data: bytes) -> list[bytes]:
        try:
            return self._driver.encode(data)
        except ECDriverError as error:
            raise InternalError("the codec failed", code=str(self._code), nbytes=len(data)) from error

    def _headers_of(self, size: int) -> tuple[bytes, ...]:
        """Headers of all fragments of `size` bytes."""
        with self._lock:
            headers = self._headers.get(size)
            if headers is not None:
                self._headers.move_to_end(size)
                return headers
        headers = tuple(fragment[:HEADER_BYTES] for fragment in self._encoded(bytes(size * self.k)))
        with self._lock:
            self._headers[size] = headers
            if len(self._headers) > _HEADER_SETS_MAX:
                self._headers.popitem(last=False)
        return headers


def _aligned(nbytes: int) -> int:
    """Bytes of a fragment in one piece."""
    return max(PIECE_ALIGN, nbytes // PIECE_ALIGN * PIECE_ALIGN)


def _pieces(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, piece_bytes):
        yield start, min(start + piece_bytes, nbytes)


def _check_sizes(views: Sequence[memoryview | None], nbytes: int) -> None:
    for view in views:
        if view is None:
            continue
        if len(view) > nbytes or view.nbytes != len(view):
            raise LocalProtocolError("a fragment of another size", nbytes=view.nbytes, nbytes_max=nbytes)


def _fill(view: memoryview, start: int, parts: Sequence[memoryview | bytes]) -> None:
    """Write `parts` at `start`, as far as the view goes."""
    for part in parts:
        count = min(len(part), len(view) - start)
        if count <= 0:
            return
        view[start : start + count] = part[:count]
        start += count
