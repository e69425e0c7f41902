"""A shard of a tier as the byte string that exports read: chunks in batches, the next one on its way meanwhile.

What is kept does not depend on how many shards are open: a few batches for all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from snapd_proto import format_pb2

from snapd.core.ids import Place
from snapd.core.stored import StoredShard
from snapd.errors import NotRestorable
from snapd.export.shard_bytes import ShardBytes, bad_shard
from snapd.memory.records import record_to_proto
from snapd.tier.manifests import record_from_shard
from snapd.tier.reading import TierReader
from snapd.tier.streaming import Fault, Miss
from snapd.units import MIB

BATCH_BYTES = 16 * MIB
BATCHES_KEPT = 5  # for all shards together: what is read, what comes next, and what other regions need
_NOWHERE = Place(0, 0)

Batch = dict[int, memoryview | Miss]


def record_of(shard: StoredShard) -> format_pb2.ShardRecord:
    """The shard's record as the exports know it; where its chunks lie in an arena says nothing."""
    return record_to_proto(record_from_shard(shard, [_NOWHERE] * len(shard.chunks)))


class BatchReader:
    """Batches of all shards that are read together. Used by one thread; `close`, or leave the context."""

    def __init__(self, reader: TierReader, *, on_bytes: Callable[[int], None] = lambda nbytes: None) -> None:
        self.reader = reader
        self._on_bytes = on_bytes
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="snapd-ahead")
        self._batches: OrderedDict[tuple[int, int], Future[Batch]] = OrderedDict()

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._batches.clear()

    def chunk(self, shard: StoredShard, index: int) -> memoryview:
        """The verified bytes of a chunk.

        Raises:
            IntegrityError: kind `bad_chunk`: names the object. SnapdError: the store cannot be asked.
        """
        per_batch = max(1, BATCH_BYTES // shard.chunk_bytes)
        number = index // per_batch
        is_next = (shard.rank, number - 1) in self._batches
        batch = self._batch(shard, number, per_batch)
        if is_next and (number + 1) * per_batch < len(shard.chunks):
            self._batch(shard, number + 1, per_batch)
        found = batch.result()[index]
        if isinstance(found, memoryview):
            return found
        if found.fault is Fault.AWAY and found.error is not None:
            raise found.error
        if found.fault is Fault.STOPPED:
            raise NotRestorable("reading was called off", kind="stopping")
        raise bad_shard(shard.rank, index, found.what)

    def _batch(self, shard: StoredShard, number: int, per_batch: int) -> Future[Batch]:
        key = (shard.rank, number)
        batch = self._batches.get(key)
        if batch is None:
            first = number * per_batch
            indexes = range(first, min(first + per_batch, len(shard.chunks)))
            batch = self._batches[key] = self._ahead.submit(self._read, shard, indexes)
            while len(self._batches) > BATCHES_KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return batch

    def _read(self, shard: StoredShard, indexes: range) -> Batch:
        pieces = {index: memoryview(bytearray(shard.chunks[index].nbytes)) for index in indexes}
        misses = self.reader.read(shard, indexes, pieces.__getitem__)
        self._on_bytes(sum(piece.nbytes for piece in pieces.values()))
        batch: Batch = {index: piece.toreadonly() for index, piece in pieces.items()}
        batch.update({miss.index: miss for miss in misses})
        return batch


class StoredShardBytes(ShardBytes):
    """As `ShardBytes`, out of a tier."""

    def __init__(self, batches: BatchReader, shard: StoredShard) -> None:
        super().__init__(record_of(shard), {})
        self._batches = batches
        self._shard = shard

    def chunk(self, index: int) -> memoryview:
        return self._batches.chunk(self._shard, index)
