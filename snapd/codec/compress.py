"""A chunk's bytes as they are stored: raw, a zstd frame, or a zstd frame of its byte planes (docs/format.md).

Floats of a training state hardly repeat, but their exponents take few values: with the bytes of equal significance side
by side (shuffle_bytes) the planes of exponents shrink, and zstd leaves the others as they are. A sample of each chunk
decides which way is taken; what does not shrink is not touched and not copied. Behind a frame stands a checksum of it:
a frame has bits that change nothing in what comes out, and a damaged one is not given to the decompressor at all.

All work on bytes releases the GIL. Encoders and decoders may be used by several threads; what they keep (a context and
scratch of the largest chunk so far, SCRATCH_BYTES_MAX at most) is one for each thread.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from typing import Any

import xxhash
import zstandard
from snapd_native import shuffle_bytes, unshuffle_bytes

from snapd.core.stored import Encoding, StoredChunk
from snapd.errors import IntegrityError
from snapd.units import KIB, MIB

Buffer = bytes | bytearray | memoryview

LEVEL = 1
SHUFFLED_WIDTHS = (2, 4, 8)
WINDOW_BYTES_MAX = 64 * MIB  # as large as the largest chunk
SCRATCH_BYTES_MAX = 8 * MIB  # kept by each thread; for larger chunks it is made anew each time
FRAME_CHECK_BYTES = 8  # XXH3-64 of the frame, canonical
SAMPLE_PIECES = 8
SAMPLE_PIECE_BYTES = 8 * KIB
# A chunk that does not shrink by this share of its size is stored raw: reading it back would cost more than it saves.
MARGIN = {"auto": 0.05, "always": 0.01}


class Mode(enum.Enum):
    """OFF: everything raw. AUTO: what shrinks clearly, and only while that slows nothing down (paying.py). ALWAYS:
    whatever shrinks.
    """

    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """`buffer`: the stored bytes; for RAW the very view that came in."""

    encoding: Encoding
    element_nbytes: int
    buffer: Buffer

    @property
    def nbytes(self) -> int:
        return len(self.buffer)


class _Compressors:
    """zstd's contexts for bytes as they are, and for byte planes.

    In planes there is little to find but how often each byte comes: a search for repetitions costs half of the time and
    gains nothing (docs/adr/0015-how-chunks-are-compressed.md). At level 1 it is cut down to long runs.
    """

    def __init__(self, level: int) -> None:
        self.plain: Any = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        self.planes: Any = self.plain
        if level == 1:
            fast = zstandard.ZstdCompressionParameters.from_level(
                1,
                strategy=zstandard.STRATEGY_FAST,
                min_match=7,
                hash_log=7,
                write_checksum=False,
                write_content_size=True,
            )
            self.planes = zstandard.ZstdCompressor(compression_params=fast)


class _Scratch(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.planes = bytearray()
        self.compressors: _Compressors | None = None
        self.decompressor: Any = None

    def room(self, nbytes: int) -> memoryview:
        """Scratch of `nbytes`; valid until the next call in this thread."""
        if nbytes > SCRATCH_BYTES_MAX:
            return memoryview(bytearray(nbytes))
        if len(self.planes) < nbytes:
            self.planes = bytearray(nbytes)
        return memoryview(self.planes)[:nbytes]


class ChunkEncoder:
    """Encodes chunks. `level`: of zstd, 1..19."""

    def __init__(self, mode: Mode | str = Mode.AUTO, level: int = LEVEL) -> None:
        self.mode = Mode(mode)
        self._level = level
        self._scratch = _Scratch()
        self._margin = MARGIN.get(self.mode.value, 0.0)

    def encode(self, raw: memoryview, element_nbytes: int, *, is_allowed: bool = True) -> EncodedChunk:
        """How to store `raw` (contiguous bytes), whose elements have `element_nbytes` bytes (1: unknown or mixed).

        `is_allowed`: False stores it raw whatever the mode.
        """
        stored_raw = EncodedChunk(Encoding.RAW, 1, raw)
        if self.mode is Mode.OFF or not is_allowed or len(raw) == 0:
            return stored_raw
        width, share = self._choose(raw, element_nbytes)
        if self.mode is Mode.AUTO and share > 1 - self._margin:
            return stored_raw
        packed = self._pack(raw, width)
        if len(packed) + FRAME_CHECK_BYTES >= len(raw) * (1 - self._margin):
            return stored_raw
        encoding = Encoding.ZSTD if width == 1 else Encoding.SHUFFLED_ZSTD
        return EncodedChunk(encoding, width, packed + xxhash.xxh3_64_digest(packed))

    def _choose(self, raw: memoryview, element_nbytes: int) -> tuple[int, float]:
        """Which width (1: no planes) makes a sample smallest, and to what share of its size."""
        sample = _sample(raw)
        widths = (element_nbytes, 1) if element_nbytes in SHUFFLED_WIDTHS else (1,)
        sizes = {width: self._sample_nbytes(sample, width) for width in widths}
        best = min(widths, key=sizes.__getitem__)
        return best, sizes[best] / len(sample)

    def _sample_nbytes(self, sample: memoryview, width: int) -> int:
        """What it shrinks to. Plane by plane: in a whole chunk each fills blocks, and so has codes, of its own."""
        if width == 1:
            return len(self._pack(sample, 1))
        planes = memoryview(bytearray(len(sample)))
        shuffle_bytes(sample, planes, width)
        compress = self._compressors.planes.compress
        step = max(1, len(sample) // width)
        return sum(len(compress(planes[at : at + step])) for at in range(0, len(sample), step))

    def _pack(self, raw: memoryview, width: int) -> bytes:
        if width == 1:
            return bytes(self._compressors.plain.compress(raw))
        planes = self._scratch.room(len(raw))
        shuffle_bytes(raw, planes, width)
        return bytes(self._compressors.planes.compress(planes))

    @property
    def _compressors(self) -> _Compressors:
        """Of this thread."""
        if self._scratch.compressors is None:
            self._scratch.compressors = _Compressors(self._level)
        return self._scratch.compressors


def _sample(raw: memoryview) -> memoryview:
    """A few pieces, evenly spread, each beginning at a multiple of any element's width."""
    wanted = SAMPLE_PIECES * SAMPLE_PIECE_BYTES
    if len(raw) <= wanted:
        return raw
    step = (len(raw) - SAMPLE_PIECE_BYTES) // (SAMPLE_PIECES - 1) // 8 * 8
    starts = [index * step for index in range(SAMPLE_PIECES)]
    return memoryview(b"".join(raw[start : start + SAMPLE_PIECE_BYTES] for start in starts))


