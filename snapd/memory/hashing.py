"""XXH3-128 over frames, in pieces that release the GIL; byte-by-byte confirmation of hash hits."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
from snapd_native import CopyPlan

from snapd.core.ids import Place
from snapd.core.manifest import ShardRecord
from snapd.memory.segments import SegmentSet


def hash_frame(segments: SegmentSet, place: Place, nbytes: int) -> bytes:
    """Return the digest of the first `nbytes` of a frame. Blocking, without the GIL; run it in a thread."""
    with segments.view(place, nbytes) as view:
        return xxhash.xxh3_128_digest(view)


def hash_digests(digests: Sequence[bytes]) -> bytes:
    """The shard's own digest: over its chunks' digests, in order."""
    return xxhash.xxh3_128_digest(b"".join(digests))


def differing_pairs(segments: SegmentSet, pairs: Sequence[tuple[Place, Place, int]]) -> set[int]:
    """Compare frames pairwise, byte by byte; the indexes of the pairs that differ. Blocking; run it in a
    thread.
    """
    if not pairs:
        return set()
    count = len(pairs)
    plan = CopyPlan(
        list(range(count)),
        [0] * count,
        list(range(count)),
        [0] * count,
        [nbytes for *_, nbytes in pairs],
        [0] * count,
    )
    sources = [segments.address(first, nbytes) for first, _, nbytes in pairs]
    destinations = [segments.address(second, nbytes) for _, second, nbytes in pairs]
    return set(plan.differing(sources, destinations))


def bad_chunks(
    segments: SegmentSet, record: ShardRecord, first: int = 0, count: int | None = None
) -> list[tuple[int, str]]:
    """Hash chunks of a captured shard again; (chunk index, what is wrong) of the bad ones. Blocking."""
    last = len(record.chunks) if count is None else min(len(record.chunks), first + count)
    bad: list[tuple[int, str]] = []
    for index in range(first, last):
        chunk = record.chunks[index]
        if not segments.has(chunk.place, chunk.nbytes):
            bad.append((index, "lies outside its segment"))
            continue
        with segments.view(chunk.place, chunk.nbytes) as view:
            if xxhash.xxh3_128_digest(view) != chunk.digest:
                bad.append((index, "hash differs"))
    return bad
