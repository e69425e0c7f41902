"""The same code with no copies: ISA-L called directly through ctypes, in the library that pyeclib has loaded.

pyeclib joins the fragments into one `bytes`, copies them apart again and holds the GIL meanwhile, which takes several
times as long as the coding (docs/adr/0014-isa-l-without-copies.md). ISA-L itself takes pointers, so it reads the chunks
where they were received and writes parity where it is kept. What it gives is compared with pyeclib's bytes before it
is used; where it is not to be had or differs, pyeclib computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from snapd.codec.ec import ErasureCodec
from snapd.core.cluster import Code
from snapd.errors import InternalError

_NAMES = ("libisal-pyeclib.so.2", "libisal.so.2")  # of pyeclib's wheel; of distributions
_TABLE_BYTES = 32  # for each factor
_ZEROS_BYTES = 256 << 10
_TABLES_MAX = 256
_PROBE_BYTES = 1021  # no multiple of anything that vectors are made of

View = memoryview | None
_INT, _AT = ctypes.c_int, ctypes.c_void_p


class IsalCodec(ErasureCodec):
    """See `Codec` and `ErasureCodec`. Without the GIL while it computes; its own memory is a few tables."""

    def __init__(self, code: Code, library: ctypes.CDLL) -> None:
        super().__init__(code)
        self._library = library
        self._matrix = ctypes.create_string_buffer(code.size * code.k)
        library.gf_gen_cauchy1_matrix(self._matrix, code.size, code.k)
        self._parity_tables = self._tables(self._matrix.raw[code.k * code.k :])
        self._zero_room = ctypes.create_string_buffer(_ZEROS_BYTES)
        self._known: OrderedDict[tuple[tuple[int, ...], tuple[int, ...]], ctypes.Array[ctypes.c_char]]
        self._known = OrderedDict()
        self._known_lock = threading.Lock()

    def _encode(self, data: Sequence[View], parity: Sequence[memoryview], nbytes: int) -> None:
        self._multiply(self._parity_tables, data, parity, nbytes)

    def _decode(self, present: Mapping[int, View], wanted: Mapping[int, memoryview], nbytes: int) -> None:
        chosen = tuple(sorted(present)[: self.k])
        numbers = tuple(sorted(wanted, key=lambda number: (len(wanted[number]), number)))
        for first, start, stop in _growing([len(wanted[number]) for number in numbers]):
            # the shorter ones are whole by now
            left = numbers[first:]
            outputs = [wanted[number][start:stop] for number in left]
            inputs = [_part(present[number], start, stop) for number in chosen]
            self._multiply(self._tables_for(chosen, left), inputs, outputs, stop - start)

    def _multiply(
        self,
        tables: ctypes.Array[ctypes.c_char],
        inputs: Sequence[View],
        outputs: Sequence[memoryview],
        nbytes: int,
    ) -> None:
        """Each output is a sum of the inputs with factors. Inputs that end are zeros from there on."""
        readable = [
            view if view is None or not view.readonly else memoryview(bytearray(view)) for view in inputs
        ]
        ends = [len(view) if view is not None else 0 for view in readable]
        sources = [_address(view) for view in readable]
        targets = [_address(view) for view in outputs]
        zeros = ctypes.addressof(self._zero_room)
        pointers = ctypes.c_void_p * len(sources), ctypes.c_void_p * len(targets)
        for start, stop in _spans(ends, nbytes):
            from_here = [at + start if end >= stop else zeros for at, end in zip(sources, ends, strict=True)]
            self._library.ec_encode_data(
                stop - start,
                len(sources),
                len(targets),
                tables,
                pointers[0](*from_here),
                pointers[1](*(at + start for at in targets)),
            )

    def _tables_for(self, chosen: tuple[int, ...], wanted: tuple[int, ...]) -> ctypes.Array[ctypes.c_char]:
        """Tables by which the fragments `chosen` give those that are wanted."""
        key = (chosen, wanted)
        with self._known_lock:
            tables = self._known.get(key)
            if tables is not None:
                self._known.move_to_end(key)
                return tables
        tables = self._tables(self._factors(chosen, wanted))
        with self._known_lock:
            self._known[key] = tables
            if len(self._known) > _TABLES_MAX:
                self._known.popitem(last=False)
        return tables

    def _factors(self, chosen: Iterable[int], wanted: Iterable[int]) -> bytes:
        k, matrix, multiply = self.k, self._matrix.raw, self._library.gf_mul
        rows = b"".join(matrix[number * k : number * k + k] for number in chosen)
        inverse = ctypes.create_string_buffer(k * k)
        if self._library.gf_invert_matrix(ctypes.create_string_buffer(rows, k * k), inverse, k):
            raise InternalError("the code's matrix has no inverse", code=f"{self.k}+{self.m}")
        factors = bytearray()
        for number in wanted:
            row = matrix[number * k : number * k + k]
            for column in range(k):
                products = (multiply(row[i], inverse.raw[i * k + column]) for i in range(k) if row[i])
                factors.append(functools.reduce(int.__xor__, products, 0))
        return bytes(factors)

    def _tables(self, factors: bytes) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(_TABLE_BYTES * len(factors))
        given = ctypes.create_string_buffer(factors, len(factors))
        self._library.ec_init_tables(self.k, len(factors) // self.k, given, tables)
        return tables


def _part(view: View, start: int, stop: int) -> View:
    return view[start:stop] if view is not None else None


def _address(view: View) -> int:
    """Of a view that is open for writing; it is there as long as the caller has the view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view is not None and len(view) else 0


