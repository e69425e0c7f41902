"""Pins: snapshots that retention must keep, by name. Blocking."""

from __future__ import annotations

from snapd.core.ids import SnapshotId
from snapd.core.stored import Pin
from snapd.core.tier_keys import PIN_NAME, TierKeys
from snapd.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.intents import read_condemned
from snapd.tier.known_chunks import committed_snapshots, newest_good
from snapd.tier.notes import decode_pin, encode_pin


def checked_pin_name(name: str) -> str:
    """Raises: ConfigError: kind `pin_name`."""
    if PIN_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"bad name of a pin {name[:80]!r}",
            kind="pin_name",
            hint="use letters, digits, '.', '_' and '-', at most 64, beginning with a letter or a digit",
        )
    return name


def pins_of(store: Store, keys: TierKeys) -> dict[str, SnapshotId | None]:
    """Every pin of the job; None: it cannot be read."""
    found: dict[str, SnapshotId | None] = {}
    for info in store.list(keys.pins):
        name = keys.pin_of(info.key)
        if name is None:
            continue
        try:
            data = store.read(info.key, max_nbytes=NBYTES_MAX[Kind.PIN])
            found[name] = decode_pin(data, key=info.key, job=keys.job).id
        except IntegrityError:
            found[name] = None
        except NotFoundError as error:
            if error.kind != "object":
                raise
    return found


def pin(store: Store, keys: TierKeys, name: str, snapshot: SnapshotId) -> None:
    """Pin a snapshot, replacing what the name pinned before. When this returns it stays until it is unpinned.

    The order is the writers' (core/committing.py): the pin, then the condemned lists, then the commit record.

    Raises:
        NotFoundError: kind `snapshot`. ConflictError: kind `pin_condemned`: a collector may be deleting it already; the
            pin is there, and counts if it came in time. What a store raises.
    """
    key = keys.pin(checked_pin_name(name))
    before = pins_of(store, keys).get(name)
    store.put(key, encode_pin(Pin(keys.job, name, snapshot)))
    condemned = read_condemned(store, keys)
    revisions = committed_snapshots(store, keys).get(snapshot)
    record = newest_good(store, keys, {snapshot: revisions}) if revisions else None
    if record is None:
        if before is None:
            store.delete([key])
        else:
            store.put(key, encode_pin(Pin(keys.job, name, before)))
        raise NotFoundError(
            f"{store.description} has no usable snapshot {snapshot} of job {keys.job!r}",
            kind="snapshot",
            job=keys.job,
        )
    if keys.snapshot(snapshot, record.revision) in condemned:
        raise ConflictError(
            f"snapshot {snapshot} is condemned, a collector may be deleting it; the pin {name!r} counts if in time",
            kind="pin_condemned",
            hint="look again after two rounds of `tier.gc_every`: the snapshot stays if it is still there",
            job=keys.job,
        )


def unpin(store: Store, keys: TierKeys, name: str) -> None:
    """Raises: NotFoundError: kind `pin`."""
    key = keys.pin(checked_pin_name(name))
    if key not in {info.key for info in store.list(keys.pins)}:
        raise NotFoundError(f"job {keys.job!r} has no pin {name!r}", kind="pin", job=keys.job)
    store.delete([key])
