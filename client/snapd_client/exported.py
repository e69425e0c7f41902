"""Reading what `snapd export --format safetensors` wrote, as torch tensors: nothing is copied before it is used.

Tensors that ranks hold parts of are put together by their boxes (offset and shape in the whole); of what all ranks hold
alike one copy is taken. Needs neither a daemon nor the safetensors library.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from .errors import IntegrityError, NotRestorable

FORMAT = "snapd-export"
VERSION = 1
HASH_BYTES = 16 << 20
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins, and its bytes."""

    offset: tuple[int, ...]
    rank: ExportedRank
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.entry["shape"])

    def read(self) -> torch.Tensor:
        return self.rank.tensor(self.entry)


@dataclass(frozen=True)
class Saved:
    """A tensor of the snapshot, wherever its parts lie. Boxes do not overlap and cover it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def read(self) -> torch.Tensor:
        """The whole tensor; where it is in one piece, its bytes are those of the file."""
        if len(self.boxes) == 1 and self.boxes[0].shape == self.shape:
            return self.boxes[0].read()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for box in self.boxes:
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            whole[place].copy_(box.read())
        return whole


class ExportedRank:
    """One rank's two files."""

    def __init__(self, folder: Path, rank: int, expected: Mapping[str, str]) -> None:
        name = f"rank-{rank:05d}.json"
        self.about: dict[str, Any] = json.loads(_checked(folder / name, expected[name]))
        self.rank = rank
        path = folder / self.about["tensors_file"]
        with path.open("rb") as file:
            # private: torch wants memory that it may write to, and nothing is ever written
            self._bytes = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        _check(path, self._bytes, expected[path.name])
        head_nbytes = int.from_bytes(self._bytes[:8], "little")
        self._head: dict[str, Any] = json.loads(self._bytes[8 : 8 + head_nbytes])
        self._start = 8 + head_nbytes

    def tensor(self, entry: Entry) -> torch.Tensor:
        """The tensor of an entry with bytes of its own."""
        dtype = dtype_of(entry["dtype"])
        first, last = self._head[entry["stored"]["name"]]["data_offsets"]
        if first == last:
            return torch.empty(tuple(entry["shape"]), dtype=dtype)
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=last - first, offset=self._start + first)
        if (self._start + first) % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(tuple(entry["shape"]))

    def digest(self, entry: Entry) -> bytes:
        first, last = self._head[entry["stored"]["name"]]["data_offsets"]
        with memoryview(self._bytes) as view:
            return xxhash.xxh3_128_digest(view[self._start + first : self._start + last])


class Exported:
    """A snapshot's directory, all ranks in it, every file checked by its hash.

    Raises:
        IntegrityError: a file is not what snapshot.json says. NotRestorable: ranks are missing, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "snapshot.json").read_text())
        if self.about.get("format") != FORMAT or self.about.get("version") != VERSION:
            raise NotRestorable("not a directory of `snapd export`, or of a newer one", folder=str(folder))
        if self.about["ranks"] != list(range(self.about["world_size"])):
            raise NotRestorable(
                "ranks are missing in the export", folder=str(folder), ranks=self.about["ranks"]
            )
        expected = {file["name"]: file["xxh3_128"] for file in self.about["files"]}
        self.ranks = [ExportedRank(folder, rank, expected) for rank in self.about["ranks"]]

    def saved(self, name: str) -> Saved | dict[str, Any]:
        """A tensor by its name in rank 0's tree; of a subclass its components, by attribute."""
        holders = [
            (rank, rank.about["tensors"][name]) for rank in self.ranks if name in rank.about["tensors"]
        ]
        rank, entry = holders[0]
        if "global_shape" not in entry:
            return self._whole(name, rank, entry)
        boxes: dict[tuple[int, ...], Box] = {}
        for holder, each in holders:
            placements = each.get("distributed", {}).get("placements", [])
            if any(placement.startswith("P") for placement in placements):
                raise NotRestorable(
                    "a tensor of partial sums has no one value", tensor=name, placements=placements
                )
            part = _local(each)
            if part is None:
                raise NotRestorable("parts of a tensor subclass cannot be put together", tensor=name)
            offset = tuple(each["local_offset"])
            if 0 not in part["shape"] or 0 in each["global_shape"]:
                boxes.setdefault(offset, Box(offset, holder, part))
        found = Saved(name, dtype_of(entry["dtype"]), tuple(entry["global_shape"]), tuple(boxes.values()))
        _check_covered(found)
        return found

    def _whole(self, name: str, rank: ExportedRank, entry: Entry) -> Saved | dict[str, Any]:
        part = _local(entry)
        if part is None:
            parts = entry.get("components", {})
            return {attribute: self._whole(name, rank, each) for attribute, each in parts.items()}
        shape = tuple(part["shape"])
        return Saved(name, dtype_of(part["dtype"]), shape, (Box((0,) * len(shape), rank, part),))

    def differing(self) -> Iterator[tuple[int, str, Saved]]:
        """Tensors of other ranks that are no parts of a whole, and not what rank 0 has (its buffers, for instance)."""
        first = self.ranks[0]
        for rank in self.ranks[1:]:
            for name, entry in rank.about["tensors"].items():
                if "global_shape" in entry or entry.get("role") in ("parameter", "optimizer"):
                    continue
                part, mine = _local(entry), _local(first.about["tensors"].get(name, {}))
                if part is None or (mine is not None and first.digest(mine) == rank.digest(part)):
                    continue
                shape = tuple(part["shape"])
                box = Box((0,) * len(shape), rank, part)
                yield rank.rank, name, Saved(name, dtype_of(part["dtype"]), shape, (box,))


def _local(entry: Entry) -> Entry | None:
    """The entry with the bytes: itself, or the one component of a DTensor."""
    if "stored" in entry:
        return entry
    parts = list(entry.get("components", {}).values())
    if "distributed" in entry and len(parts) == 1:
        return _local(parts[0])
    return None


def _check_covered(saved: Saved) -> None:
    held = sum(torch.Size(box.shape).numel() for box in saved.boxes)
    total = torch.Size(saved.shape).numel()
    if held != total:
        raise NotRestorable(
            "the ranks' parts do not make up the tensor", tensor=saved.name, held=held, total=total
        )


def dtype_of(name: str) -> torch.dtype:
    """Raises NotRestorable: this torch has no such type."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise NotRestorable("this torch has no such element type", dtype=name)
    return found


def _checked(path: Path, expected: str) -> bytes:
    data = path.read_bytes()
    _check(path, data, expected)
    return data


def _check(path: Path, data: bytes | mmap.mmap, expected: str) -> None:
    digest = xxhash.xxh3_128()
    with memoryview(data) as view:
        for start in range(0, len(view), HASH_BYTES):
            with view[start : start + HASH_BYTES] as piece:
                digest.update(piece)
    if digest.hexdigest() != expected:
        raise IntegrityError("a file of the export is not what snapshot.json says", file=str(path))
