"""Stored chunks of a node's own disk that have gone bad: which snapshots they spoil, and how good ones replace them.

What is in memory still is written into a new pack, and the manifests name that one from then on: all snapshots that
shared the bad chunk are whole again at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import xxhash

from snapd.core.stored import Spot, StoredChunk, StoredShard
from snapd.tier.known_chunks import ChunkName
from snapd.tier.packs import PACK_BYTES_AIM
from snapd.tier.writing import PackPlan, PlannedChunk, ShardBytes


@dataclass(frozen=True, slots=True)
class Mended:
    """`chunks`: bad ones that nothing names any more; `nbytes`: written for them; `manifests`: that name others now;
    `left`: bad ones that are named still.
    """

    chunks: int
    nbytes: int
    manifests: int
    left: int


def name_of(chunk: StoredChunk) -> ChunkName:
    return chunk.digest, chunk.nbytes


def rotten_in(shards: Iterable[StoredShard], rotten: Mapping[Spot, str]) -> str:
    """What is wrong with the chunks of a snapshot, in words; empty: nothing is known to be."""
    if not rotten:
        return ""
    found = [
        f"rank {shard.rank}: chunk {index}: {rotten[chunk.spot]}"
        for shard in shards
        for index, chunk in enumerate(shard.chunks)
        if chunk.spot in rotten
    ]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]}{more}" if found else ""


def plan_again(
    shards: Sequence[ShardBytes], wanted: Collection[ChunkName], *, first_number: int
) -> list[PackPlan]:
    """Packs of the wanted chunks, as far as memory has them, each once. Memory that is bad itself is passed over."""
    packs: list[PackPlan] = []
    left = set(wanted)
    for number, shard in enumerate(shards):
        for index, chunk in enumerate(shard.record.chunks):
            if (chunk.digest, chunk.nbytes) not in left:
                continue
            with shard.memory.view(chunk.place, chunk.nbytes) as view:
                if xxhash.xxh3_128_digest(view) != chunk.digest:
                    continue
            left.discard((chunk.digest, chunk.nbytes))
            if not packs or packs[-1].raw_nbytes + chunk.nbytes > PACK_BYTES_AIM:
                packs.append(PackPlan(first_number + len(packs)))
            packs[-1].chunks.append(PlannedChunk(number, index))
            packs[-1].raw_nbytes += chunk.nbytes
    return packs


def with_places(
    shard: StoredShard, rotten: Mapping[Spot, str], good: Mapping[ChunkName, StoredChunk]
) -> StoredShard:
    """The shard with good chunks in the place of bad ones, as far as there are any; the shard itself if there are
    none.
    """
    chunks = tuple(good.get(name_of(c), c) if c.spot in rotten else c for c in shard.chunks)
    return replace(shard, chunks=chunks) if chunks != shard.chunks else shard
