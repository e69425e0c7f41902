#!/usr/bin/env python3
"""Reads snapshots out of a durable tier of snapd, from the bytes and docs/format.md alone: nothing of snapd is used.

    python tools/read_snapshot.py list DIR                        jobs and snapshots
    python tools/read_snapshot.py verify DIR [--job J] [--snapshot G-S]
    python tools/read_snapshot.py extract DIR --job J [--snapshot G-S] --out FOLDER

DIR is a directory tier, or a bucket's prefix that was downloaded as files. `verify` reads every byte that a snapshot
consists of, and the packs' own indexes. `extract` (the newest good snapshot unless named) writes FOLDER/G-S/rank-R/:
state.json with the whole state as a tree, and a file for each tensor, .npy where NumPy has the type and .bin
(row-major) where not.

Needs Python 3.11, `pip install xxhash zstandard`. Exit status: 0 good, 1 something is bad or not there, 2 usage.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
import zstandard

VERSION = 1
MAGIC = b"\x89SNAPD\r\n"
MIB = 1 << 20
NBYTES_MAX = {b"SHRD": 64 * MIB, b"SNAP": 32 * MIB, b"VOID": 4096}
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RECORD = re.compile(r"([0-9]{10}-[0-9]{15})\.r([0-9]{1,9})\.snapshot")
SHARD = re.compile(r"jobs/([^/]+)/shards/([0-9]{10}-[0-9]{15})/([0-9]{5})\.r[0-9]{1,9}\.shard")
PACK = re.compile(r"[0-9a-f]{32}-[0-9]{6}")
WRITE_ID = re.compile(r"[0-9a-f]{32}")
SNAPSHOT = re.compile(r"[0-9]{10}-[0-9]{15}")


class Bad(Exception):
    """What is wrong, beginning with the object's key."""


class Dropped(Bad):
    """The snapshot was dropped by retention; lower revisions do not count."""


# Protobuf's wire format


