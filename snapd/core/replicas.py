"""What the ranks of a node hold alike: whether their shards say so, which bytes to compare, and whether shards that
leave bytes to each other have them all. Pure: layouts come in parsed, bytes are compared elsewhere.

A region is a run of bytes of a shard; one that replicas hold is named after its parameter, or after its first tensor,
as the trainer does. In a full shard all regions lie in the shard itself; in one that is shared out other ranks keep
some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import Place
from snapd.core.manifest import ShardRecord
from snapd.errors import IntegrityError

REPLICAS_DIFFER = (1 << 64) - 1  # of the control page's word `replicas_equal_step_plus_one`


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor in a region: what it is and where in the region it begins."""

    name: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes that several ranks hold. `holder`: another rank whose shard keeps them; `shard_offset` is then 0."""

    name: str
    nbytes: int
    ranks: tuple[int, ...]
    members: tuple[Member, ...]
    shard_offset: int
    holder: int | None

    def is_like(self, other: Region) -> bool:
        return (self.nbytes, self.ranks, self.members) == (other.nbytes, other.ranks, other.members)


@dataclass(frozen=True, slots=True)
class ShardReplicas:
    """The regions of one rank's shard that other ranks hold too, by name. `peers`: all those ranks."""

    rank: int
    regions: Mapping[str, Region]
    peers: frozenset[int]
    is_full: bool

    @classmethod
    def of(cls, rank: int, regions: Mapping[str, Region]) -> ShardReplicas:
        peers = frozenset(other for region in regions.values() for other in region.ranks) - {rank}
        return cls(rank, regions, peers, all(region.holder is None for region in regions.values()))


@dataclass(frozen=True, slots=True)
class Difference:
    """Why the replicas of a node are none: the first tensor, and the ranks, that it shows at."""

    tensor: str
    ranks: tuple[int, int]
    what: str

    def __str__(self) -> str:
        return f"ranks {self.ranks[0]} and {self.ranks[1]}: {self.tensor}: {self.what}"


@dataclass(frozen=True, slots=True)
class Pair:
    """One region in the shards of two ranks."""

    name: str
    ranks: tuple[int, int]
    offsets: tuple[int, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to compare: two places, where in each chunk they begin, and how many they are."""

    places: tuple[Place, Place]
    starts: tuple[int, int]
    nbytes: int


@dataclass(slots=True)
class ReplicaState:
    """What a job remembers: layouts by (rank, identity), references that were found good, the difference found."""

    known: dict[tuple[int, bytes], ShardReplicas] = field(default_factory=dict)
    resolved: set[frozenset[tuple[int, bytes]]] = field(default_factory=set)
    is_comparing: bool = False
    difference: str = ""


def node_ranks(first: int, count: int, *, rank: int, world_size: int) -> range:
    """The ranks of a node as a trainer states them; empty if they make no sense, or there is but one."""
    ranks = range(first, first + count)
    return ranks if count > 1 and rank in ranks and ranks.stop <= world_size else range(0)


def unlike(shards: Mapping[int, ShardReplicas]) -> Difference | None:
    """Where full shards of one node contradict each other: a tensor that a replica has otherwise, or not at all."""
    for rank, shard in sorted(shards.items()):
        for name, region in shard.regions.items():
            for other in region.ranks:
                if other == rank or other not in shards:
                    continue
                theirs = shards[other].regions.get(name)
                if theirs is None:
                    return Difference(name, (rank, other), "only the first has it")
                if not region.is_like(theirs):
                    return Difference(name, (rank, other), "of another shape, type or place in memory")
    return None


def pairs(shards: Mapping[int, ShardReplicas]) -> Iterator[Pair]:
    """Each region of full shards that are alike, in the shard of the lowest rank and in that of each other one."""
    for rank, shard in sorted(shards.items()):
        for name, region in shard.regions.items():
            here = sorted(set(region.ranks) & set(shards))
            if not here or rank != here[0]:
                continue
            for other in here[1:]:
                offsets = region.shard_offset, shards[other].regions[name].shard_offset
                yield Pair(name, (rank, other), offsets, region.nbytes)


def pieces(pair: Pair, one: ShardRecord, other: ShardRecord) -> Iterator[Piece]:
    """What is left to compare: nothing where whole chunks have equal hashes.

    Raises:
        IntegrityError: a layout names bytes that its shard does not have.
    """
    at, to, left = *pair.offsets, pair.nbytes
    size = one.chunk_bytes
    while left:
        (first, start), (second, begin) = divmod(at, size), divmod(to, size)
        count = min(left, size - start, size - begin)
        for record, index, end in ((one, first, start + count), (other, second, begin + count)):
            if index >= len(record.chunks) or end > record.chunks[index].nbytes:
                raise IntegrityError(
                    "a layout names bytes that its shard does not have", kind="layout", tensor=pair.name
                )
        mine, theirs = one.chunks[first], other.chunks[second]
        if start != begin or mine.digest != theirs.digest or mine.nbytes != theirs.nbytes:
            yield Piece((mine.place, theirs.place), (start, begin), count)
        at, to, left = at + count, to + count, left - count


def unresolved(shards: Mapping[int, ShardReplicas]) -> Difference | None:
    """A region that a shard leaves to another one of `shards` which does not keep it. Ranks not there are not
    judged.
    """
    for rank, shard in sorted(shards.items()):
        for name, region in shard.regions.items():
            if region.holder is None or region.holder not in shards:
                continue
            theirs = shards[region.holder].regions.get(name)
            if theirs is None or theirs.holder is not None or not region.is_like(theirs):
                return Difference(name, (rank, region.holder), "the second should keep it, and does not")
    return None


def layout_identity(record_chunks: Sequence[bytes], nbytes: int) -> bytes:
    """What makes two layouts the same: the digests of their chunks, and their size."""
    return b"".join((nbytes.to_bytes(8, "little"), *record_chunks))
