"""The small objects of a tier: intents, condemned lists, pins. As manifests.py, whose errors they share."""

from __future__ import annotations

import re

from google.protobuf.message import DecodeError, Message
from snapd_proto import tier_pb2

from snapd.core.stored import Condemned, Intent, Pin, VoidRecord
from snapd.core.tier_keys import PIN_NAME, WRITE_ID, TierKeys
from snapd.errors import IntegrityError
from snapd.tier.envelope import (
    FORMAT_VERSION,
    Kind,
    bad_object,
    check_head,
    kind_name,
    sealed,
    snapshot_id,
    unwrap,
)
from snapd.tier.wire import WireError, check_counts

BASES_MAX = 4096
CONDEMNED_MAX = 1 << 18
NODE_BYTES_MAX = 256
_INTENT_KEY = re.compile(r"[0-9a-f]{32}\.intent")


def _parse(kind: Kind, data: bytes, key: str, message: Message, most: dict[int, int]) -> None:
    payload = unwrap(kind, data, key)
    try:
        check_counts(payload, most)
        message.ParseFromString(bytes(payload))
    except (WireError, DecodeError) as error:
        raise bad_object(key, f"does not parse: {error}") from error


def encode_intent(intent: Intent) -> bytes:
    """Raises: CapacityError: kind `tier_manifest_size`."""
    message = tier_pb2.Intent(
        format_version=FORMAT_VERSION,
        job=intent.job,
        write_id=intent.write_id,
        node=intent.node,
        generation=intent.id.generation,
        step=intent.id.step,
        beat=intent.beat,
        revision=intent.revision,
    )
    message.bases.extend(tier_pb2.SnapshotName(generation=b.generation, step=b.step) for b in intent.bases)
    return sealed(Kind.INTENT, message.SerializeToString(deterministic=True))


def decode_intent(data: bytes, *, key: str, job: str) -> Intent:
    """Raises: IntegrityError: see manifests.py."""
    message = tier_pb2.Intent()
    _parse(Kind.INTENT, data, key, message, {7: BASES_MAX})
    check_head(key, job, message.format_version, message.job)
    if WRITE_ID.fullmatch(message.write_id) is None or key != TierKeys(job).intent(message.write_id):
        raise bad_object(key, f"is the intent of {message.write_id[:64]!r}")
    if len(message.node.encode()) > NODE_BYTES_MAX:
        raise bad_object(key, "the name of its node is too long")
    return Intent(
        job=job,
        write_id=message.write_id,
        node=message.node,
        id=snapshot_id(key, message.generation, message.step),
        bases=tuple(snapshot_id(key, base.generation, base.step) for base in message.bases),
        beat=message.beat,
        revision=message.revision,
    )


def encode_condemned(condemned: Condemned) -> bytes:
    """Raises: CapacityError: kind `tier_manifest_size`."""
    message = tier_pb2.Condemned(
        format_version=FORMAT_VERSION,
        job=condemned.job,
        round=condemned.round,
        collector=condemned.collector,
        keys=condemned.keys,
    )
    return sealed(Kind.CONDEMNED, message.SerializeToString(deterministic=True))


def may_be_condemned(keys: TierKeys, key: str) -> bool:
    """Whether a collector may delete what lies at `key`: a pack, a manifest, a commit record, an intent of the job."""
    if key.startswith(keys.intents):
        return _INTENT_KEY.fullmatch(key.removeprefix(keys.intents)) is not None
    found = keys.pack_name(key) or keys.shard_of(key) or keys.snapshot_of(key)
    return found is not None


def decode_condemned(data: bytes, *, key: str, job: str) -> Condemned:
    """Raises: IntegrityError: see manifests.py; also when it names anything that no collector may delete."""
    message = tier_pb2.Condemned()
    _parse(Kind.CONDEMNED, data, key, message, {5: CONDEMNED_MAX})
    check_head(key, job, message.format_version, message.job)
    keys = TierKeys(job)
    if key != keys.condemned_round(message.round):
        raise bad_object(key, f"is the list of round {message.round}")
    if WRITE_ID.fullmatch(message.collector) is None:
        raise bad_object(key, "its collector's write id is none")
    wrong = next((name for name in message.keys if not may_be_condemned(keys, name)), None)
    if wrong is not None:
        raise bad_object(key, f"names {wrong[:200]!r}, which is nothing to delete")
    return Condemned(job, message.round, message.collector, tuple(message.keys))


def encode_pin(pin: Pin) -> bytes:
    message = tier_pb2.Pin(
        format_version=FORMAT_VERSION,
        job=pin.job,
        name=pin.name,
        generation=pin.id.generation,
        step=pin.id.step,
    )
    return sealed(Kind.PIN, message.SerializeToString(deterministic=True))


def decode_pin(data: bytes, *, key: str, job: str) -> Pin:
    """Raises: IntegrityError: see manifests.py."""
    message = tier_pb2.Pin()
    _parse(Kind.PIN, data, key, message, {})
    check_head(key, job, message.format_version, message.job)
    if PIN_NAME.fullmatch(message.name) is None or key != TierKeys(job).pin(message.name):
        raise bad_object(key, f"is the pin of {message.name[:64]!r}")
    return Pin(job, message.name, snapshot_id(key, message.generation, message.step))


def encode_void(void: VoidRecord) -> bytes:
    message = tier_pb2.VoidRecord(
        format_version=FORMAT_VERSION,
        job=void.job,
        generation=void.id.generation,
        step=void.id.step,
        revision=void.revision,
        is_dropped=void.is_dropped,
        collector=void.collector,
    )
    return sealed(Kind.VOID, message.SerializeToString(deterministic=True))


def decode_void(data: bytes, *, key: str, job: str) -> VoidRecord:
    """Raises: IntegrityError: see manifests.py."""
    message = tier_pb2.VoidRecord()
    _parse(Kind.VOID, data, key, message, {})
    check_head(key, job, message.format_version, message.job)
    identity = snapshot_id(key, message.generation, message.step)
    if TierKeys(job).snapshot_of(key) != (identity, message.revision):
        raise bad_object(key, f"voids {identity}, revision {message.revision}")
    if WRITE_ID.fullmatch(message.collector) is None:
        raise bad_object(key, "its collector's write id is none")
    return VoidRecord(job, identity, message.revision, message.is_dropped, message.collector)


def check_not_void(data: bytes, *, key: str, job: str) -> None:
    """See that what lies in a commit record's place is meant to be one.

    Raises:
        IntegrityError: kind `tier_void`; context `is_dropped`: lower revisions are void too.
    """
    if kind_name(data) != Kind.VOID.value:
        return
    void = decode_void(data, key=key, job=job)
    what = "the snapshot was dropped by retention" if void.is_dropped else "the writing of it was given up"
    raise IntegrityError(
        f"{key}: {what}; a collector has voided it", kind="tier_void", key=key, is_dropped=void.is_dropped
    )
