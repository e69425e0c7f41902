"""Manifests come back as they were written; what is damaged, another's, from the future or out of bounds is refused."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable

import pytest
import xxhash
from snapd_proto import tier_pb2

from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.stored import (
    Condemned,
    Encoding,
    Intent,
    Pin,
    ShardEntry,
    StoredChunk,
    StoredShard,
    StoredSnapshot,
)
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.errors import CapacityError, IntegrityError
from snapd.tier import envelope
from snapd.tier import manifests as m
from snapd.tier.envelope import Kind, wrap

WRITER = "ab" * 16
KEYS = TierKeys("job")
ID = SnapshotId(2, 10)
SIZE = 65536


def shard(rank: int = 0, world_size: int = 2) -> StoredShard:
    chunks = (
        StoredChunk(SIZE, b"a" * 16, pack_name(WRITER, 0), 64, SIZE, Encoding.RAW),
        StoredChunk(500, b"b" * 16, pack_name(WRITER, 1), 64, 400, Encoding.ZSTD),
        StoredChunk(
            SIZE, bytes([rank]) * 16, pack_name(WRITER, 0), 64 + SIZE, 999, Encoding.SHUFFLED_ZSTD, 4
        ),
    )
    digest = xxhash.xxh3_128_digest(b"".join(c.digest for c in chunks))
    return StoredShard(
        "job", ID, rank, world_size, SIZE, 300, SIZE, 500, chunks, SnapshotId(1, 7), 1.5, digest
    )


def snapshot() -> StoredSnapshot:
    entries = tuple(
        m.entry_of(shard(rank), KEYS.shard(ID, rank), m.encode_shard(shard(rank))) for rank in range(2)
    )
    packs = (pack_name(WRITER, 0), pack_name(WRITER, 1))
    return StoredSnapshot("job", ID, 2, 0, SnapshotId(1, 7), WRITER, entries, packs, 2.5)


SHARD_KEY, SNAPSHOT_KEY = KEYS.shard(ID, 0), KEYS.snapshot(ID)
INTENT = Intent("job", WRITER, "node-3", ID, (SnapshotId(2, 8), SnapshotId(1, 7)), 4)
CONDEMNED = Condemned(
    "job", 7, WRITER, (SNAPSHOT_KEY, SHARD_KEY, KEYS.intent(WRITER), KEYS.pack(pack_name(WRITER, 3)))
)
PIN = Pin("job", "best", ID)
OBJECTS: dict[str, tuple[bytes, str, Callable[..., object], object]] = {
    "shard": (m.encode_shard(shard()), SHARD_KEY, m.decode_shard, shard()),
    "snapshot": (m.encode_snapshot(snapshot()), SNAPSHOT_KEY, m.decode_snapshot, snapshot()),
    "intent": (m.encode_intent(INTENT), KEYS.intent(WRITER), m.decode_intent, INTENT),
    "condemned": (m.encode_condemned(CONDEMNED), KEYS.condemned_round(7), m.decode_condemned, CONDEMNED),
    "pin": (m.encode_pin(PIN), KEYS.pin("best"), m.decode_pin, PIN),
}
each_kind = pytest.mark.parametrize("kind", OBJECTS)


def refused(kind: str, call: Callable[[], object]) -> str:
    with pytest.raises(IntegrityError) as caught:
        call()
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


@each_kind
def test_an_object_comes_back_as_it_was_written(kind: str) -> None:
    data, key, decode, value = OBJECTS[kind]
    assert decode(data, key=key, job="job") == value


@each_kind
def test_every_flipped_bit_and_every_cut_is_found_and_named(kind: str) -> None:
    data, key, decode, _ = OBJECTS[kind]
    for index in range(len(data)):
        for bit in (1, 0x10, 0x80):
            bad = bytearray(data)
            bad[index] ^= bit
            assert key in refused("tier_manifest", lambda bad=bad: decode(bytes(bad), key=key, job="job"))
        refused("tier_manifest", lambda index=index: decode(data[:index], key=key, job="job"))
    refused("tier_manifest", lambda: decode(data + b"\0", key=key, job="job"))


@each_kind
def test_another_jobs_object_is_named_as_such(kind: str) -> None:
    data, key, decode, _ = OBJECTS[kind]
    theirs = key.replace("jobs/job/", "jobs/other/")
    assert "belongs to job 'job'" in refused("tier_job", lambda: decode(data, key=theirs, job="other"))


@each_kind
def test_an_object_at_another_place_is_refused(kind: str) -> None:
    data, _, decode, _ = OBJECTS[kind]
    elsewhere = {
        "shard": KEYS.shard(ID, 1),
        "snapshot": KEYS.snapshot(SnapshotId(2, 11)),
        "intent": KEYS.intent("cd" * 16),
        "condemned": KEYS.condemned_round(8),
        "pin": KEYS.pin("worst"),
    }[kind]
    assert elsewhere in refused("tier_manifest", lambda: decode(data, key=elsewhere, job="job"))
    assert "is of kind" in refused(
        "tier_manifest",
        lambda: decode(OBJECTS["pin" if kind != "pin" else "intent"][0], key=elsewhere, job="job"),
    )


@each_kind
def test_a_version_from_the_future_is_told_from_damage(kind: str) -> None:
    data, key, decode, _ = OBJECTS[kind]
    body = bytearray(data[:-16])
    struct.pack_into("<I", body, 12, 2)
    text = refused(
        "tier_version",
        lambda: decode(bytes(body) + xxhash.xxh3_128_digest(bytes(body)), key=key, job="job"),
    )
    assert "written in format 2" in text and key in text


def changed_shard(**fields: object) -> bytes:
    message = tier_pb2.StoredShard.FromString(m.encode_shard(shard())[24:-16])
    for name, value in fields.items():
        target, _, column = name.partition("__")
        if not column:
            setattr(message, name, value)
        elif isinstance(value, list):
            del getattr(message.chunks, column)[:]
            getattr(message.chunks, column).extend(value)
        else:
            setattr(message.chunks, column, value)
        assert target in ("chunks", name)
    if any(name.startswith("chunks__xxh3") for name in fields):
        message.shard_xxh3_128 = xxhash.xxh3_128_digest(message.chunks.xxh3_128)
    return wrap(Kind.SHARD, message.SerializeToString())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"rank": 1}, "is the shard of rank 1"),
        ({"generation": 10**10}, "generation"),
        ({"world_size": 0}, "rank 0 in a world of 0"),
        ({"world_size": 1 << 17}, "world"),
        ({"chunk_bytes": SIZE + 1}, "chunks of 65537 bytes"),
        ({"chunk_bytes": 1 << 40}, "chunks of"),
        ({"layout_nbytes": 0}, "no layout"),
        ({"layout_nbytes": 4 * SIZE}, "layout end at byte"),
        ({"layout_nbytes": SIZE + 501}, "beyond the end of chunk 1"),
        ({"early_values_nbytes": 501}, "beyond the end of chunk 1"),
        ({"early_values_offset": 2**63, "early_values_nbytes": 2**63}, "early values end at byte"),
        ({"shard_xxh3_128": b"x" * 16}, "digest"),
        ({"shard_xxh3_128": b""}, "digest"),
        ({"captured_wall_time_s": float("nan")}, "a time of nan"),
        ({"format_version": 0}, "format version 0"),
        ({"chunks__packs": ["../../x", pack_name(WRITER, 1)]}, "names its packs"),
        ({"chunks__packs": [pack_name(WRITER, 1)] * 2}, "names its packs"),
        ({"chunks__pack": [0, 1, 2]}, "chunk 2 lies in pack 2 of 2"),
        ({"chunks__pack": [0, 1]}, "do not belong together"),
        ({"chunks__xxh3_128": b"a" * 47}, "do not belong together"),
        ({"chunks__xxh3_128": b"a" * 64}, "do not belong together"),
        ({"chunks__nbytes": [SIZE, 500, SIZE * 2]}, "chunk 2 has 131072 bytes"),
        ({"chunks__nbytes": [SIZE, 500, 0]}, "chunk 2 has 0 bytes"),
        ({"chunks__nbytes": [SIZE - 1, 500, SIZE]}, "chunk 0 of 65535 bytes is stored RAW in 65536"),
        ({"chunks__stored_nbytes": [SIZE, 500, 999]}, "stored ZSTD in 500"),
        ({"chunks__stored_nbytes": [SIZE, 0, 999]}, "stored ZSTD in 0"),
        ({"chunks__element_nbytes": [1, 1, 3]}, "by 3 bytes"),
        ({"chunks__element_nbytes": [1, 1, 1]}, "by 1 bytes"),
        ({"chunks__element_nbytes": [4, 1, 4]}, "RAW by 4 bytes"),
        ({"chunks__offset": [63, 64, 64]}, "chunk 0 lies at byte 63"),
        ({"chunks__offset": [64, 64, 2**62]}, "chunk 2 lies at byte"),
    ],
)  # fmt: skip
def test_a_shard_out_of_bounds_is_refused(fields: dict[str, object], what: str) -> None:
    text = refused("tier_manifest", lambda: m.decode_shard(changed_shard(**fields), key=SHARD_KEY, job="job"))
    assert what in text and SHARD_KEY in text


def test_an_unknown_encoding_is_from_the_future() -> None:
    data = changed_shard(chunks__encoding=[0, 1, 77])
    assert "encoding 77" in refused("tier_version", lambda: m.decode_shard(data, key=SHARD_KEY, job="job"))


def test_unknown_fields_are_passed_over() -> None:
    payload = m.encode_shard(shard())[24:-16] + b"\xfa\x07\x03new"  # field 127
    assert m.decode_shard(wrap(Kind.SHARD, payload), key=SHARD_KEY, job="job") == shard()


def changed_snapshot(**fields: object) -> bytes:
    return m.encode_snapshot(dataclasses.replace(snapshot(), **fields))


def changed_entry(**fields: object) -> tuple[ShardEntry, ...]:
    first, second = snapshot().shards
    return first, dataclasses.replace(second, **fields)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"revision": 1}, "revision 1"),
        ({"world_size": 3}, "ranks 0 to 2"),
        ({"world_size": 0}, "a world of 0"),
        ({"shards": snapshot().shards[::-1]}, "each once and in order"),
        ({"shards": changed_entry(rank=0)}, "each once and in order"),
        ({"shards": changed_entry(key="jobs/other/shards/x")}, "names 'jobs/other/shards/x'"),
        ({"shards": changed_entry(key=KEYS.shard(ID, 0))}, "as the manifest of rank 1"),
        ({"shards": changed_entry(manifest_digest=b"short")}, "a digest of rank 1"),
        ({"shards": changed_entry(shard_digest=b"")}, "a digest of rank 1"),
        ({"shards": changed_entry(manifest_nbytes=1 << 40)}, "a manifest of"),
        ({"shards": changed_entry(manifest_nbytes=0)}, "a manifest of 0 bytes"),
        ({"write_id": "nobody"}, "write id"),
        ({"packs": snapshot().packs[::-1]}, "not in order"),
        ({"packs": ()}, "not in order"),
        ({"packs": ("../x",)}, "by a name that is none"),
        ({"committed_wall_time_s": float("inf")}, "a time of inf"),
    ],
)  # fmt: skip
def test_a_commit_record_out_of_bounds_is_refused(fields: dict[str, object], what: str) -> None:
    text = refused(
        "tier_manifest", lambda: m.decode_snapshot(changed_snapshot(**fields), key=SNAPSHOT_KEY, job="job")
    )
    assert what in text


def test_a_manifest_that_was_not_committed_is_refused() -> None:
    record = snapshot()
    entry = record.shards[0]
    assert m.decode_entry(m.encode_shard(shard()), entry, record) == shard()
    later = m.encode_shard(dataclasses.replace(shard(), captured_wall_time_s=9.0))
    assert "not the manifest that the commit record names" in refused(
        "tier_manifest", lambda: m.decode_entry(later, entry, record)
    )
    for wrong, what in (
        (dataclasses.replace(record, packs=record.packs[:1]), "which the commit record does not name"),
        (dataclasses.replace(record, parent=None), "its commit record is not"),
    ):
        data = m.encode_shard(shard())
        assert what in refused(
            "tier_manifest", lambda wrong=wrong, data=data: m.decode_entry(data, entry, wrong)
        )


def test_a_record_becomes_a_manifest_and_a_record_again() -> None:
    stored = shard()
    places = [Place(1, number) for number in range(3)]
    record = m.record_from_shard(stored, places)
    assert record.places == places and isinstance(record, ShardRecord)
    assert [type(chunk) for chunk in record.chunks] == [Chunk] * 3
    assert m.shard_from_record(record, stored.chunks) == stored


@pytest.mark.parametrize(
    "key",
    [
        "jobs/other/packs/" + pack_name(WRITER, 0) + ".pack",
        "jobs/job/pins/best.pin",
        "../x",
        "jobs/job/packs/",
    ],
)
def test_a_condemned_list_names_nothing_that_must_stay(key: str) -> None:
    data = m.encode_condemned(dataclasses.replace(CONDEMNED, keys=(key,)))
    assert "nothing to delete" in refused(
        "tier_manifest", lambda: m.decode_condemned(data, key=KEYS.condemned_round(7), job="job")
    )


def test_bombs_are_counted_before_they_are_parsed() -> None:
    many = tier_pb2.StoredSnapshot(format_version=1, job="job", generation=2, step=10).SerializeToString()
    many += b"\x5a\x00" * 70_000  # empty shard entries
    data = wrap(Kind.SNAPSHOT, many)
    assert "more than 65536 of field 11" in refused(
        "tier_manifest", lambda: m.decode_snapshot(data, key=SNAPSHOT_KEY, job="job")
    )
    twice = m.encode_shard(shard())[24:-16] + b"\x5a\x00"  # a second table would be merged into the first
    assert "more than 1 of field 11" in refused(
        "tier_manifest", lambda: m.decode_shard(wrap(Kind.SHARD, twice), key=SHARD_KEY, job="job")
    )
    columns = tier_pb2.StoredChunks(pack=[0] * 1_000_000).SerializeToString()
    payload = tier_pb2.StoredShard(format_version=1, job="job").SerializeToString()
    payload += b"\x5a" + _varint(len(columns)) + columns
    assert "do not belong together" in refused(
        "tier_manifest", lambda: m.decode_shard(wrap(Kind.SHARD, payload), key=SHARD_KEY, job="job")
    )


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@pytest.mark.parametrize("tail", [b"\x0b", b"\x00\x00", b"\x5a\xff\xff\x03", b"\xff" * 11, b"\x0d\x01"])
def test_bytes_that_are_no_message_are_refused(tail: bytes) -> None:
    data = wrap(Kind.PIN, m.encode_pin(PIN)[24:-16] + tail)
    assert re.search(
        "does not parse: ",
        refused("tier_manifest", lambda: m.decode_pin(data, key=KEYS.pin("best"), job="job")),
    )


def test_a_manifest_that_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envelope.NBYTES_MAX, Kind.SHARD, 200)
    with pytest.raises(CapacityError) as caught:
        m.encode_shard(shard())
    assert caught.value.kind == "tier_manifest_size"