class Message:
    """Field number -> the values that were found, in order: int for varints and fixed sizes, bytes for the rest."""

    def __init__(self, data: bytes, what: str) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        self._what = what
        at = 0
        while at < len(data):
            tag, at = self._varint(data, at)
            number, kind = tag >> 3, tag & 7
            value: int | bytes
            if kind == 0:
                value, at = self._varint(data, at)
            elif kind == 2:
                nbytes, at = self._varint(data, at)
                value, at = data[at : at + nbytes], at + nbytes
            elif kind in (1, 5):
                width = 8 if kind == 1 else 4
                value, at = int.from_bytes(data[at : at + width], "little"), at + width
            else:
                raise Bad(f"{what}: field {number} has wire type {kind}")
            if at > len(data) or number == 0:
                raise Bad(f"{what}: field {number} does not fit into the message")
            self._fields.setdefault(number, []).append(value)

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                break
            value |= (data[at] & 0x7F) << shift
            at += 1
            if data[at - 1] < 0x80:
                return value & (1 << 64) - 1, at
        raise Bad(f"{self._what}: a number is cut off")

    def has(self, number: int) -> bool:
        return number in self._fields

    def number(self, number: int) -> int:
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise Bad(f"{self._what}: field {number} is no number")
        return value

    def signed(self, number: int) -> int:
        """Of a zigzag number."""
        value = self.number(number)
        return (value >> 1) ^ -(value & 1)

    def real(self, number: int) -> float:
        return float(struct.unpack("<d", self.number(number).to_bytes(8, "little"))[0])

    def raw(self, number: int) -> bytes:
        value = self._fields.get(number, [b""])[-1]
        if not isinstance(value, bytes):
            raise Bad(f"{self._what}: field {number} is no string of bytes")
        return value

    def text(self, number: int) -> str:
        return self.raw(number).decode()

    def texts(self, number: int) -> list[str]:
        return [value.decode() for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def message(self, number: int) -> Message:
        return Message(self.raw(number), self._what)

    def messages(self, number: int) -> list[Message]:
        return [Message(v, self._what) for v in self._fields.get(number, []) if isinstance(v, bytes)]

    def numbers(self, number: int) -> list[int]:
        """Repeated numbers, packed or not."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = self._varint(value, at)
                found.append(one)
        return found


def int64s(values: Sequence[int]) -> list[int]:
    return [value - (1 << 64) if value >> 63 else value for value in values]


# Objects


def opened(data: bytes, key: str, kind: bytes, job: str) -> Message:
    """The message in an envelope, checked."""
    if len(data) < 40 or data[:8] != MAGIC:
        raise Bad(f"{key}: no object of snapd, or cut off")
    if xxhash.xxh3_128_digest(data[:-16]) != data[-16:]:
        raise Bad(f"{key}: changed or cut off: the checksum differs")
    name, version, nbytes = struct.unpack_from("<4sIQ", data, 8)
    if version > VERSION:
        raise Bad(f"{key}: written in format {version}; this reader knows {VERSION}")
    if name != kind or len(data) > NBYTES_MAX[kind] or nbytes != len(data) - 40:
        raise Bad(f"{key}: kind {name!r} with {nbytes} bytes is not what belongs there")
    message = Message(data[24:-16], key)
    if message.number(1) != version:
        raise Bad(f"{key}: format version {message.number(1)} inside, {version} outside")
    if message.text(2) != job:
        raise Bad(f"{key}: belongs to job {message.text(2)!r}, not to {job!r}")
    return message


@dataclass(frozen=True)
class Chunk:
    pack: str
    offset: int
    stored_nbytes: int
    nbytes: int
    encoding: int
    width: int
    digest: bytes

    def check(self, key: str, index: int, chunk_bytes: int) -> None:
        where = f"{key}: chunk {index}"
        if self.encoding not in (0, 1, 2):
            raise Bad(f"{where} is in encoding {self.encoding}, which this reader does not know")
        is_sized = (
            self.stored_nbytes == self.nbytes if self.encoding == 0 else 8 < self.stored_nbytes < self.nbytes
        )
        if not 0 < self.nbytes <= chunk_bytes or not is_sized:
            raise Bad(f"{where} of {self.nbytes} bytes is stored in {self.stored_nbytes}")
        if self.width not in ((2, 4, 8) if self.encoding == 2 else (1,)):
            raise Bad(f"{where} has the element width {self.width}")
        if self.offset < 64 or self.offset + self.stored_nbytes > 1 << 30:
            raise Bad(f"{where} lies at byte {self.offset}")


def chunk_table(columns: Sequence[Sequence[Any]], digests: bytes, key: str) -> list[Chunk]:
    count = len(digests) // 16
    if len(digests) % 16 or any(len(column) != count for column in columns):
        raise Bad(f"{key}: the columns of its table of chunks are not equally long")
    parts = [digests[at : at + 16] for at in range(0, len(digests), 16)]
    return [Chunk(*row) for row in zip(*columns, parts, strict=True)]


def unpacked(stored: bytes, chunk: Chunk) -> bytes:
    """The chunk's raw bytes, checked."""
    where = f"pack {chunk.pack}, bytes {chunk.offset} to {chunk.offset + chunk.stored_nbytes}"
    if len(stored) != chunk.stored_nbytes:
        raise Bad(f"{where}: only {len(stored)} bytes are there")
    raw = stored
    if chunk.encoding:
        frame = stored[:-8]
        if xxhash.xxh3_64_digest(frame) != stored[-8:]:
            raise Bad(f"{where}: the stored bytes were changed: their checksum differs")
        try:
            if zstandard.frame_content_size(frame) != chunk.nbytes:
                raise Bad(f"{where}: the frame is not of {chunk.nbytes} bytes")
            raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=chunk.nbytes)
        except zstandard.ZstdError as error:
            raise Bad(f"{where}: the zstd frame is damaged: {error}") from error
    if chunk.encoding == 2:
        count = chunk.nbytes // chunk.width
        whole = bytearray(raw)
        for plane in range(chunk.width):
            whole[plane : count * chunk.width : chunk.width] = raw[plane * count : (plane + 1) * count]
        raw = bytes(whole)
    if len(raw) != chunk.nbytes or xxhash.xxh3_128_digest(raw) != chunk.digest:
        raise Bad(f"{where}: the chunk does not have the recorded XXH3-128")
    return raw


