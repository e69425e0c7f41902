"""Reading a shard's bytes out of the arena, every chunk checked by its hash.

A chunk is copied into private memory first and hashed there, so that what was checked is what is used even if
the daemon gives the frame away meanwhile (the snapshot was superseded or removed). Descriptors are the
caller's.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import xxhash
from snapd_proto import format_pb2

from snapd.errors import IntegrityError

CHUNK_BYTES_MAX = 1 << 30
HASH_BYTES = 16


def bad_shard(rank: int, chunk: int | None, what: str) -> IntegrityError:
    """The error for a part of a shard that cannot be used.

    Its context holds `rank` and, where one chunk is bad, `chunk`; else it is the record or the layout.
    """
    if chunk is None:
        return IntegrityError(what, kind="bad_shard", rank=rank)
    return IntegrityError(what, kind="bad_chunk", rank=rank, chunk=chunk)


def shard_hash(record: format_pb2.ShardRecord) -> bytes:
    """XXH3-128 of the chunk hashes, in order: what `ShardRecord.shard_xxh3_128` must hold."""
    return xxhash.xxh3_128_digest(b"".join(chunk.xxh3_128 for chunk in record.chunks))


class ShardBytes:
    """The byte string of one shard.

    Args:
        record: the shard's record, as the daemon gave it.
        descriptors: (rank, segment number) -> a descriptor open for reading, alive while this object is used.
        chunks_kept: verified chunks kept for the next read; neighbours in one chunk cost one hash then.
    Raises:
        IntegrityError: the record contradicts itself.
    """

    def __init__(
        self,
        record: format_pb2.ShardRecord,
        descriptors: Mapping[tuple[int, int], int],
        *,
        chunks_kept: int = 2,
    ) -> None:
        check_record(record)
        self.record = record
        self._descriptors = descriptors
        self._chunks_kept = chunks_kept
        self._kept: OrderedDict[int, memoryview] = OrderedDict()

    def chunk(self, index: int) -> memoryview:
        """The verified bytes of a chunk, in private memory.

        Raises:
            IntegrityError: its segment is missing or too short, or its bytes do not have the recorded hash.
        """
        kept = self._kept.get(index)
        if kept is not None:
            self._kept.move_to_end(index)
            return kept
        data = memoryview(self._read_frame(index)).toreadonly()
        if xxhash.xxh3_128_digest(data) != self.record.chunks[index].xxh3_128:
            raise bad_shard(self.record.rank, index, "the chunk does not have the XXH3-128 that was recorded")
        self._kept[index] = data
        while len(self._kept) > self._chunks_kept:
            self._kept.popitem(last=False)
        return data

    def pieces(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """The bytes [offset, offset + nbytes) of the shard, verified, in pieces within one chunk each."""
        chunk_bytes = self.record.chunk_bytes
        end = offset + nbytes
        while offset < end:
            index, start = divmod(offset, chunk_bytes)
            stop = min(end - index * chunk_bytes, chunk_bytes)
            held = self.record.chunks[index].nbytes if index < len(self.record.chunks) else 0
            if stop > held:
                last = index * chunk_bytes + stop - 1
                what = f"the layout names byte {last} of the shard, which no chunk holds"
                raise bad_shard(self.record.rank, index, what)
            yield self.chunk(index)[start:stop]
            offset = index * chunk_bytes + stop

    def read(self, offset: int, nbytes: int) -> bytes:
        """The same bytes in one piece; for what is small, or must be in one piece."""
        return b"".join(self.pieces(offset, nbytes))

    def _read_frame(self, index: int) -> bytearray:
        chunk = self.record.chunks[index]
        rank = self.record.rank
        descriptor = self._descriptors.get((chunk.segment_rank, chunk.segment))
        if descriptor is None:
            what = (
                f"the chunk lies in segment {chunk.segment} of rank {chunk.segment_rank}, which did not come"
            )
            raise bad_shard(rank, index, what)
        data = bytearray(chunk.nbytes)
        view, at = memoryview(data), chunk.frame * self.record.chunk_bytes
        while view:
            count = os.preadv(descriptor, [view], at)
            if count == 0:
                raise bad_shard(rank, index, f"segment {chunk.segment} ends before byte {at + len(view)}")
            view, at = view[count:], at + count
        return data


def check_record(record: format_pb2.ShardRecord) -> None:
    """Refuse a record with sizes out of bounds, before anything is allocated by them.

    Raises:
        IntegrityError: names the field and the value.
    """
    rank = record.rank
    if not 0 < record.chunk_bytes <= CHUNK_BYTES_MAX:
        raise bad_shard(
            rank, None, f"record: chunk_bytes {record.chunk_bytes} is not in 1..{CHUNK_BYTES_MAX}"
        )
    for index, chunk in enumerate(record.chunks):
        if chunk.nbytes > record.chunk_bytes or len(chunk.xxh3_128) != HASH_BYTES:
            what = f"record: a chunk of {chunk.nbytes} bytes with a hash of {len(chunk.xxh3_128)} bytes"
            raise bad_shard(rank, index, what)
    if record.shard_xxh3_128 and record.shard_xxh3_128 != shard_hash(record):
        raise bad_shard(rank, None, "record: shard_xxh3_128 is not the hash of the chunk hashes")
    held = record.chunk_bytes * len(record.chunks)
    ends = {
        "layout_nbytes": record.layout_nbytes,
        "early values": record.early_values_offset + record.early_values_nbytes,
    }
    for what, end in ends.items():
        if end > held:
            raise bad_shard(rank, None, f"record: {what} end at byte {end}, the shard has at most {held}")
