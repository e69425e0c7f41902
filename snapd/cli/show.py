"""`snapd show`: what a snapshot contains, tensor by tensor and chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import RenderableType
from snapd_proto import admin_pb2, format_pb2

from snapd.cli.connect import connected
from snapd.cli.ls import format_state, summary_json
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import facts, format_moment, format_ranks, print_json, print_parts, table
from snapd.cli.shards import read_layouts
from snapd.errors import NotFoundError
from snapd.export.shard_view import (
    chunk_span,
    exported_names,
    has_bytes,
    holder_rank,
    is_part,
    name_by_wrapper,
    wrappers,
)
from snapd.units import format_size

RANGE_HEADINGS = ("RANGE", "CHUNKS", "SIZE", "SHARED")
TENSOR_HEADINGS = (
    "TENSOR",
    "DTYPE",
    "SHAPE",
    "GLOBAL",
    "PLACEMENT",
    "ROLE",
    "RANGE",
    "SIZE",
    "CHUNKS",
    "SHARED",
)
RIGHT = ("SIZE",)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's record, how many snapshots hold each of its chunks, and its layout if it can be read."""

    record: format_pb2.ShardRecord
    references: Sequence[int]  # per chunk; 1: this snapshot alone
    layout: format_pb2.ShardLayout | None

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.record.chunks)

    @property
    def nbytes_shared(self) -> int:
        pairs = zip(self.record.chunks, self.references, strict=True)
        return sum(chunk.nbytes for chunk, references in pairs if references > 1)

    def shared_count(self, chunks: range) -> int:
        return sum(self.references[index] > 1 for index in chunks)


