"""Shards made by hand, for tests of what reads them: layout, early values, bytes, segments, record.

The bytes are laid out as format.proto says: layout, early values, then one range per name, each on chunks of
its own. Chunks lie in the segment back to front, so that a reader who ignores the chunk table fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from snapd_proto import format_pb2

EARLY_CAPACITY = 256


@dataclass
class BuiltShard:
    record: format_pb2.ShardRecord
    layout: format_pb2.ShardLayout
    segment: bytearray  # segment number 0 of the rank

    def chunk(self, index: int) -> bytes:
        """The bytes of a chunk, from where they lie."""
        at = self.record.chunks[index].frame * self.record.chunk_bytes
        return bytes(self.segment[at : at + self.record.chunks[index].nbytes])

    def flip_bit(self, chunk: int, byte: int = 0) -> None:
        """Corrupt a chunk where it lies."""
        at = self.record.chunks[chunk].frame * self.record.chunk_bytes + byte
        self.segment[at] ^= 0x10

    def open_descriptor(self, folder: Path) -> int:
        """The segment as a file of its own, open for reading."""
        path = folder / f"segment-{self.record.rank}-{self.record.generation}-{self.record.step}"
        path.write_bytes(self.segment)
        return os.open(path, os.O_RDONLY)


@dataclass
class ShardBuilder:
    job: str = "job"
    generation: int = 1
    step: int = 10
    rank: int = 0
    world_size: int = 1
    chunk_bytes: int = 4096
    layout: format_pb2.ShardLayout = field(default_factory=format_pb2.ShardLayout)
    early: format_pb2.EarlyValues = field(default_factory=format_pb2.EarlyValues)
    _data: list[bytes] = field(default_factory=list)  # per region

    def region(self, data: bytes, range_name: str = "parameters") -> int:
        """A region with these bytes; returns its number."""
        self.layout.regions.add(nbytes=len(data), range_name=range_name, when=format_pb2.Region.LAZY)
        self._data.append(data)
        return len(self.layout.regions) - 1

    def remote_region(self, holder: int, nbytes: int) -> int:
        """A region whose bytes another rank's shard holds, in tensors of the same names."""
        self.layout.regions.add(
            nbytes=nbytes,
            range_name="parameters",
            held_by_rank_plus_one=holder + 1,
        )
        self._data.append(b"")
        return len(self.layout.regions) - 1

    def tensor(
        self,
        name: str,
        dtype: str,
        shape: list[int],
        region: int,
        *,
        nbytes: int,
        strides: list[int] | None = None,
        region_offset: int = 0,
        **more: object,
    ) -> int:
        """A tensor over a region; returns its number."""
        if strides is None:
            strides = [1] * len(shape)
            for axis in range(len(shape) - 2, -1, -1):
                strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
        tensor = self.layout.tensors.add(
            name=name,
            dtype=dtype,
            shape=shape,
            strides=strides,
            region=region,
            region_offset=region_offset,
            nbytes=nbytes,
            device="cpu",
        )
        for key, value in more.items():
            setattr(tensor, key, value)
        return len(self.layout.tensors) - 1

    def plain(
        self, name: str, dtype: str, shape: list[int], data: bytes, range_name: str = "parameters"
    ) -> int:
        """A contiguous tensor in a region of its own; returns its number."""
        return self.tensor(name, dtype, shape, self.region(data, range_name), nbytes=len(data))

    def build(self) -> BuiltShard:
        """Fix the offsets and make the bytes."""
        layout, early = self.layout, self.early
        layout.format_version = 1
        layout.job, layout.rank, layout.world_size = self.job, self.rank, self.world_size
        layout.chunk_bytes = self.chunk_bytes
        layout.early_values_capacity = EARLY_CAPACITY
        early.generation, early.step = self.generation, self.step
        if layout.skeleton.WhichOneof("kind") is None:
            layout.skeleton.none.SetInParent()
        layout_chunks = 1
        while True:
            end = self._place(layout_chunks)
            if len(layout.SerializeToString()) <= layout_chunks * self.chunk_bytes:
                break
            layout_chunks += 1
        data = self._shard_bytes(end)
        return self._cut(data)

    def _place(self, layout_chunks: int) -> int:
        """Give every region its place; returns the end of the shard."""
        layout = self.layout
        del layout.ranges[:]
        layout.early_values_offset = layout_chunks * self.chunk_bytes
        at = layout.early_values_offset + EARLY_CAPACITY
        layout.ranges.add(name="early", shard_offset=layout.early_values_offset, nbytes=EARLY_CAPACITY)
        names = list(
            dict.fromkeys(region.range_name for region in layout.regions if not region.held_by_rank_plus_one)
        )
        for name in names:
            at = -(-at // self.chunk_bytes) * self.chunk_bytes
            start = at
            for region, data in zip(layout.regions, self._data, strict=True):
                if region.range_name == name and not region.held_by_rank_plus_one:
                    at = -(-at // 64) * 64
                    region.shard_offset = at
                    at += len(data)
            layout.ranges.add(name=name, shard_offset=start, nbytes=at - start)
        return at

    def _shard_bytes(self, end: int) -> bytearray:
        data = bytearray(end)
        serialized = self.layout.SerializeToString()
        data[: len(serialized)] = serialized
        early = self.early.SerializeToString()
        assert len(early) <= EARLY_CAPACITY
        at = self.layout.early_values_offset
        data[at : at + len(early)] = early
        for region, piece in zip(self.layout.regions, self._data, strict=True):
            if not region.held_by_rank_plus_one:
                data[region.shard_offset : region.shard_offset + len(piece)] = piece
        return data

    def _cut(self, data: bytearray) -> BuiltShard:
        size = self.chunk_bytes
        pieces = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
        segment = bytearray(len(pieces) * size)
        record = format_pb2.ShardRecord(
            format_version=1,
            job=self.job,
            generation=self.generation,
            step=self.step,
            rank=self.rank,
            world_size=self.world_size,
            chunk_bytes=size,
            layout_nbytes=len(self.layout.SerializeToString()),
            early_values_offset=self.layout.early_values_offset,
            early_values_nbytes=len(self.early.SerializeToString()),
            captured_wall_time_s=1_700_000_000.0,
        )
        for index, piece in enumerate(pieces):
            frame = len(pieces) - 1 - index
            segment[frame * size : frame * size + len(piece)] = piece
            record.chunks.add(
                nbytes=len(piece),
                xxh3_128=xxhash.xxh3_128_digest(piece),
                segment=0,
                frame=frame,
                segment_rank=self.rank,
            )
        record.shard_xxh3_128 = xxhash.xxh3_128_digest(b"".join(chunk.xxh3_128 for chunk in record.chunks))
        return BuiltShard(record, self.layout, segment)