@dataclass
class Shard:
    """One rank's shard; `read` gives its bytes, every chunk verified."""

    tier: Tier
    job: str
    key: str
    rank: int
    chunk_bytes: int
    layout_nbytes: int
    early: tuple[int, int]
    identity: tuple[int, int]
    chunks: list[Chunk]
    kept: tuple[int, bytes] = (-1, b"")

    def chunk(self, index: int) -> bytes:
        if self.kept[0] != index:
            chunk = self.chunks[index]
            stored = self.tier.read(
                f"jobs/{self.job}/packs/{chunk.pack}.pack", chunk.offset, chunk.stored_nbytes
            )
            try:
                self.kept = (index, unpacked(stored, chunk))
            except Bad as error:
                raise Bad(f"{self.key}: chunk {index}: {error}") from error
        return self.kept[1]

    def pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, first byte in it, byte behind the last) of a run of bytes."""
        end = offset + nbytes
        while offset < end:
            index, start = divmod(offset, self.chunk_bytes)
            stop = min(end - index * self.chunk_bytes, self.chunk_bytes)
            if index >= len(self.chunks) or stop > self.chunks[index].nbytes:
                raise Bad(
                    f"{self.key}: no chunk holds byte {index * self.chunk_bytes + stop - 1} of the shard"
                )
            yield index, start, stop
            offset = index * self.chunk_bytes + stop

    def check_held(self, offset: int, nbytes: int) -> None:
        for _ in self.pieces(offset, nbytes):
            pass

    def read(self, offset: int, nbytes: int) -> bytes:
        return b"".join(self.chunk(index)[start:stop] for index, start, stop in self.pieces(offset, nbytes))


@dataclass
class Snapshot:
    job: str
    name: str
    revision: int
    shards: list[Shard]
    packs: list[str]
    nbytes: int
    notes: list[str] = field(default_factory=list)  # higher revisions that are not good


class Tier:
    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        try:
            with (self.root / key).open("rb") as file:
                file.seek(offset)
                return file.read() if nbytes is None else file.read(nbytes)
        except OSError as error:
            raise Bad(f"{key}: {error.strerror}") from error

    def size(self, key: str) -> int:
        try:
            return (self.root / key).stat().st_size
        except OSError as error:
            raise Bad(f"{key}: {error.strerror}") from error

    def manifest(self, key: str, most: int) -> bytes:
        if self.size(key) > most:
            raise Bad(f"{key}: larger than {most} bytes")
        return self.read(key)

    def jobs(self) -> list[str]:
        return sorted(
            p.parent.name for p in self.root.glob("jobs/*/snapshots") if JOB.fullmatch(p.parent.name)
        )

    def snapshots(self, job: str) -> dict[str, list[int]]:
        """Name -> revisions, the highest first; the newest snapshot first."""
        found: dict[str, list[int]] = {}
        for path in (self.root / "jobs" / job / "snapshots").glob("*"):
            match = RECORD.fullmatch(path.name)
            if match:
                found.setdefault(match[1], []).append(int(match[2]))
        return {name: sorted(found[name], reverse=True) for name in sorted(found, reverse=True)}

    def open(self, job: str, name: str, revisions: Sequence[int]) -> Snapshot:
        """The highest revision that is good."""
        wrong: list[str] = []
        for revision in revisions:
            try:
                snapshot = self._open_revision(job, name, revision)
            except Dropped as error:
                raise Dropped("; ".join([*wrong, str(error)])) from error
            except (Bad, UnicodeDecodeError) as error:
                wrong.append(str(error))
            else:
                snapshot.notes = wrong
                return snapshot
        raise Bad("; ".join(wrong))

    def _open_revision(self, job: str, name: str, revision: int) -> Snapshot:
        key = f"jobs/{job}/snapshots/{name}.r{revision}.snapshot"
        data = self.manifest(key, NBYTES_MAX[b"SNAP"])
        if data[8:12] == b"VOID":
            void = opened(data, key, b"VOID", job)
            if void.number(6):
                raise Dropped(f"{key}: the snapshot was dropped")
            raise Bad(f"{key}: its writing was given up")
        record = opened(data, key, b"SNAP", job)
        if (f"{record.number(3):010d}-{record.number(4):015d}", record.number(6)) != (name, revision):
            raise Bad(f"{key}: is the record of another snapshot")
        entries, world_size, packs = record.messages(11), record.number(5), record.texts(12)
        if not 0 < world_size <= 65536 or [entry.number(1) for entry in entries] != list(range(world_size)):
            raise Bad(f"{key}: does not name the shards of {world_size} ranks, each once and in order")
        if not packs or packs != sorted(set(packs)) or not all(map(PACK.fullmatch, packs)):
            raise Bad(f"{key}: its packs are not named as they should be")
        if not WRITE_ID.fullmatch(record.text(10)):
            raise Bad(f"{key}: its write id is none")
        shards = [self._shard(job, name, entry, record, key) for entry in entries]
        return Snapshot(job, name, revision, shards, packs, sum(entry.number(6) for entry in entries))

    def _shard(self, job: str, name: str, entry: Message, record: Message, record_key: str) -> Shard:
        key, rank = entry.text(2), entry.number(1)
        match = SHARD.fullmatch(key)
        if not match or (match[1], match[2], int(match[3])) != (job, name, rank):
            raise Bad(f"{record_key}: names {key!r} as the manifest of rank {rank}")
        data = self.manifest(key, NBYTES_MAX[b"SHRD"])
        if len(data) != entry.number(3) or xxhash.xxh3_128_digest(data) != entry.raw(4):
            raise Bad(f"{key}: is not the manifest that the commit record names")
        shard = opened(data, key, b"SHRD", job)
        table, chunk_bytes = shard.message(11), shard.number(7)
        names = table.texts(1)
        numbers = table.numbers(2)
        if any(number >= len(names) for number in numbers) or not set(names) <= set(record.texts(12)):
            raise Bad(f"{key}: names packs that it should not")
        columns: list[Sequence[Any]] = [
            [names[n] for n in numbers],
            *(table.numbers(column) for column in range(3, 8)),
        ]
        chunks = chunk_table(columns, table.raw(8), key)
        if not 0 < chunk_bytes <= 64 * MIB or chunk_bytes & (chunk_bytes - 1):
            raise Bad(f"{key}: chunks of {chunk_bytes} bytes")
        for index, chunk in enumerate(chunks):
            chunk.check(key, index, chunk_bytes)
        if not xxhash.xxh3_128_digest(table.raw(8)) == shard.raw(16) == entry.raw(5):
            raise Bad(f"{key}: the shard's digest is not that of its chunks' digests")
        same = (3, 4)
        parents = [
            tuple(message.number(n) for n in fields)
            for message, fields in ((record, (7, 8, 9)), (shard, (12, 13, 14)))
        ]
        if (
            any(shard.number(n) != record.number(n) for n in same)
            or (shard.number(5), shard.number(6)) != (rank, record.number(5))
            or parents[0] != parents[1]
            or sum(chunk.nbytes for chunk in chunks) != entry.number(6)
        ):
            raise Bad(f"{key}: is of another snapshot, rank, world or size than its commit record says")
        identity = (shard.number(3), shard.number(4))
        early = (shard.number(9), shard.number(10))
        return Shard(self, job, key, rank, chunk_bytes, shard.number(8), early, identity, chunks)

    def pack_index(self, job: str, name: str) -> dict[int, Chunk]:
        """Offset -> chunk, from the pack itself; header and footer are checked."""
        key = f"jobs/{job}/packs/{name}.pack"
        nbytes = self.size(key)
        head, tail = self.read(key, 0, 64), self.read(key, max(0, nbytes - 40), 40)
        if len(head) < 64 or nbytes < 104 or head[:8] != MAGIC or tail[-8:] != MAGIC:
            raise Bad(f"{key}: no pack, or cut off")
        if xxhash.xxh3_64_digest(head[:56]) != head[56:]:
            raise Bad(f"{key}: the header was changed")
        size, version, kind = struct.unpack_from("<QI4s", tail)
        if size > min(16 * MIB, nbytes - 104):
            raise Bad(f"{key}: an index of {size} bytes")
        index = self.read(key, nbytes - 40 - size, size)
        if xxhash.xxh3_128_digest(index + tail[:16]) != tail[16:32]:
            raise Bad(f"{key}: the index was changed")
        if max(version, struct.unpack_from("<I", head, 12)[0]) > VERSION:
            raise Bad(f"{key}: written in a newer format than {VERSION}")
        message = Message(index, key)
        names = {name.encode(), head[16:55], message.raw(2)}
        if (head[8:12], kind, head[55]) != (b"PACK", b"INDX", 0) or len(names) != 1:
            raise Bad(f"{key}: is not pack {name}")
        stored = message.numbers(3)
        offsets = list(itertools.accumulate(stored, initial=64))[:-1]
        columns: list[Sequence[Any]] = [
            [name] * len(stored),
            offsets,
            stored,
            *(message.numbers(n) for n in (4, 5, 6)),
        ]
        chunks = chunk_table(columns, message.raw(7), key)
        for number, chunk in enumerate(chunks):
            chunk.check(key, number, 64 * MIB)
        if 64 + sum(stored) + size + 40 != nbytes:
            raise Bad(f"{key}: its chunks do not fill it")
        return {chunk.offset: chunk for chunk in chunks}


# What a shard contains

NPY = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1", "complex64": "<c8",
    "complex128": "<c16",
}  # fmt: skip
SEQUENCES = ("", "list", "tuple", "set", "frozenset", "deque", "size", "bytearray")
MAPPINGS = ("", "dict", "ordered_dict", "default_dict")


def value_json(value: Message, depth: int = 0) -> Any:
    """The typed tree: [kind, ...] for each value, so that nothing is lost."""
    if depth > 200:
        raise Bad("the state is nested too deeply")

    def inner(message: Message) -> Any:
        return value_json(message, depth + 1)

    if value.has(1):
        return ["none"]
    if value.has(2):
        return ["bool", bool(value.number(2))]
    if value.has(3):
        return ["int", value.signed(3)]
    if value.has(4):
        return ["int", int.from_bytes(value.raw(4), "little", signed=True)]
    if value.has(5):
        return ["float", repr(value.real(5)), f"{value.number(5):016x}"]
    if value.has(6):
        return ["text", value.text(6)]
    if value.has(7):
        return ["bytes", base64.b64encode(value.raw(7)).decode()]
    if value.has(8):
        sequence = value.message(8)
        items = [inner(item) for item in sequence.messages(2)]
        return [SEQUENCES[sequence.number(1)], sequence.text(4), sequence.signed(3), items]
    if value.has(9):
        mapping = value.message(9)
        pairs = zip(mapping.messages(2), mapping.messages(3), strict=True)
        return [
            MAPPINGS[mapping.number(1)],
            mapping.text(4),
            [[inner(key), inner(item)] for key, item in pairs],
        ]
    if value.has(12):
        opaque = value.message(12)
        return ["object", opaque.text(1), opaque.text(3), inner(opaque.message(2))]
    if value.has(13):
        return ["named", value.message(13).text(1), value.message(13).text(2)]
    if value.has(16):
        return ["complex", f"{value.message(16).number(1):016x}", f"{value.message(16).number(2):016x}"]
    for number, name in ((10, "tensor"), (11, "scalar"), (14, "parameter"), (15, "same_as")):
        if value.has(number):
            return [name, value.number(number)]
    raise Bad("a value of a kind that this reader does not know")


@dataclass(frozen=True)
class Tensor:
    number: int
    name: str
    dtype: str
    shape: list[int]
    strides: list[int]
    region: int
    region_offset: int
    nbytes: int
    message: Message

    @property
    def has_bytes(self) -> bool:
        is_wrapper = self.message.has(12) or self.message.has(13)
        return not is_wrapper and not self.message.text(14).startswith("meta")

    @property
    def form(self) -> tuple[str, list[int], list[int]]:
        return self.dtype, self.shape, self.strides

    def about(self) -> dict[str, Any]:
        m = self.message
        known: dict[str, Any] = {
            "number": self.number, "name": self.name, "dtype": self.dtype, "shape": self.shape,
            "global_shape": m.numbers(5), "local_offset": m.numbers(6), "storage": m.number(10), "device": m.text(14),
            "is_parameter": bool(m.number(16)), "role": m.text(18), "field": m.text(19), "parameter": m.text(20),
        }  # fmt: skip
        if m.has(12):
            wrapper = m.message(12)
            known["subclass"] = wrapper.text(1)
            known["components"] = {c.text(1): c.number(2) for c in wrapper.messages(2)}
            known["context"] = value_json(wrapper.message(3)) if wrapper.has(3) else None
        if m.has(13):
            mesh = m.message(13)
            known["mesh"] = {
                "shape": mesh.numbers(1), "names": mesh.texts(2), "placements": mesh.texts(3),
                "coordinate": mesh.numbers(4), "ranks": mesh.numbers(5),
            }  # fmt: skip
        return known


def row_major(span: bytes, shape: Sequence[int], strides: Sequence[int], size: int) -> bytes:
    """The elements in the order of their indexes."""
    if not shape:
        return span[:size]
    if len(shape) == 1:
        if strides[0] == 1 or shape[0] == 1:
            return span[: shape[0] * size]
        return b"".join(span[i * strides[0] * size :][:size] for i in range(shape[0]))
    step = strides[0] * size
    return b"".join(row_major(span[i * step :], shape[1:], strides[1:], size) for i in range(shape[0]))


class ShardContents:
    """Layout, early values and tensors of one shard. `others`: of all ranks, for what replicas keep for each other."""

    def __init__(self, shard: Shard, others: dict[int, ShardContents]) -> None:
        self.shard, self.others = shard, others
        self.layout = Message(shard.read(0, shard.layout_nbytes), f"{shard.key}: layout")
        self.early = Message(shard.read(*shard.early), f"{shard.key}: early values")
        layout, chunk_bytes = self.layout, self.layout.number(5)
        if layout.number(1) > 1:
            raise Bad(f"{shard.key}: a layout of format {layout.number(1)}")
        if (layout.text(2), layout.number(3), chunk_bytes) != (shard.job, shard.rank, shard.chunk_bytes):
            raise Bad(f"{shard.key}: its layout is of another job, rank or chunk size")
        if (self.early.number(1), self.early.number(2)) != shard.identity:
            raise Bad(f"{shard.key}: its early values are of another snapshot")
        self.regions = layout.messages(8)
        self.tensors = [
            Tensor(
                i,
                m.text(1),
                m.text(2),
                m.numbers(3),
                int64s(m.numbers(4)),
                m.number(7),
                m.number(8),
                m.number(9),
                m,
            )
            for i, m in enumerate(layout.messages(9))
        ]
        self.by_name = {tensor.name: tensor for tensor in self.tensors if tensor.has_bytes}

    def element_nbytes(self, tensor: Tensor) -> int:
        """Bytes of an element; 0: the tensor is empty. What the layout says of the tensor is checked."""
        where = f"{self.shard.key}: tensor {tensor.name!r}"
        if 0 in tensor.shape or tensor.nbytes == 0:
            return 0
        if len(tensor.shape) != len(tensor.strides) or min(tensor.strides, default=0) < 0:
            raise Bad(f"{where}: shape {tensor.shape}, strides {tensor.strides}")
        elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        size, rest = divmod(tensor.nbytes, elements)
        if rest or tensor.region >= len(self.regions):
            raise Bad(f"{where}: {tensor.nbytes} bytes for {elements} elements in region {tensor.region}")
        shard, offset = self._place(tensor, where)
        shard.check_held(offset, tensor.nbytes)
        return size

    def bytes_of(self, tensor: Tensor) -> tuple[bytes, int]:
        """(elements in row-major order, bytes of an element)."""
        size = self.element_nbytes(tensor)
        if not size:
            return b"", 0
        shard, offset = self._place(tensor, tensor.name)
        return row_major(shard.read(offset, tensor.nbytes), tensor.shape, tensor.strides, size), size

    def _place(self, tensor: Tensor, where: str) -> tuple[Shard, int]:
        """The shard that holds the tensor's bytes, and where they begin."""
        region = self.regions[tensor.region]
        holder = region.number(5)
        if holder:
            other = self.others.get(holder - 1)
            theirs = other.by_name.get(tensor.name) if other else None
            if other is None or theirs is None or theirs.form != tensor.form:
                raise Bad(f"{where}: rank {holder - 1} should keep it and does not")
            if other.regions[theirs.region].number(5):
                raise Bad(f"{where}: rank {holder - 1} should keep it, and leaves it to another")
            return other._place(theirs, where)
        if tensor.region_offset + tensor.nbytes > region.number(2):
            raise Bad(f"{where}: ends behind its region")
        return self.shard, region.number(1) + tensor.region_offset

    def write(self, folder: Path) -> int:
        """state.json and a file for each tensor; returns how many."""
        folder.mkdir(parents=True)
        listed = []
        for tensor in self.tensors:
            about = tensor.about()
            if tensor.has_bytes:
                data, size = self.bytes_of(tensor)
                about["file"] = _write_tensor(folder / f"{tensor.number:06d}", tensor, data, size)
            listed.append(about)
        state = {
            "job": self.shard.job,
            "generation": self.shard.identity[0],
            "step": self.shard.identity[1],
            "rank": self.shard.rank,
            "tensors": listed,
            "parameters": [p.text(1) for p in self.layout.messages(10)],
            "scalars": [value_json(value) for value in self.early.messages(3)],
            "state": value_json(self.layout.message(11)) if self.layout.has(11) else None,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        return sum("file" in about for about in listed)


def _write_tensor(path: Path, tensor: Tensor, data: bytes, size: int) -> str:
    """Returns the file's name."""
    descr = NPY.get(tensor.dtype)
    if descr is None or (data and int(descr[2:]) != size) or len(data) != math.prod(tensor.shape) * size:
        path = path.with_suffix(".bin")
        path.write_bytes(data)
        return path.name
    path = path.with_suffix(".npy")
    shape = "(" + "".join(f"{n}, " for n in tensor.shape) + ")"
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return path.name


# Commands


def contents_of(snapshot: Snapshot) -> dict[int, ShardContents]:
    contents: dict[int, ShardContents] = {}
    for shard in snapshot.shards:
        contents[shard.rank] = ShardContents(shard, contents)
    return contents


def verify(tier: Tier, snapshot: Snapshot) -> list[str]:
    """Everything that is wrong with a snapshot whose manifests are good."""
    wrong: list[str] = []
    indexes: dict[str, dict[int, Chunk]] = {}
    for name in snapshot.packs:
        try:
            indexes[name] = tier.pack_index(snapshot.job, name)
        except (Bad, UnicodeDecodeError) as error:
            wrong.append(str(error))
    checked: set[tuple[str, int]] = set()
    for shard in snapshot.shards:
        for number, chunk in enumerate(shard.chunks):
            if chunk.pack in indexes and indexes[chunk.pack].get(chunk.offset) != chunk:
                wrong.append(f"{shard.key}: chunk {number} is not in the index of pack {chunk.pack}")
            if (chunk.pack, chunk.offset) not in checked:
                checked.add((chunk.pack, chunk.offset))
                try:
                    shard.chunk(number)
                except Bad as error:
                    wrong.append(str(error))
    if not wrong:
        try:
            for contents in contents_of(snapshot).values():
                for tensor in contents.tensors:
                    if tensor.has_bytes:
                        contents.element_nbytes(tensor)  # its bytes were read above
        except (Bad, UnicodeDecodeError, ValueError) as error:
            wrong.append(str(error))
    return wrong


def run_list(tier: Tier, args: argparse.Namespace) -> int:
    count = 0
    for job in [args.job] if args.job else tier.jobs():
        for name, revisions in tier.snapshots(job).items():
            try:
                s = tier.open(job, name, revisions)
                text = f"{len(s.shards)} ranks, {s.nbytes} bytes, {len(s.packs)} packs, revision {s.revision}"
                text += "".join(f"; passed over: {note}" for note in s.notes)
                count += 1
            except Dropped:
                text = "dropped"
            except Bad as error:
                text = f"BAD: {error}"
            print(f"{job} {name} {text}")
    return 0 if count else 1


def run_verify(tier: Tier, args: argparse.Namespace) -> int:
    good = bad = 0
    for job in [args.job] if args.job else tier.jobs():
        for name, revisions in tier.snapshots(job).items():
            if args.snapshot not in (None, name):
                continue
            try:
                snapshot = tier.open(job, name, revisions)
                wrong = verify(tier, snapshot) + snapshot.notes
            except Dropped:
                continue
            except Bad as error:
                wrong = [str(error)]
            for text in wrong:
                print(f"{job} {name} BAD: {text}")
            if not wrong:
                print(f"{job} {name} good: {snapshot.nbytes} bytes")
            good, bad = good + (not wrong), bad + bool(wrong)
    print(f"{good} good, {bad} bad")
    return 0 if good and not bad else 1


def run_extract(tier: Tier, args: argparse.Namespace) -> int:
    names = tier.snapshots(args.job)
    for name, revisions in names.items():
        if args.snapshot not in (None, name):
            continue
        folder = args.out / name
        try:
            contents = contents_of(tier.open(args.job, name, revisions))
            count = sum(c.write(folder / f"rank-{rank:05d}") for rank, c in contents.items())
        except (Bad, UnicodeDecodeError, ValueError) as error:
            print(f"{args.job} {name} BAD, what was written of it is not complete: {error}", file=sys.stderr)
            continue
        print(f"{args.job} {name}: {count} tensors of {len(contents)} ranks in {folder}")
        return 0
    print("no such snapshot that is good", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("list", run_list), ("verify", run_verify), ("extract", run_extract)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("dir", type=Path)
        command.add_argument("--job", required=name == "extract")
        if name != "list":
            command.add_argument("--snapshot", metavar="G-S", help="as its key has it: 10 and 15 digits")
        if name == "extract":
            command.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    if args.job and not JOB.fullmatch(args.job):
        parser.error("bad job name")
    if getattr(args, "snapshot", None) and not SNAPSHOT.fullmatch(args.snapshot):
        parser.error("a snapshot is named GENERATION-STEP with 10 and 15 digits, as `list` prints it")
    if not args.dir.is_dir():
        parser.error(f"{args.dir} is no directory")
    if (args.dir / ".snapd-node").is_file():
        parser.error(f"{args.dir} is the own disk of a node: no tier, for there are no commit records")
    return int(args.run(Tier(args.dir), args))


if __name__ == "__main__":
    raise SystemExit(main())