def show(
    job: Annotated[str, typer.Argument(help="The job.")],
    step: StepOption = None,
    generation: GenerationOption = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=0, help="List this rank's tensors. Default: the lowest.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Show what a snapshot (the newest complete one) contains and which chunks it shares with others."""
    with connected(runtime_dir) as client:
        reply = client.get_snapshot(job, step=step, generation=generation)
        layouts, problems = read_layouts(client, reply.shards)
    shards = shards_of(reply, layouts)
    if rank is not None and rank not in {shard.record.rank for shard in shards}:
        captured = format_ranks(reply.summary.ranks_captured)
        raise NotFoundError(f"no shard of rank {rank} in it", hint=f"there are {captured}")
    if as_json:
        chosen = [shard for shard in shards if rank is None or shard.record.rank == rank]
        print_json({**summary_json(reply.summary), "shards": [shard_json(shard) for shard in chosen]})
    else:
        print_parts(*snapshot_tables(reply.summary, shards, rank))
    for problem in problems:
        typer.echo(f"snapd: {problem}", err=True)
    return ExitCode.UNUSABLE if problems else ExitCode.DONE


def shards_of(reply: admin_pb2.GetSnapshotReply, layouts: dict[int, format_pb2.ShardLayout]) -> list[Shard]:
    """Records with their reference counts, which the reply holds one shard after the other."""
    counts = list(reply.chunk_reference_counts)
    shards: list[Shard] = []
    at = 0
    for record in reply.shards:
        references = counts[at : at + len(record.chunks)] or [1] * len(record.chunks)
        at += len(record.chunks)
        shards.append(Shard(record=record, references=references, layout=layouts.get(record.rank)))
    return sorted(shards, key=lambda shard: shard.record.rank)


def snapshot_tables(
    summary: admin_pb2.SnapshotSummary, shards: Sequence[Shard], rank: int | None
) -> list[RenderableType]:
    """What is printed: the snapshot, the ranges of each rank, the tensors of one."""
    parts: list[RenderableType] = [facts(snapshot_facts(summary))]
    for shard in shards:
        record = shard.record
        head = f"rank {record.rank}: {len(record.chunks)} chunks of {format_size(record.chunk_bytes)}"
        parts += ["", f"{head}, {format_size(shard.nbytes)}, of it shared {format_size(shard.nbytes_shared)}"]
        if shard.layout is not None:
            parts.append(table(RANGE_HEADINGS, range_rows(shard), right=RIGHT))
    chosen = next((s for s in shards if rank is None or s.record.rank == rank), None)
    if chosen is not None and chosen.layout is not None:
        note = "" if rank is not None or len(shards) == 1 else " (--rank lists another rank's)"
        parts += ["", f"tensors of rank {chosen.record.rank}{note}"]
        parts.append(table(TENSOR_HEADINGS, tensor_rows(chosen), right=RIGHT))
    return parts


def snapshot_facts(summary: admin_pb2.SnapshotSummary) -> dict[str, str]:
    """The snapshot as names and values."""
    parent = (
        f"generation {summary.parent_generation} step {summary.parent_step}" if summary.has_parent else ""
    )
    shared = f", of it {format_size(summary.nbytes_shared)} in chunks that other snapshots hold too"
    return {
        "snapshot": f"{summary.job} generation {summary.generation} step {summary.step}",
        "state": f"{format_state(summary)} ({summary.world_size} in all)",
        "size": format_size(summary.nbytes) + (shared if summary.nbytes_shared else ""),
        "captured": format_moment(summary.captured_wall_time_s, time.time()),
        "resumed from": parent,
        "verified": "yes, since the daemon started" if summary.verified else "",
        "problem": summary.problem,
    }


def format_chunks(chunks: range) -> str:
    """Chunk numbers: "3", "3-5", nothing for none."""
    if not chunks:
        return ""
    return str(chunks[0]) if len(chunks) == 1 else f"{chunks[0]}-{chunks[-1]}"


def format_shared(shard: Shard, chunks: range) -> str:
    """How many of these chunks other snapshots hold too: "all", "2 of 3", nothing for none."""
    count = shard.shared_count(chunks)
    if not count:
        return ""
    return "all" if count == len(chunks) else f"{count} of {len(chunks)}"


def range_chunks(shard: Shard, piece: format_pb2.Range) -> range:
    """Numbers of the chunks that a range of the layout fills."""
    size = shard.record.chunk_bytes
    last = min((piece.shard_offset + piece.nbytes + size - 1) // size, len(shard.record.chunks))
    return range(min(piece.shard_offset // size, last), last)


def range_rows(shard: Shard) -> list[tuple[str, ...]]:
    """Rows under RANGE_HEADINGS."""
    assert shard.layout is not None
    return [
        (
            piece.name,
            format_chunks(range_chunks(shard, piece)),
            format_size(piece.nbytes),
            format_shared(shard, range_chunks(shard, piece)),
        )
        for piece in shard.layout.ranges
    ]


def tensor_rows(shard: Shard) -> list[tuple[str, ...]]:
    """Rows under TENSOR_HEADINGS: a DTensor in one row with its local tensor, other wrappers before their parts."""
    layout = shard.layout
    assert layout is not None
    names, wrapper_of = exported_names(layout), wrappers(layout)
    rows: list[tuple[str, ...]] = []
    for number, tensor in enumerate(layout.tensors):
        if tensor.HasField("distributed"):
            continue
        name = names.get(number) or name_by_wrapper(layout, number, wrapper_of)
        wrapper, _ = wrapper_of.get(number, (None, ""))
        is_local = wrapper is not None and layout.tensors[wrapper].HasField("distributed")
        whole = layout.tensors[wrapper] if is_local and wrapper is not None else tensor
        rows.append(tensor_row(shard, tensor, name, whole))
    return rows


def tensor_row(
    shard: Shard, tensor: format_pb2.Tensor, name: str, whole: format_pb2.Tensor
) -> tuple[str, ...]:
    """One row under TENSOR_HEADINGS; `whole` is the DTensor that the tensor is the local part of, or itself."""
    layout = shard.layout
    assert layout is not None
    chunks, is_here = own_chunks(shard, layout, tensor)
    place = format_chunks(chunks) if is_here else f"with rank {holder_rank(layout, tensor)}"
    has_region = has_bytes(tensor) and tensor.nbytes > 0
    return (
        name,
        tensor.dtype,
        format_shape(tensor.shape),
        format_box(whole),
        " ".join(whole.distributed.placements),
        f"{whole.role}, frozen" if tensor.is_frozen else whole.role,
        layout.regions[tensor.region].range_name if has_region else "",
        format_size(tensor.nbytes) if has_region else "",
        place,
        format_shared(shard, chunks),
    )


def own_chunks(shard: Shard, layout: format_pb2.ShardLayout, tensor: format_pb2.Tensor) -> tuple[range, bool]:
    """Chunks of this shard that hold the tensor; False when another rank's shard does."""
    if has_bytes(tensor) and tensor.nbytes and holder_rank(layout, tensor) != shard.record.rank:
        return range(0), False
    chunks = chunk_span(layout, tensor)
    return range(chunks.start, min(chunks.stop, len(shard.record.chunks))), True


def format_shape(shape: Sequence[int]) -> str:
    """A shape: "512x64", "scalar" for none."""
    return "x".join(map(str, shape)) or "scalar"


def format_box(tensor: format_pb2.Tensor) -> str:
    """Global shape and local offset where the tensor is part of a larger one: "1024x64 at 512,0"."""
    if not tensor.global_shape or not (tensor.HasField("distributed") or is_part(tensor)):
        return ""
    return f"{format_shape(tensor.global_shape)} at {','.join(map(str, tensor.local_offset))}"


def shard_json(shard: Shard) -> dict[str, object]:
    """One shard of the JSON; sizes and offsets in bytes."""
    record = shard.record
    return {
        "rank": record.rank,
        "nbytes": shard.nbytes,
        "nbytes_shared": shard.nbytes_shared,
        "chunk_bytes": record.chunk_bytes,
        "shard_xxh3_128": record.shard_xxh3_128.hex(),
        "chunks": [
            {
                "index": index,
                "nbytes": chunk.nbytes,
                "xxh3_128": chunk.xxh3_128.hex(),
                "references": references,
            }
            for index, (chunk, references) in enumerate(zip(record.chunks, shard.references, strict=True))
        ],
        "ranges": ranges_json(shard),
        "tensors": tensors_json(shard),
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