def bad_chunk(chunk: StoredChunk, what: str) -> IntegrityError:
    """The error for stored bytes that are not the chunk that was recorded."""
    return IntegrityError(
        f"pack {chunk.pack}, bytes {chunk.offset} to {chunk.offset + chunk.stored_nbytes}: {what}",
        kind="tier_chunk",
        pack=chunk.pack,
        offset=chunk.offset,
    )


def check_digest(raw: Buffer, chunk: StoredChunk) -> None:
    """Raises: IntegrityError: kind `tier_chunk`: the raw bytes are not those of the chunk."""
    if len(raw) != chunk.nbytes or xxhash.xxh3_128_digest(raw) != chunk.digest:
        raise bad_chunk(chunk, f"the chunk of {chunk.nbytes} bytes does not have the recorded XXH3-128")


class ChunkDecoder:
    """Decodes chunks. Nothing is allocated by what the stored bytes say."""

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def decode(self, stored: Buffer, chunk: StoredChunk, out: memoryview) -> None:
        """Fill `out` (exactly chunk.nbytes, writable) with the raw bytes and check their digest.

        Args:
            stored: exactly chunk.stored_nbytes; may be `out` itself for a raw chunk, which is then only checked.
        Raises:
            IntegrityError: kind `tier_chunk`: names pack and offset; `out` then holds anything.
        """
        assert len(out) == chunk.nbytes
        if len(stored) != chunk.stored_nbytes:
            raise bad_chunk(chunk, f"{len(stored)} bytes came")
        if chunk.encoding is Encoding.RAW:
            if len(stored) != len(out):
                raise bad_chunk(chunk, f"{len(stored)} raw bytes for a chunk of {len(out)}")
            if stored is not out:
                out[:] = stored
        elif chunk.encoding is Encoding.ZSTD:
            self._unpack(stored, chunk, out)
        else:
            planes = self._scratch.room(chunk.nbytes)
            self._unpack(stored, chunk, planes)
            unshuffle_bytes(planes, out, chunk.element_nbytes)
        check_digest(out, chunk)

    def _unpack(self, stored: Buffer, chunk: StoredChunk, out: memoryview) -> None:
        scratch = self._scratch
        if scratch.decompressor is None:
            scratch.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        frame = memoryview(stored)[:-FRAME_CHECK_BYTES]
        if xxhash.xxh3_64_digest(frame) != bytes(memoryview(stored)[-FRAME_CHECK_BYTES:]):
            raise bad_chunk(chunk, "its stored bytes were changed: their checksum differs")
        try:
            size = zstandard.frame_content_size(frame)
            if size != len(out):
                raise bad_chunk(chunk, f"its zstd frame is of {size} bytes, the chunk of {len(out)}")
            # The whole frame and room for all of it: zstd then decodes into place, without a window of its own.
            with scratch.decompressor.stream_reader(frame, read_across_frames=False, closefd=False) as reader:
                count = reader.readinto(out)
                if count != len(out):
                    raise bad_chunk(chunk, f"its zstd frame ends after {count} of {len(out)} bytes")
        except zstandard.ZstdError as error:
            raise bad_chunk(chunk, f"its zstd frame is damaged: {error}") from error


def decode_chunk(stored: Buffer, chunk: StoredChunk, out: memoryview) -> None:
    """ChunkDecoder.decode, once. Who decodes many keeps a decoder, which keeps its scratch."""
    ChunkDecoder().decode(stored, chunk, out)
