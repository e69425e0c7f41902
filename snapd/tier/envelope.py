"""What every object of a tier begins and ends with: magic, kind, format version, length; a checksum of all before.

    offset  bytes  what
    0       8      magic: 89 53 4E 41 50 44 0D 0A ("\\x89SNAPD\\r\\n")
    8       4      kind, ASCII
    12      4      format version, little endian
    16      8      length of the payload in bytes, little endian
    24      n      payload
    24+n    16     XXH3-128 of all before, in canonical (big endian) order

Magic, kind and version stay where they are in every version to come, and so does a checksum of all before in the last
16 bytes: a reader can tell an object from the future from a damaged one. docs/format.md is the reference.
"""

from __future__ import annotations

import enum
import struct

import xxhash

from snapd.core.ids import STEP_MAX, SnapshotId
from snapd.errors import CapacityError, IntegrityError
from snapd.units import KIB, MIB

MAGIC = b"\x89SNAPD\r\n"
FORMAT_VERSION = 1
DIGEST_BYTES = 16
GENERATION_MAX = 10**10 - 1  # ten digits in a key
_HEAD = struct.Struct("<8s4sIQ")
ENVELOPE_BYTES = _HEAD.size + DIGEST_BYTES


class Kind(enum.Enum):
    """What an object is. Values are part of the format: append-only."""

    SHARD = b"SHRD"
    SNAPSHOT = b"SNAP"
    INTENT = b"INTN"
    CONDEMNED = b"COND"
    PIN = b"PINN"
    VOID = b"VOID"  # in a commit record's place
    PACK = b"PACK"  # header of a pack
    PACK_INDEX = b"INDX"  # footer of a pack


# The largest object of each kind, envelope included: what a reader asks of the store, and what a writer never exceeds.
NBYTES_MAX = {
    Kind.SHARD: 64 * MIB,  # some two million chunks
    Kind.SNAPSHOT: 32 * MIB,  # 65,536 ranks
    Kind.INTENT: 256 * KIB,
    Kind.CONDEMNED: 32 * MIB,
    Kind.PIN: 4 * KIB,
    Kind.VOID: 4 * KIB,
}


def bad_object(key: str, what: str) -> IntegrityError:
    """The error for an object that is not what it should be."""
    return IntegrityError(f"{key}: {what}", kind="tier_manifest", key=key)


def check_version(key: str, version: int) -> None:
    """Raises IntegrityError: kind `tier_version` for a version from the future, `tier_manifest` for none at all."""
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"{key}: written in format {version}; this snapd reads up to {FORMAT_VERSION}",
            kind="tier_version",
            hint="use a newer snapd",
            key=key,
            version=version,
        )
    if version < 1:
        raise bad_object(key, f"format version {version}")


def kind_name(data: bytes) -> bytes:
    """What an object says that it is; nothing of it is checked."""
    return bytes(data[8:12]) if data[:8] == MAGIC else b""


def wrap(kind: Kind, payload: bytes) -> bytes:
    head = _HEAD.pack(MAGIC, kind.value, FORMAT_VERSION, len(payload)) + payload
    return head + xxhash.xxh3_128_digest(head)


def unwrap(kind: Kind, data: bytes, key: str) -> memoryview:
    """The payload, its bytes checked. Nothing is copied.

    Raises:
        IntegrityError: kind `tier_manifest`: not an object of this kind, cut off, changed, too large; `tier_version`.
    """
    limit = NBYTES_MAX[kind]
    if len(data) > limit:
        raise bad_object(key, f"{len(data)} bytes; at most {limit} can be")
    if len(data) < ENVELOPE_BYTES:
        raise bad_object(key, f"{len(data)} bytes: cut off")
    magic, name, version, nbytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise bad_object(key, "does not begin as an object of snapd does")
    # The checksum comes before all that it covers is believed, the version too: a flipped bit is no future format.
    if xxhash.xxh3_128_digest(memoryview(data)[:-DIGEST_BYTES]) != data[-DIGEST_BYTES:]:
        raise bad_object(key, "changed or cut off: the checksum differs")
    check_version(key, version)
    if name != kind.value:
        raise bad_object(key, f"is of kind {name.decode('ascii', 'replace')!r}, not {kind.value.decode()!r}")
    if nbytes != len(data) - ENVELOPE_BYTES:
        raise bad_object(
            key, f"says that its payload has {nbytes} bytes, it has {len(data) - ENVELOPE_BYTES}"
        )
    return memoryview(data)[_HEAD.size : -DIGEST_BYTES]


def sealed(kind: Kind, payload: bytes) -> bytes:
    """The object's bytes. Raises CapacityError: kind `tier_manifest_size`."""
    data = wrap(kind, payload)
    if len(data) > NBYTES_MAX[kind]:
        raise CapacityError(
            f"a tier's {kind.name.lower()} object would have {len(data)} bytes; at most {NBYTES_MAX[kind]} can be",
            kind="tier_manifest_size",
            hint="larger chunks make smaller manifests",
        )
    return data


def check_head(key: str, job: str, version: int, found: str) -> None:
    """What all messages begin with. Raises IntegrityError."""
    check_version(key, version)
    if found != job:
        raise IntegrityError(
            f"{key}: belongs to job {found[:128]!r}, not to {job!r}", kind="tier_job", key=key, job=job
        )


def snapshot_id(key: str, generation: int, step: int) -> SnapshotId:
    """Raises: IntegrityError: numbers out of bounds."""
    if generation > GENERATION_MAX or step > STEP_MAX:
        raise bad_object(key, f"generation {generation}, step {step}")
    return SnapshotId(generation, step)
