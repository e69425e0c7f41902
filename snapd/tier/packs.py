"""The bytes of a pack: header, stored chunks back to back, index. Pure; nothing is read or written here.

    0      8   magic (envelope.py)               header, 64 bytes
    8      4   "PACK"
    12     4   format version, little endian
    16     39  the pack's name, ASCII
    55     1   zero
    56     8   XXH3-64 of bytes 0..56, canonical
    64     n   stored chunks, back to back
    64+n   p   a PackIndex message (tier.proto)  footer
           8   p, little endian
           4   format version, little endian
           4   "INDX"
           16  XXH3-128 of the footer so far
           8   magic

Manifests say where their chunks lie; the index says it again, so that a pack can be read without any manifest.
"""

from __future__ import annotations

import itertools
import struct

import xxhash
from google.protobuf.message import DecodeError
from snapd_proto import tier_pb2

from snapd.core.geometry import CHUNK_BYTES_MAX
from snapd.core.stored import Encoding, StoredChunk
from snapd.core.tier_keys import PACK_NAME
from snapd.errors import IntegrityError
from snapd.tier.columns import PACK_BYTES_MAX, PACK_HEAD_BYTES, check_stored, known_encoding, split_digests
from snapd.tier.envelope import DIGEST_BYTES, FORMAT_VERSION, MAGIC, Kind, bad_object, check_version
from snapd.tier.wire import WireError, check_counts, column_length
from snapd.units import KIB, MIB

PACK_BYTES_AIM = 64 * MIB  # a pack takes no further chunk beyond this
INDEX_BYTES_MAX = 16 * MIB
CHUNKS_MAX = 256 * KIB  # in one pack
_HEAD = struct.Struct("<8s4sI39sx")
_HEAD_CHECK_BYTES = 8
_TAIL = struct.Struct("<QI4s")
TAIL_BYTES = _TAIL.size + DIGEST_BYTES + len(MAGIC)
_COLUMNS = range(3, 7)  # field numbers of PackIndex
_DIGESTS = 7