def _growing(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For lengths in ascending order: (which is the first that is longer than `start`, start, stop)."""
    start = 0
    for first, length in enumerate(lengths):
        if length > start:
            yield first, start, length
            start = length


def _spans(ends: Sequence[int], nbytes: int) -> Iterator[tuple[int, int]]:
    """[0, nbytes) in parts in which each input either is there or is all zeros, and then not longer than those."""
    start = 0
    for stop in sorted({end for end in ends if 0 < end < nbytes} | {nbytes}):
        step = stop - start if min(ends) >= stop else _ZEROS_BYTES
        while start < stop:
            yield start, min(stop, start + step)
            start = min(stop, start + step)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """ISA-L, if it is here. pyeclib has loaded its own by then, which is found by its name."""
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            library.ec_encode_data.argtypes = [_INT, _INT, _INT, _AT, _AT, _AT]
            library.ec_init_tables.argtypes = [_INT, _INT, _AT, _AT]
            library.gf_gen_cauchy1_matrix.argtypes = [_AT, _INT, _INT]
            library.gf_invert_matrix.argtypes = [_AT, _AT, _INT]
            library.gf_mul.argtypes = [ctypes.c_ubyte, ctypes.c_ubyte]
            library.gf_mul.restype = ctypes.c_ubyte
        except (OSError, AttributeError):
            continue
        return library
    return None


@functools.lru_cache(maxsize=64)
def make_codec(code: Code) -> ErasureCodec:
    """The fastest codec there is that gives the bytes which pyeclib gives. Raise LocalProtocolError for a code out of
    bounds.
    """
    reference = ErasureCodec(code)
    library = _library()
    if library is None:
        return reference
    codec = IsalCodec(code, library)
    return codec if _agree(codec, reference) else reference


def _agree(codec: ErasureCodec, reference: ErasureCodec) -> bool:
    """Whether both give the same parity, and the first gives lost fragments back."""
    size = codec.k + codec.m
    data = [hashlib.shake_128(bytes([number])).digest(_PROBE_BYTES - number) for number in range(codec.k)]
    parity = [[memoryview(bytearray(_PROBE_BYTES)) for _ in range(codec.m)] for _ in range(2)]
    for one, room in zip((codec, reference), parity, strict=True):
        one.encode([memoryview(part) for part in data], room)
    whole = [part.ljust(_PROBE_BYTES, b"\0") for part in data] + [bytes(view) for view in parity[1]]
    lost = range(0, size, max(1, size // codec.m))[: codec.m]
    found = {number: memoryview(bytearray(_PROBE_BYTES)) for number in lost}
    codec.decode({i: memoryview(part) for i, part in enumerate(whole) if i not in found}, found, _PROBE_BYTES)
    return parity[0] == parity[1] and all(bytes(view) == whole[number] for number, view in found.items())
