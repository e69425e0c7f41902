"""`python -m snapd_client.export dcp|torch SOURCE TARGET`: a snapshot for programs that know torch and not snapd.

SOURCE is what `snapd export --format safetensors` wrote; `snapd export --format dcp|torch` runs this. Tensors are read
from SOURCE one by one while they are written.

    dcp    TARGET becomes a checkpoint of torch.distributed.checkpoint: tensors are whole again by the boxes of their
           parts, so that any number of ranks loads it. Its `.metadata` is a pickle that torch itself writes, and reads.
    torch  TARGET/state.pt is one dictionary for `torch.load(path, weights_only=True, mmap=True)`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from .errors import SnapdError
from .export_tree import plain_state
from .exported import Box, Exported, Saved


def write_torch(source: Path, target: Path) -> None:
    """Write TARGET/state.pt. Sharded tensors are put together in memory, all of them; others are not copied.

    Raises:
        IntegrityError, NotRestorable: see Exported.
    """
    state = _read(plain_state(Exported(source)))
    target.mkdir(exist_ok=True)
    torch.save(state, target / "state.pt")


def _read(value: Any) -> Any:
    if isinstance(value, Saved):
        return value.read()
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_read(item) for item in value)
    return value


def write_dcp(source: Path, target: Path) -> None:
    """Write a checkpoint of torch.distributed.checkpoint. At most a few tensors are in memory at once.

    Raises:
        IntegrityError, NotRestorable: see Exported.
    """
    state = plain_state(Exported(source))
    save(state, storage_writer=FileSystemWriter(target), planner=_BoxPlanner(), no_dist=True)


class _BoxPlanner(DefaultSavePlanner):
    """Torch's own plan, but for tensors whose parts come from files, each with its place in the whole."""

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for name, value in self.state_dict.items():
            items += _items_of(name, value) if isinstance(value, Saved) else [_value_item(name)]
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self.state_dict[write_item.index.fqn]
        if isinstance(value, Saved):
            assert write_item.index.offset is not None
            return _box_at(value, tuple(write_item.index.offset)).read()
        written = io.BytesIO()
        torch.save(_read(value), written)
        return written


def _items_of(name: str, saved: Saved) -> list[WriteItem]:
    properties = TensorProperties(dtype=saved.dtype)
    size = torch.Size(saved.shape)
    return [
        WriteItem(
            index=MetadataIndex(name, torch.Size(box.offset), number),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)),
                properties=properties,
                size=size,
            ),
        )
        for number, box in enumerate(saved.boxes)
    ]


def _value_item(name: str) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name), type=WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0)
    )


def _box_at(saved: Saved, offset: tuple[int, ...]) -> Box:
    return next(box for box in saved.boxes if box.offset == offset)


WRITERS: Mapping[str, Any] = {"dcp": write_dcp, "torch": write_torch}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 3 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="snapd_client.export", description=__doc__)
    parser.add_argument("format", choices=sorted(WRITERS))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        WRITERS[options.format](options.source, options.target)
    except SnapdError as error:
        print(f"snapd: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
