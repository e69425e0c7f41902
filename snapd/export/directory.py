"""Writing a snapshot as a directory: `snapd restore --to DIR`.

    DIR/snapshot.json               job, generation, step, world size; every file with its size and XXH3-128
        rank-00000.safetensors      every tensor of the rank, by name, row-major, in its real type
        rank-00000.json             everything else (layout_json.py)

The directory appears complete or not at all: it is written beside its place under another name, synced, and
renamed.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from snapd.errors import ConfigError, IntegrityError
from snapd.export.contents import Contents, StoredTensor, contents_of
from snapd.export.layout_json import EXPORT_FORMAT, EXPORT_VERSION, parent_json, rank_json
from snapd.export.safetensors_file import write_file
from snapd.export.shard_bytes import bad_shard
from snapd.export.shard_view import ShardView, contents_of_chunk
from snapd.export.strides import gather
from snapd.export.tree_json import Json, TreeError

_ANOTHER_TARGET = "name a directory that does not exist yet or is empty"
Progress = Callable[[int], None]  # called with the number of bytes just written


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    name: str
    nbytes: int
    xxh3_128: str  # hex


@dataclass(frozen=True, kw_only=True)
class Export:
    """A finished export."""

    directory: Path
    files: list[ExportedFile]
    tensor_count: int
    nbytes: int


def check_target(target: Path) -> None:
    """Refuse a target that could lose something or cannot be written.

    Raises:
        ConfigError: it exists and is not an empty directory, or its parent is no directory.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target} exists and is not a directory", hint=_ANOTHER_TARGET)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty", hint=_ANOTHER_TARGET)
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a directory", hint="make it first")


def export_nbytes(views: Mapping[int, ShardView], ranks: Sequence[int]) -> int:
    """Tensor bytes that exporting these ranks writes, for a progress bar and a look at the free space."""
    return sum(_contents(views, rank).nbytes for rank in ranks)


def _contents(views: Mapping[int, ShardView], rank: int) -> Contents:
    return contents_of(views[rank].layout, {other: view.layout for other, view in views.items()})


def write_directory(
    target: Path,
    views: Mapping[int, ShardView],
    ranks: Sequence[int],
    *,
    progress: Progress = lambda nbytes: None,
) -> Export:
    """Export the shards of `ranks` to `target`.

    Args:
        target: a directory that does not exist, or is empty; its parent exists.
        views: opened shards by rank; besides `ranks`, those that hold bytes for them.
    Raises:
        ConfigError: see check_target.
        IntegrityError: a chunk or a layout is bad; names rank, chunk and the tensors in it. Nothing is left
            behind.
        OSError: the file system failed; nothing is left behind.
    """
    check_target(target)
    with working_folder(target, "partial") as working:
        files: list[ExportedFile] = []
        tensor_count = nbytes = 0
        for rank in sorted(ranks):
            contents = _contents(views, rank)
            files += _write_rank(working, views, rank, contents, progress)
            tensor_count += len(contents.stored)
            nbytes += contents.nbytes
        _write_json(working / "snapshot.json", _snapshot_json(views[min(ranks)], sorted(ranks), files))
        _sync_directory(working)
        working.rename(target)  # replaces an empty directory, and nothing else
    _sync_directory(target.parent)
    return Export(directory=target, files=files, tensor_count=tensor_count, nbytes=nbytes)


@contextmanager
def working_folder(target: Path, what: str) -> Iterator[Path]:
    """A folder of this process beside `target`, to be renamed to it; removed at the end. What a killed process left
    for the same target goes first: it holds no lock on it any more.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9]+\.{what}")
    for left in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        with _lock(left) as is_locked:
            if is_locked:
                shutil.rmtree(left, ignore_errors=True)
    working = target.parent / f".{target.name}.{os.getpid()}.{what}"
    with _made(working):
        try:
            yield working
        finally:
            shutil.rmtree(working, ignore_errors=True)


@contextmanager
def _made(working: Path) -> Iterator[None]:
    """Make a folder and lock it. Another process that tidies may find it before it is locked, and remove it."""
    while True:
        working.mkdir(mode=0o700)
        with _lock(working, is_waiting=True):
            if working.is_dir():
                yield
                return


@contextmanager
def _lock(folder: Path, *, is_waiting: bool = False) -> Iterator[bool]:
    """False: another process has it and `is_waiting` is not set, it is gone, or the file system knows no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if is_waiting else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _write_rank(
    working: Path, views: Mapping[int, ShardView], rank: int, contents: Contents, progress: Progress
) -> list[ExportedFile]:
    view = views[rank]
    tensors_path = working / f"rank-{rank:05d}.safetensors"

    def pieces_of(index: int) -> Iterator[bytes | bytearray | memoryview]:
        for piece in _tensor_pieces(views, contents.stored[index]):
            yield piece
            progress(len(piece))

    metadata = {
        "format": "pt",
        "written_by": EXPORT_FORMAT,
        "job": view.record.job,
        "generation": str(view.record.generation),
        "step": str(view.record.step),
        "rank": str(rank),
    }
    entries = [tensor.entry for tensor in contents.stored]
    try:
        rest = rank_json(view, contents, tensors_path.name)
    except TreeError as error:
        raise bad_shard(rank, None, f"layout: {error}") from error
    nbytes, digest = write_file(tensors_path, entries, pieces_of, metadata=metadata, sync=os.fsync)
    return [
        ExportedFile(name=tensors_path.name, nbytes=nbytes, xxh3_128=digest),
        _write_json(working / f"rank-{rank:05d}.json", rest),
    ]


def _tensor_pieces(
    views: Mapping[int, ShardView], tensor: StoredTensor
) -> Iterator[bytes | bytearray | memoryview]:
    """The tensor's bytes in row-major order: streamed where they lie so, else gathered in memory."""
    if tensor.nbytes == 0:
        return
    holder = views[tensor.holder_rank]
    try:
        if tensor.is_row_major:
            yield from holder.bytes_of.pieces(tensor.shard_offset, tensor.span_nbytes)
        else:
            span = holder.bytes_of.read(tensor.shard_offset, tensor.span_nbytes)
            yield gather(span, tensor.shape, tensor.strides, tensor.stored_type.itemsize)
    except IntegrityError as error:
        chunk = error.context.get("chunk")
        if not isinstance(chunk, int):
            raise
        inside = contents_of_chunk(holder.layout, holder.record, chunk)
        raise bad_shard(holder.record.rank, chunk, f"{error.message}; in it: {', '.join(inside)}") from error


def _snapshot_json(view: ShardView, ranks: Sequence[int], files: Sequence[ExportedFile]) -> dict[str, Json]:
    record = view.record
    return {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "job": record.job,
        "generation": record.generation,
        "step": record.step,
        "parent": parent_json(record),
        "world_size": record.world_size,
        "ranks": [*ranks],
        "files": [{"name": file.name, "nbytes": file.nbytes, "xxh3_128": file.xxh3_128} for file in files],
    }


def _write_json(path: Path, content: dict[str, Json]) -> ExportedFile:
    data = json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ExportedFile(name=path.name, nbytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
