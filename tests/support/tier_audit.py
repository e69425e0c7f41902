"""A tier looked at from outside: every snapshot that is offered is read to its last byte, and what is left is named."""

from __future__ import annotations

import secrets
import time

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredSnapshot
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import Store
from snapd.tier.collecting import Collector, Pass
from snapd.tier.known_chunks import committed_snapshots, read_record
from snapd.tier.rewriting import RewriteMeans, Rewriter
from tests.support.flush_scene import read_shard, shards_of

PASSES_MAX = 200


def offered(store: Store, keys: TierKeys) -> dict[SnapshotId, StoredSnapshot]:
    """The snapshots that a reader is offered: of each the highest record; void ones are none."""
    found = {}
    for snapshot, revisions in committed_snapshots(store, keys).items():
        for revision in revisions:
            try:
                found[snapshot] = read_record(store, keys, snapshot, revision)
                break
            except IntegrityError as error:
                if error.kind != "tier_void":
                    raise
                if error.context["is_dropped"]:
                    break
            except NotFoundError:
                continue  # a collector has just deleted it
    return found


def audit(store: Store, job: str) -> dict[SnapshotId, list[list[bytes]]]:
    """Every snapshot that is offered -> for each rank its chunks, verified. One that a collector takes away while it is
    read must not be offered afterwards.
    """
    keys = TierKeys(job)
    found: dict[SnapshotId, list[list[bytes]]] = {}
    for snapshot, record in offered(store, keys).items():
        try:
            found[snapshot] = [read_shard(store, keys, shard) for shard in shards_of(store, record)]
        except NotFoundError as error:
            again = offered(store, keys).get(snapshot)
            if again is not None and again.revision == record.revision:
                raise AssertionError(f"{snapshot} is offered, and lacks {error}") from error
            if again is not None:
                found[snapshot] = [read_shard(store, keys, shard) for shard in shards_of(store, again)]
    return found


def collect_until_quiet(store: Store, job: str, rules: CollectRules) -> list[Pass]:
    """Passes, with the pauses that the rounds want, until nothing is condemned or rewritten any more."""
    collector = Collector(store, job, rules, write_id=secrets.token_hex(16))
    means = RewriteMeans(
        store=store,
        random_token=lambda: secrets.token_hex(16),
        wall_s=time.time,
        monotonic_s=time.monotonic,
    )
    rewriter = Rewriter(means, job, rules)
    passes: list[Pass] = []
    quiet_since_s = 0.0
    for _ in range(PASSES_MAX):
        done = collector.run()
        rewritten = rewriter.run(done.sight, done.judgement)
        passes.append(done)
        is_quiet = done.is_quiet and not rewritten.snapshots
        quiet_since_s = (quiet_since_s or time.monotonic()) if is_quiet else 0.0
        # Intents and what nobody names are condemned only when they are old.
        if quiet_since_s and time.monotonic() - quiet_since_s > rules.intent_ttl_s + rules.round_s:
            return passes
        time.sleep(min(1.0, max(0.1, done.next_s or rules.round_s)))
    raise AssertionError(f"still something to collect after {PASSES_MAX} passes: {passes[-1].condemned}")


def unnamed(store: Store, job: str) -> list[str]:
    """Objects of the job that no offered snapshot names. Void records and condemned lists end by time: not counted."""
    keys = TierKeys(job)
    named: set[str] = set()
    for snapshot, record in offered(store, keys).items():
        named.add(keys.snapshot(snapshot, record.revision))
        named.update(entry.key for entry in record.shards)
        named.update(keys.pack(pack) for pack in record.packs)
    there = {info.key for info in store.list(keys.root)} - named
    there = {key for key in there if not key.startswith(keys.condemned)}
    return sorted(key for key in there if not _is_void(store, keys, key))


def _is_void(store: Store, keys: TierKeys, key: str) -> bool:
    place = keys.snapshot_of(key)
    if place is None:
        return False
    try:
        read_record(store, keys, *place)
    except IntegrityError as error:
        return error.kind == "tier_void"
    except NotFoundError:
        return True
    return False


def pack_nbytes(store: Store, job: str) -> tuple[int, int]:
    """(bytes of all packs in the store, bytes of chunks that offered snapshots name)."""
    keys = TierKeys(job)
    stored = sum(info.nbytes for info in store.list(keys.packs))
    live = {
        chunk.spot: chunk.stored_nbytes
        for record in offered(store, keys).values()
        for shard in shards_of(store, record)
        for chunk in shard.chunks
    }
    return stored, sum(live.values())
