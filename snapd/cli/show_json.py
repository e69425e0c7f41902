"""What `snapd show --json` prints of a shard; sizes and offsets in bytes. Pure."""

from __future__ import annotations

from snapd_proto import format_pb2

from snapd.cli.shard_facts import Shard, own_chunks, range_chunks
from snapd.export.shard_view import exported_names, has_bytes, holder_rank


def shard_json(shard: Shard) -> dict[str, object]:
    """One shard of the JSON; sizes and offsets in bytes."""
    record = shard.record
    return {
        "rank": record.rank,
        "nbytes": shard.nbytes,
        "nbytes_shared": shard.nbytes_shared,
        "nbytes_unchanged": shard.nbytes_unchanged,
        "chunk_bytes": record.chunk_bytes,
        "shard_xxh3_128": record.shard_xxh3_128.hex(),
        "chunks": [
            chunk_json(index, chunk, references)
            for index, (chunk, references) in enumerate(zip(record.chunks, shard.references, strict=True))
        ],
        "ranges": ranges_json(shard),
        "tensors": tensors_json(shard),
    }


def chunk_json(index: int, chunk: format_pb2.Chunk, references: int) -> dict[str, object]:
    """One chunk of the JSON; `references`: how many snapshots hold it now."""
    since = {"generation": chunk.since_generation, "step": chunk.since_step}
    return {
        "index": index,
        "nbytes": chunk.nbytes,
        "xxh3_128": chunk.xxh3_128.hex(),
        "references": references,
        "unchanged_since": since if chunk.since_generation else None,
    }


def ranges_json(shard: Shard) -> list[dict[str, object]]:
    """The ranges of the layout, or nothing if it cannot be read."""
    if shard.layout is None:
        return []
    return [
        {
            "name": piece.name,
            "shard_offset": piece.shard_offset,
            "nbytes": piece.nbytes,
            "chunks": list(range_chunks(shard, piece)),
            "chunks_shared": shard.shared_count(range_chunks(shard, piece)),
        }
        for piece in shard.layout.ranges
    ]


def tensors_json(shard: Shard) -> list[dict[str, object]]:
    """The tensors of the layout, or nothing if it cannot be read."""
    layout = shard.layout
    if layout is None:
        return []
    names = exported_names(layout)
    result: list[dict[str, object]] = []
    for number, tensor in enumerate(layout.tensors):
        chunks, is_here = own_chunks(shard, layout, tensor)
        has_region = has_bytes(tensor) and tensor.nbytes > 0
        result.append(
            {
                "name": names.get(number, tensor.name),
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "strides": list(tensor.strides),
                "global_shape": list(tensor.global_shape),
                "local_offset": list(tensor.local_offset),
                "placements": list(tensor.distributed.placements),
                "class": tensor.subclass.type_name or None,
                "role": tensor.role,
                "is_frozen": tensor.is_frozen,
                "range": layout.regions[tensor.region].range_name if has_region else None,
                "nbytes": tensor.nbytes,
                "held_by_rank": shard.record.rank if is_here else holder_rank(layout, tensor),
                "chunks": list(chunks),
                "chunks_shared": shard.shared_count(chunks),
            }
        )
    return result
