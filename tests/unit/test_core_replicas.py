"""Which bytes of replicas have to be compared, and which shards belong together. Pure."""

from __future__ import annotations

import pytest

from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.replicas import (
    Member,
    Pair,
    Region,
    ShardReplicas,
    node_ranks,
    pairs,
    pieces,
    unlike,
    unresolved,
)
from snapd.errors import IntegrityError

SIZE = 100


def record(rank: int, digests: str, last: int = SIZE) -> ShardRecord:
    """One chunk per letter: equal letters, equal bytes."""
    chunks = tuple(
        Chunk(last if index == len(digests) - 1 else SIZE, letter.encode() * 16, Place(0, index))
        for index, letter in enumerate(digests)
    )
    return ShardRecord(
        job="j", id=SnapshotId(1, 1), rank=rank, world_size=4, chunk_bytes=SIZE, layout_nbytes=1,
        early_values_offset=0, early_values_nbytes=0, chunks=chunks, parent=None, captured_wall_time_s=0.0, digest=b"",
    )  # fmt: skip


def region(
    name: str, ranks: tuple[int, ...], *, at: int = 0, nbytes: int = 50, holder: int | None = None
) -> Region:
    return Region(name, nbytes, ranks, (Member(name, 0, nbytes, "uint8", (nbytes,), (1,)),), at, holder)


def shard(rank: int, *regions: Region) -> ShardReplicas:
    return ShardReplicas.of(rank, {found.name: found for found in regions})


def left(offsets: tuple[int, int], nbytes: int, one: str, other: str) -> list[tuple[int, int, int]]:
    """(frame, start, nbytes) of the first rank's pieces."""
    found = pieces(Pair("x", (0, 1), offsets, nbytes), record(0, one), record(1, other))
    return [(piece.places[0].frame, piece.starts[0], piece.nbytes) for piece in found]


def test_chunks_of_equal_hash_are_equal_for_free() -> None:
    assert left((30, 30), 250, "abc", "abc") == []
    assert left((30, 30), 250, "abc", "aXc") == [(1, 0, 100)]
    assert left((30, 130), 150, "abz", "_ab") == [], "the same chunks, one place further on"


def test_bytes_at_other_places_in_their_chunks_are_compared() -> None:
    assert left((30, 40), 100, "ab", "ab") == [(0, 30, 60), (0, 90, 10), (1, 0, 30)]


@pytest.mark.parametrize("offset", [160, 200, 1 << 40])
def test_bytes_beyond_the_shard_are_an_error(offset: int) -> None:
    with pytest.raises(IntegrityError):
        list(pieces(Pair("x", (0, 1), (offset, 0), 50), record(0, "ab"), record(1, "ab")))


def test_every_replica_is_compared_with_the_lowest_rank_of_its_own_group() -> None:
    hybrid = {
        rank: shard(rank, region("w", (rank % 2, rank % 2 + 2)), region("norm", (0, 1, 2, 3)))
        for rank in range(4)
    }
    assert unlike(hybrid) is None
    found = sorted((pair.name, pair.ranks) for pair in pairs(hybrid))
    assert found == [
        ("norm", (0, 1)), ("norm", (0, 2)), ("norm", (0, 3)), ("w", (0, 2)), ("w", (1, 3)),
    ]  # fmt: skip


def test_replicas_on_other_nodes_play_no_part() -> None:
    here = {0: shard(0, region("w", (0, 8))), 1: shard(1, region("w", (1, 9)))}
    assert unlike(here) is None and list(pairs(here)) == []


def test_what_contradicts_itself_is_named() -> None:
    both = (0, 1)
    missing = unlike({0: shard(0, region("w", both), region("v", both)), 1: shard(1, region("w", both))})
    assert missing is not None and (missing.tensor, missing.ranks) == ("v", (0, 1))
    longer = unlike({0: shard(0, region("w", both)), 1: shard(1, region("w", both, nbytes=60))})
    assert longer is not None and longer.tensor == "w"
    lying = {0: shard(0, region("w", (2, 3))), 1: shard(1, region("w", (2, 3)))}
    assert list(pairs(lying)) == [], "a rank names replicas to which it does not belong"


def test_a_part_is_told_from_the_whole() -> None:
    assert shard(0, region("w", (0, 1))).is_full
    assert not shard(0, region("w", (0, 1), holder=1)).is_full


def test_what_is_left_to_another_must_be_there() -> None:
    both = (0, 1)
    kept, passed = region("w", both), region("w", both, holder=1)
    assert unresolved({0: shard(0, passed), 1: shard(1, kept)}) is None
    assert unresolved({0: shard(0, passed)}) is None, "the other shard is not there yet"
    for theirs in (shard(1), shard(1, region("w", both, holder=0)), shard(1, region("w", both, nbytes=51))):
        found = unresolved({0: shard(0, passed), 1: theirs})
        assert found is not None and (found.tensor, found.ranks) == ("w", (0, 1))


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [(2, 2, range(2, 4)), (0, 4, range(4)), (3, 1, range(0)), (0, 0, range(0)), (0, 2, range(0)), (2, 3, range(0))],
)  # fmt: skip
def test_the_ranks_of_a_node(first: int, count: int, expected: range) -> None:
    assert node_ranks(first, count, rank=3, world_size=4) == expected