class PackBuilder:
    """Counts what is written into a pack, in order: header(), the stored bytes of each add(), footer()."""

    def __init__(self, name: str) -> None:
        assert PACK_NAME.fullmatch(name), name
        self.name = name
        self._chunks: list[StoredChunk] = []
        self._end = PACK_HEAD_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes so far, without the footer."""
        return self._end

    @property
    def chunk_count(self) -> int:
        return len(self._chunks)

    def has_room(self, stored_nbytes: int) -> bool:
        """Whether the chunk still belongs into this pack. An empty one takes any."""
        is_small = self._end + stored_nbytes <= PACK_HEAD_BYTES + PACK_BYTES_AIM
        return not self._chunks or (is_small and len(self._chunks) < CHUNKS_MAX)

    def header(self) -> bytes:
        head = _HEAD.pack(MAGIC, Kind.PACK.value, FORMAT_VERSION, self.name.encode())
        return head + xxhash.xxh3_64_digest(head)

    def add(
        self,
        *,
        nbytes: int,
        digest: bytes,
        stored_nbytes: int,
        encoding: Encoding,
        element_nbytes: int = 1,
    ) -> StoredChunk:
        """The chunk with its place; its stored bytes come next in the object."""
        chunk = StoredChunk(nbytes, digest, self.name, self._end, stored_nbytes, encoding, element_nbytes)
        check_stored(self.name, len(self._chunks), chunk, CHUNK_BYTES_MAX)
        self._chunks.append(chunk)
        self._end += stored_nbytes
        return chunk

    def footer(self) -> bytes:
        chunks = self._chunks
        index = tier_pb2.PackIndex(
            format_version=FORMAT_VERSION,
            name=self.name,
            stored_nbytes=[chunk.stored_nbytes for chunk in chunks],
            nbytes=[chunk.nbytes for chunk in chunks],
            encoding=[int(chunk.encoding) for chunk in chunks],
            element_nbytes=[chunk.element_nbytes for chunk in chunks],
            xxh3_128=b"".join(chunk.digest for chunk in chunks),
        ).SerializeToString(deterministic=True)
        body = index + _TAIL.pack(len(index), FORMAT_VERSION, Kind.PACK_INDEX.value)
        return body + xxhash.xxh3_128_digest(body) + MAGIC


def bad_pack(key: str, what: str) -> IntegrityError:
    return IntegrityError(f"{key}: {what}", kind="tier_pack", key=key)


def check_header(data: bytes, *, key: str, name: str) -> None:
    """`data`: the pack's first PACK_HEAD_BYTES.

    Raises:
        IntegrityError: kind `tier_pack`: not a pack, changed, another pack's; `tier_version`.
    """
    if len(data) != PACK_HEAD_BYTES:
        raise bad_pack(key, f"the header has {len(data)} bytes: cut off")
    magic, kind, version, found = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise bad_pack(key, "does not begin as a pack of snapd does")
    if xxhash.xxh3_64_digest(data[:-_HEAD_CHECK_BYTES]) != data[-_HEAD_CHECK_BYTES:]:
        raise bad_pack(key, "the header was changed: its checksum differs")
    check_version(key, version)
    if kind != Kind.PACK.value:
        raise bad_pack(key, "is no pack")
    if found != name.encode():
        raise bad_pack(key, f"is pack {found.decode('ascii', 'replace')!r}")


def footer_nbytes(tail: bytes, *, key: str, pack_nbytes: int) -> int:
    """Size of the footer, from the pack's last TAIL_BYTES; `pack_nbytes` is the whole object's size.

    Raises:
        IntegrityError: kind `tier_pack`.
    """
    if len(tail) != TAIL_BYTES or pack_nbytes < PACK_HEAD_BYTES + TAIL_BYTES or tail[-8:] != MAGIC:
        raise bad_pack(key, f"{pack_nbytes} bytes that do not end as a pack does: cut off")
    if pack_nbytes > PACK_BYTES_MAX + INDEX_BYTES_MAX:
        raise bad_pack(key, f"{pack_nbytes} bytes: no pack is so large")
    nbytes = int(_TAIL.unpack_from(tail)[0])
    if nbytes > min(INDEX_BYTES_MAX, pack_nbytes - PACK_HEAD_BYTES - TAIL_BYTES):
        raise bad_pack(key, f"an index of {nbytes} bytes in a pack of {pack_nbytes}: changed or cut off")
    return nbytes + TAIL_BYTES


def parse_footer(footer: bytes, *, key: str, name: str, pack_nbytes: int) -> tuple[StoredChunk, ...]:
    """What lies in the pack. `footer`: its last `footer_nbytes`.

    Raises:
        IntegrityError: kinds `tier_pack`, `tier_version`, `tier_manifest` (an entry is out of bounds).
    """
    nbytes = footer_nbytes(footer[-TAIL_BYTES:], key=key, pack_nbytes=pack_nbytes)
    if len(footer) != nbytes:
        raise bad_pack(key, f"the footer has {nbytes} bytes, {len(footer)} came")
    checked = len(footer) - DIGEST_BYTES - len(MAGIC)
    if xxhash.xxh3_128_digest(memoryview(footer)[:checked]) != footer[checked : checked + DIGEST_BYTES]:
        raise bad_pack(key, "the index was changed: its checksum differs")
    _, version, kind = _TAIL.unpack_from(footer, checked - _TAIL.size)
    check_version(key, version)
    if kind != Kind.PACK_INDEX.value:
        raise bad_pack(key, "does not end in the index of a pack")
    message = _parsed_index(footer[: checked - _TAIL.size], key)
    if message.name != name:
        raise bad_pack(key, f"the index is that of pack {message.name[:64]!r}")
    chunks = _chunks_of(message, key)
    end = chunks[-1].offset + chunks[-1].stored_nbytes if chunks else PACK_HEAD_BYTES
    if end + len(footer) != pack_nbytes:
        raise bad_pack(key, f"its chunks end at byte {end}, its index begins at {pack_nbytes - len(footer)}")
    return chunks


def _parsed_index(payload: bytes, key: str) -> tier_pb2.PackIndex:
    try:
        last = check_counts(memoryview(payload), dict.fromkeys((*_COLUMNS, _DIGESTS), 1))
        digests = len(last.get(_DIGESTS, b""))
        lengths = {column_length(last.get(number, memoryview(b""))) for number in _COLUMNS}
        if digests % DIGEST_BYTES or lengths != {digests // DIGEST_BYTES}:
            raise WireError(f"columns of {sorted(lengths)} entries, {digests} bytes of digests")
        return tier_pb2.PackIndex.FromString(payload)
    except (WireError, DecodeError) as error:
        raise bad_pack(key, f"the index does not parse: {error}") from error


def _chunks_of(message: tier_pb2.PackIndex, key: str) -> tuple[StoredChunk, ...]:
    columns = (message.stored_nbytes, message.nbytes, message.encoding, message.element_nbytes)
    if any(len(column) * DIGEST_BYTES != len(message.xxh3_128) for column in columns):
        raise bad_pack(key, "a column of its index is not packed")
    ends = itertools.accumulate(message.stored_nbytes)
    chunks = []
    rows = zip(ends, *columns, split_digests(message.xxh3_128), strict=True)
    for index, (end, stored_nbytes, nbytes, encoding, element_nbytes, digest) in enumerate(rows):
        offset = PACK_HEAD_BYTES + end - stored_nbytes
        kind = known_encoding(key, index, encoding)
        chunk = StoredChunk(nbytes, digest, message.name, offset, stored_nbytes, kind, element_nbytes)
        check_stored(key, index, chunk, CHUNK_BYTES_MAX)
        chunks.append(chunk)
    return tuple(chunks)


__all__ = [
    "CHUNKS_MAX",
    "PACK_BYTES_AIM",
    "PACK_BYTES_MAX",
    "PACK_HEAD_BYTES",
    "TAIL_BYTES",
    "PackBuilder",
    "bad_object",
    "bad_pack",
    "check_header",
    "footer_nbytes",
    "parse_footer",
]
