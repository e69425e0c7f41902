"""Whatever the payload of an object is, decoding it gives a value or an IntegrityError that names the key, and nothing
else, even where the checksum is right. And every value comes back.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.codec.compress import ChunkEncoder, decode_chunk
from snapd.core.ids import SnapshotId
from snapd.core.stored import (
    Condemned,
    Encoding,
    Intent,
    Pin,
    StoredChunk,
    StoredShard,
    StoredSnapshot,
    VoidRecord,
)
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.errors import IntegrityError
from snapd.tier import manifests as m
from snapd.tier.envelope import MAGIC, Kind, wrap
from snapd.tier.notes import decode_void, encode_void
from snapd.tier.packs import PackBuilder, parse_footer

WRITER = "0123456789abcdef" * 2
KEYS = TierKeys("job")
ID = SnapshotId(12, 345)
SIZE = 4096


@st.composite
def chunks(draw: st.DrawFn, nbytes: int) -> StoredChunk:
    encoding = draw(st.sampled_from(Encoding)) if nbytes > 1 else Encoding.RAW
    stored = nbytes if encoding is Encoding.RAW else draw(st.integers(1, nbytes - 1))
    width = draw(st.sampled_from([2, 4, 8])) if encoding is Encoding.SHUFFLED_ZSTD else 1
    name = pack_name(WRITER, draw(st.integers(0, 3)))
    offset = draw(st.integers(64, (1 << 30) - stored))
    return StoredChunk(
        nbytes, draw(st.binary(min_size=16, max_size=16)), name, offset, stored, encoding, width
    )


@st.composite
def shards(draw: st.DrawFn) -> StoredShard:
    sizes = [SIZE, *draw(st.lists(st.integers(1, SIZE), max_size=8))]
    table = tuple(draw(chunks(nbytes)) for nbytes in sizes)
    early = draw(st.integers(0, sizes[-1]))
    return StoredShard(
        job="job",
        id=ID,
        rank=3,
        world_size=draw(st.integers(4, 1 << 16)),
        chunk_bytes=SIZE,
        layout_nbytes=draw(st.integers(1, SIZE)),
        early_values_offset=(len(sizes) - 1) * SIZE,
        early_values_nbytes=early,
        chunks=table,
        parent=draw(st.none() | st.builds(SnapshotId, st.integers(0, 10**10 - 1), st.integers(0, 1 << 48))),
        captured_wall_time_s=draw(st.floats(allow_nan=False, allow_infinity=False)),
        digest=xxhash.xxh3_128_digest(b"".join(chunk.digest for chunk in table)),
    )


@settings(max_examples=100, deadline=None)
@given(shards())
def test_every_shard_comes_back(shard: StoredShard) -> None:
    key = KEYS.shard(ID, 3)
    assert m.decode_shard(m.encode_shard(shard), key=key, job="job") == shard


def _shard() -> StoredShard:
    table = tuple(
        StoredChunk(SIZE, bytes([i]) * 16, pack_name(WRITER, i % 2), 64 + i * SIZE, 99 + i, Encoding.ZSTD)
        for i in range(5)
    )
    digest = xxhash.xxh3_128_digest(b"".join(chunk.digest for chunk in table))
    return StoredShard("job", ID, 0, 1, SIZE, 100, SIZE, 200, table, SnapshotId(1, 2), 3.5, digest)


SHARD_KEY = KEYS.shard(ID, 0)
RECORD = StoredSnapshot(
    "job", ID, 1, 0, None, WRITER, (m.entry_of(_shard(), SHARD_KEY, m.encode_shard(_shard())),),
    tuple(sorted(_shard().packs)), 1.0,
)  # fmt: skip
OBJECTS: dict[str, tuple[Kind, bytes, str, Callable[..., Any]]] = {
    "shard": (Kind.SHARD, m.encode_shard(_shard()), SHARD_KEY, m.decode_shard),
    "snapshot": (Kind.SNAPSHOT, m.encode_snapshot(RECORD), KEYS.snapshot(ID), m.decode_snapshot),
    "void": (Kind.VOID, encode_void(VoidRecord("job", ID, 0, True, WRITER)), KEYS.snapshot(ID), decode_void),
    "intent": (
        Kind.INTENT,
        m.encode_intent(Intent("job", WRITER, "n", ID, (ID, ID), 9)),
        KEYS.intent(WRITER),
        m.decode_intent,
    ),
    "condemned": (
        Kind.CONDEMNED,
        m.encode_condemned(Condemned("job", 4, WRITER, (SHARD_KEY,))),
        KEYS.condemned_round(4),
        m.decode_condemned,
    ),
    "pin": (Kind.PIN, m.encode_pin(Pin("job", "best", ID)), KEYS.pin("best"), m.decode_pin),
}  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


def edited(payload: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """Some bytes replaced, put in, or taken away."""
    for place, cut, new in changes:
        at = place % (len(payload) + 1)
        payload = payload[:at] + new + payload[at + cut :]
    return payload


@pytest.mark.parametrize("name", OBJECTS)
@settings(max_examples=250, deadline=None)
@given(changes=edits)
def test_a_forged_payload_is_a_value_or_an_integrity_error(
    name: str, changes: list[tuple[int, int, bytes]]
) -> None:
    kind, data, key, decode = OBJECTS[name]
    try:
        decode(wrap(kind, edited(data[24:-16], changes)), key=key, job="job")
    except IntegrityError as error:
        assert error.kind in ("tier_manifest", "tier_version", "tier_job", "tier_void")
        assert key in str(error)


@settings(max_examples=250, deadline=None)
@given(changes=edits, counted=st.booleans())
def test_a_forged_index_is_a_value_or_an_integrity_error(
    changes: list[tuple[int, int, bytes]], counted: bool
) -> None:
    name = pack_name(WRITER, 1)
    key, builder = KEYS.pack(name), PackBuilder(name)
    for i in range(4):
        builder.add(nbytes=500, digest=bytes([i]) * 16, stored_nbytes=400 + i, encoding=Encoding.ZSTD)
    index = edited(builder.footer()[:-40], changes)
    body = index + struct.pack("<QI4s", len(index) if counted else changes[0][0], 1, b"INDX")
    footer = body + xxhash.xxh3_128_digest(body) + MAGIC
    try:
        parse_footer(footer, key=key, name=name, pack_nbytes=builder.nbytes + len(footer))
    except IntegrityError as error:
        assert error.kind in ("tier_pack", "tier_manifest", "tier_version")
        assert key in str(error)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.binary(min_size=1, max_size=300),
    times=st.integers(1, 400),
    width=st.sampled_from([1, 2, 4, 8]),
    mode=st.sampled_from(["off", "auto", "always"]),
    level=st.sampled_from([1, 3]),
)
def test_every_chunk_comes_back(seed: bytes, times: int, width: int, mode: str, level: int) -> None:
    raw = memoryview(seed * times)
    way = ChunkEncoder(mode, level).encode(raw, width)
    chunk = StoredChunk(
        len(raw), xxhash.xxh3_128_digest(raw), "pack", 64, way.nbytes, way.encoding, way.element_nbytes
    )
    assert way.nbytes <= len(raw)
    out = memoryview(bytearray(len(raw)))
    decode_chunk(way.buffer, chunk, out)
    assert out == raw
    if way.encoding is not Encoding.RAW:  # not one bit may differ, even where that would change nothing
        bad = bytearray(way.buffer)
        bad[seed[0] % len(bad)] ^= 1 << (times % 8)
        with pytest.raises(IntegrityError):
            decode_chunk(bytes(bad), dataclasses.replace(chunk), out)
