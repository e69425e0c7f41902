"""`snapd show`: what a snapshot contains, tensor by tensor and chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import RenderableType
from snapd_proto import admin_pb2, format_pb2

from snapd.cli.connect import connected
from snapd.cli.ls import format_state, is_verified, summary_json
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import facts, format_moment, format_ranks, print_json, print_parts, table
from snapd.cli.shard_facts import Shard, own_chunks, range_chunks, shards_of
from snapd.cli.shards import read_layouts
from snapd.cli.show_json import shard_json
from snapd.cli.tier_shards import show_stored
from snapd.cli.tier_source import FromOption
from snapd.errors import NotFoundError
from snapd.export.shard_view import (
    exported_names,
    has_bytes,
    holder_rank,
    is_part,
    name_by_wrapper,
    wrappers,
)
from snapd.units import format_size

RANGE_HEADINGS = ("RANGE", "CHUNKS", "SIZE", "SHARED", "UNCHANGED")
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
    "UNCHANGED",
)
RIGHT = ("SIZE",)


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
    from_url: FromOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Show what a snapshot (the newest complete one) contains and which chunks it shares with others."""
    if from_url is None:
        with connected(runtime_dir) as client:
            reply = client.get_snapshot(job, step=step, generation=generation)
            layouts, problems = read_layouts(client, reply.shards)
    else:
        reply, layouts, problems = show_stored(from_url, job, step=step, generation=generation)
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


def snapshot_tables(
    summary: admin_pb2.SnapshotSummary, shards: Sequence[Shard], rank: int | None
) -> list[RenderableType]:
    """What is printed: the snapshot, the ranges of each rank, the tensors of one."""
    parts: list[RenderableType] = [facts(snapshot_facts(summary))]
    for shard in shards:
        record = shard.record
        head = f"rank {record.rank}: {len(record.chunks)} chunks of {format_size(record.chunk_bytes)}"
        once = f", of it {format_size(shard.nbytes_unchanged)} unchanged and stored once"
        parts += ["", f"{head}, {format_size(shard.nbytes)}" + (once if shard.nbytes_unchanged else "")]
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
        "here": f"ranks {format_ranks(summary.ranks_captured)}" if summary.is_clustered else "",
        "size": format_size(summary.nbytes) + (shared if summary.nbytes_shared else ""),
        "captured": format_moment(summary.captured_wall_time_s, time.time()),
        "resumed from": parent,
        "verified": "yes, since the daemon started" if is_verified(summary) else "",
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


def format_unchanged(shard: Shard, chunks: range) -> str:
    """Which of these chunks were stored for an earlier snapshot: "all since step 1", nothing for none."""
    kept = [shard.record.chunks[index] for index in chunks if shard.record.chunks[index].since_generation]
    if not kept:
        return ""
    first = min((chunk.since_generation, chunk.since_step) for chunk in kept)
    last = max((chunk.since_generation, chunk.since_step) for chunk in kept)
    count = "all" if len(kept) == len(chunks) else f"{len(kept)} of {len(chunks)}"
    return f"{count} since step{f' {first[1]}' if first == last else f's {first[1]} to {last[1]}'}"


def range_rows(shard: Shard) -> list[tuple[str, ...]]:
    """Rows under RANGE_HEADINGS."""
    assert shard.layout is not None
    return [
        (
            piece.name,
            format_chunks(range_chunks(shard, piece)),
            format_size(piece.nbytes),
            format_shared(shard, range_chunks(shard, piece)),
            format_unchanged(shard, range_chunks(shard, piece)),
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
        format_unchanged(shard, chunks),
    )


def format_shape(shape: Sequence[int]) -> str:
    """A shape: "512x64", "scalar" for none."""
    return "x".join(map(str, shape)) or "scalar"


def format_box(tensor: format_pb2.Tensor) -> str:
    """Global shape and local offset where the tensor is part of a larger one: "1024x64 at 512,0"."""
    if not tensor.global_shape or not (tensor.HasField("distributed") or is_part(tensor)):
        return ""
    return f"{format_shape(tensor.global_shape)} at {','.join(map(str, tensor.local_offset))}"
