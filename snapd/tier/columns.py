"""The chunk table of a manifest: columns on the wire, StoredChunks in memory; every entry is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snapd_proto import tier_pb2

from snapd.core.stored import Encoding, StoredChunk
from snapd.core.tier_keys import PACK_NAME
from snapd.errors import IntegrityError
from snapd.tier.envelope import DIGEST_BYTES, bad_object
from snapd.tier.wire import WireError, check_counts, column_length

PACKS_MAX = 1 << 18  # in one manifest: 16 TiB in packs of 64 MiB
PACK_BYTES_MAX = 1 << 30
PACK_HEAD_BYTES = 64
ELEMENT_NBYTES = (1, 2, 4, 8)
_COLUMNS = range(2, 8)  # field numbers of StoredChunks
_DIGESTS = 8


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """How many entries each column of an unparsed StoredChunks has."""

    lengths: tuple[int, ...]
    digest_nbytes: int

    @staticmethod
    def of(message: memoryview | None) -> ChunkColumns:
        """Raises: WireError: no table, no message, more packs than there can be, or unequal columns."""
        if message is None:
            raise WireError("there is no table of chunks")
        last = check_counts(message, {1: PACKS_MAX, **dict.fromkeys((*_COLUMNS, _DIGESTS), 1)})
        empty = memoryview(b"")
        found = ChunkColumns(
            tuple(column_length(last.get(number, empty)) for number in _COLUMNS),
            len(last.get(_DIGESTS, empty)),
        )
        count = found.digest_nbytes // DIGEST_BYTES
        if count == 0 or found.digest_nbytes % DIGEST_BYTES or set(found.lengths) != {count}:
            raise WireError(
                f"columns of {found.lengths} entries and {found.digest_nbytes} bytes of digests do not belong together"
            )
        return found


def check_stored(key: str, index: int, chunk: StoredChunk, chunk_bytes: int) -> None:
    """Raises: IntegrityError: sizes that a chunk of this format cannot have."""
    if not 0 < chunk.nbytes <= chunk_bytes:
        raise bad_object(key, f"chunk {index} has {chunk.nbytes} bytes; at most {chunk_bytes} can be")
    is_raw = chunk.encoding is Encoding.RAW
    if chunk.stored_nbytes != chunk.nbytes if is_raw else not 0 < chunk.stored_nbytes < chunk.nbytes:
        raise bad_object(
            key,
            f"chunk {index} of {chunk.nbytes} bytes is stored {chunk.encoding.name} in {chunk.stored_nbytes}",
        )
    is_shuffled = chunk.encoding is Encoding.SHUFFLED_ZSTD
    if chunk.element_nbytes not in (ELEMENT_NBYTES[1:] if is_shuffled else ELEMENT_NBYTES[:1]):
        raise bad_object(
            key, f"chunk {index} is stored {chunk.encoding.name} by {chunk.element_nbytes} bytes"
        )
    if chunk.offset < PACK_HEAD_BYTES or chunk.offset + chunk.stored_nbytes > PACK_BYTES_MAX:
        raise bad_object(key, f"chunk {index} lies at byte {chunk.offset} of its pack")


def known_encoding(key: str, index: int, number: int) -> Encoding:
    """Raises: IntegrityError: kind `tier_version`: an encoding that only a newer snapd knows."""
    try:
        return Encoding(number)
    except ValueError as error:
        raise IntegrityError(
            f"{key}: chunk {index} is stored in encoding {number}, which this snapd does not know",
            kind="tier_version",
            hint="use a newer snapd",
            key=key,
            encoding=number,
        ) from error


def packed_chunks(chunks: Sequence[StoredChunk]) -> tier_pb2.StoredChunks:
    """The columns of a shard's chunks; packs in the order in which they first come."""
    numbers: dict[str, int] = {}
    for chunk in chunks:
        numbers.setdefault(chunk.pack, len(numbers))
    return tier_pb2.StoredChunks(
        packs=numbers,
        pack=[numbers[chunk.pack] for chunk in chunks],
        offset=[chunk.offset for chunk in chunks],
        stored_nbytes=[chunk.stored_nbytes for chunk in chunks],
        nbytes=[chunk.nbytes for chunk in chunks],
        encoding=[int(chunk.encoding) for chunk in chunks],
        element_nbytes=[chunk.element_nbytes for chunk in chunks],
        xxh3_128=b"".join(chunk.digest for chunk in chunks),
    )


def split_digests(digests: bytes) -> Iterable[bytes]:
    return (digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))


def checked_chunks(
    key: str, message: tier_pb2.StoredChunks, columns: ChunkColumns, chunk_bytes: int
) -> tuple[StoredChunk, ...]:
    """The chunks of a parsed table whose columns are of equal length.

    Raises:
        IntegrityError: an entry is out of bounds; the text says which.
    """
    packs = list(message.packs)
    if any(PACK_NAME.fullmatch(name) is None for name in packs) or len(set(packs)) != len(packs):
        raise bad_object(key, "names its packs badly, or one twice")
    parsed = (
        message.pack,
        message.offset,
        message.stored_nbytes,
        message.nbytes,
        message.encoding,
        message.element_nbytes,
    )
    if any(len(column) != count for column, count in zip(parsed, columns.lengths, strict=True)):
        raise bad_object(key, "a column of its table of chunks is not packed")
    chunks = []
    rows = zip(*parsed, split_digests(message.xxh3_128), strict=True)
    for index, (pack, offset, stored_nbytes, nbytes, encoding, element_nbytes, digest) in enumerate(rows):
        if pack >= len(packs):
            raise bad_object(key, f"chunk {index} lies in pack {pack} of {len(packs)}")
        kind = known_encoding(key, index, encoding)
        chunk = StoredChunk(nbytes, digest, packs[pack], offset, stored_nbytes, kind, element_nbytes)
        check_stored(key, index, chunk, chunk_bytes)
        chunks.append(chunk)
    return tuple(chunks)
