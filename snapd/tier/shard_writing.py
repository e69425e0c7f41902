"""Shards into packs, and each one's manifest as soon as all packs that it needs are durable. Blocking."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from snapd.core.stored import StoredChunk, StoredShard
from snapd.tier.known_chunks import ChunkName, KnownChunks
from snapd.tier.manifests import shard_from_record
from snapd.tier.writing import PackWriter, ShardBytes, Stopped, WritePlan


def write_shards(
    writer: PackWriter,
    plan: WritePlan,
    shards: Sequence[ShardBytes],
    known: KnownChunks,
    stop: threading.Event,
    *,
    packed: Callable[[Sequence[StoredChunk]], None],
    write: Callable[[StoredShard], None],
) -> None:
    """Write what `plan` says of `shards`; the rest is in `known`. `packed`: the chunks of a pack that is durable now;
    `write`: the manifest of a shard, all of whose chunks are.

    Raises:
        Stopped: `stop` was set. IntegrityError: kind `chunk_digest`. What a store raises.
    """
    own: dict[ChunkName, StoredChunk] = {}
    done = -1
    with contextlib.closing(writer.write(plan.packs)) as packs:
        for number, needed in sorted(enumerate(plan.last_pack), key=lambda pair: pair[1]):
            while done < needed:
                stored = next(packs)
                done += 1
                own.update(((chunk.digest, chunk.nbytes), chunk) for chunk in stored)
                packed(stored)
            if stop.is_set():
                raise Stopped
            write(_stored(shards[number], own, known))


def _stored(shard: ShardBytes, own: dict[ChunkName, StoredChunk], known: KnownChunks) -> StoredShard:
    chunks: list[StoredChunk] = []
    for chunk in shard.record.chunks:
        stored = own.get((chunk.digest, chunk.nbytes)) or known.find(chunk.digest, chunk.nbytes)
        assert stored is not None  # the plan has every chunk, or it was known
        chunks.append(stored)
    return shard_from_record(shard.record, chunks)
