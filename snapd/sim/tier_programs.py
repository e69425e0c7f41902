"""Who works in a tier, as programs for every interleaving: writers, a rewriter, somebody who pins (tier_model.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from snapd.core.committing import (
    BeforeCommit,
    Go,
    Place,
    attempt_of,
    check_base,
    check_before_commit,
)
from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, Intent, Pin, ShardEntry, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import pack_name
from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_model import (
    CLOCK,
    JOB,
    KEYS,
    Become,
    Item,
    Manifest,
    Pack,
    Program,
    create,
    delete,
    listing,
    put,
    read,
    sleep,
)

Bugs = frozenset[TierBug]
DIGEST = bytes(16)


@dataclass(frozen=True, slots=True)
class Writing:
    """One writer's task. `number`: tells writers apart. `attempts_max`: how often it starts over. `base`: what it
    builds upon, if not on the newest: it may have listed the tier long ago. `gives_up`: it leaves when its manifest is
    there; the others may commit.
    """

    number: int
    target: SnapshotId
    rank: int = 0
    world_size: int = 1
    attempts_max: int = 2
    base: SnapshotId | None = None
    gives_up: bool = False
    round_s: float = 3600.0
    ttl_s: float = 3600.0
    bugs: Bugs = frozenset()

    def write_id(self, attempt: int) -> str:
        return f"{self.number * 100 + attempt:032x}"


def record_of(
    target: SnapshotId,
    revision: int,
    write_id: str,
    manifests: dict[int, tuple[str, Manifest]],
    first_s: float = 0.0,
) -> StoredSnapshot:
    """A commit record over these manifests (rank -> key and manifest)."""
    entries = tuple(
        ShardEntry(rank, key, 1, DIGEST, DIGEST, 1) for rank, (key, _) in sorted(manifests.items())
    )
    packs = frozenset[str]().union(*(manifest.packs for _, manifest in manifests.values()))
    return StoredSnapshot(
        JOB, target, len(entries), revision, None, write_id, entries, tuple(sorted(packs)), 0.0, first_s
    )


def places(items: tuple[Item, ...], target: SnapshotId) -> dict[int, Place]:
    """What lies at the keys of the commit records of `target`."""
    found: dict[int, Place] = {}
    for item in items:
        named = KEYS.snapshot_of(item.key)
        if named is not None and named[0] == target:
            is_record = isinstance(item.content, StoredSnapshot)
            is_dropped = isinstance(item.content, VoidRecord) and item.content.is_dropped
            found[named[1]] = Place.RECORD if is_record else Place.DROPPED if is_dropped else Place.VOID
    return found


def newest_record(items: tuple[Item, ...], only: SnapshotId | None = None) -> StoredSnapshot | None:
    """The newest snapshot's highest record that counts."""
    records = [item.content for item in items if isinstance(item.content, StoredSnapshot)]
    kept = [record for record in records if Place.DROPPED not in places(items, record.id).values()]
    kept = [record for record in kept if only is None or record.id == only]
    return max(kept, key=lambda record: (record.id, record.revision), default=None)


def keys_of(items: tuple[Item, ...]) -> frozenset[str]:
    return frozenset(
        key for item in items if isinstance(item.content, Condemned) for key in item.content.keys
    )


# A writer


def writing(task: Writing, attempt: int) -> Program:
    """One attempt: from the listing to the shard manifest."""
    bugs = task.bugs
    there = yield listing(KEYS.snapshots)
    plan = attempt_of(places(there, task.target))
    if plan.revision is None:
        return None
    base = newest_record(there, task.base)
    write_id = task.write_id(attempt)
    bases = (base.id,) if base is not None else ()
    intent = Intent(JOB, write_id, "node", task.target, bases, revision=plan.revision)
    lists: tuple[Item, ...] = ()
    if TierBug.INTENT_LATE in bugs:
        lists = yield listing(KEYS.condemned)
    if TierBug.NO_INTENT not in bugs:
        yield put(KEYS.intent(write_id), intent)
    if base is not None and TierBug.BASE_READ_EARLY in bugs:
        base = newest_record((yield listing(KEYS.snapshots)), base.id)
    if not bugs & {TierBug.INTENT_LATE, TierBug.LISTS_NOT_READ}:
        lists = yield listing(KEYS.condemned)
    if base is not None and TierBug.BASE_READ_EARLY not in bugs:
        base = newest_record((yield listing(KEYS.snapshots)), base.id)
    usable = _usable(base, keys_of(lists))
    own = pack_name(write_id, 0)
    yield create(KEYS.pack(own), Pack())
    began_s = (yield CLOCK) if task.ttl_s else 0.0
    manifest = Manifest(usable | {own})
    if TierBug.COMMIT_EARLY in bugs:
        yield create(
            KEYS.snapshot(task.target, plan.revision),
            record_of(task.target, plan.revision, write_id, {0: (KEYS.shard(task.target, 0), manifest)}),
        )
    if TierBug.INTENT_REMOVED_EARLY in bugs:
        yield delete(KEYS.intent(write_id))
    yield create(KEYS.shard(task.target, task.rank, plan.revision), manifest)
    if task.gives_up:
        return Become(ending, (KEYS.intent(write_id),))
    return Become(committing, (task, attempt, intent, began_s))


def _usable(base: StoredSnapshot | None, condemned: frozenset[str]) -> frozenset[str]:
    if base is None or check_base(base.id, [KEYS.snapshot(base.id, base.revision)], condemned):
        return frozenset()
    return frozenset(pack for pack in base.packs if KEYS.pack(pack) not in condemned)


def committing(task: Writing, attempt: int, intent: Intent, beat_s: float) -> Program:
    """Look whether all manifests are there, and commit."""
    bugs, key = task.bugs, KEYS.intent(intent.write_id)
    place = KEYS.snapshot(task.target, intent.revision)
    now_s = yield CLOCK
    if now_s - beat_s > task.ttl_s / 4 and TierBug.NO_INTENT not in bugs:
        intent = replace(intent, beat=intent.beat + 1)
        yield put(key, intent)
        beat_s = now_s
    lists: tuple[Item, ...] = ()
    if TierBug.LISTS_NOT_READ not in bugs:
        lists = yield listing(KEYS.condemned)
    is_there = (yield read(key)) is not None or bool(bugs & {TierBug.NO_INTENT, TierBug.INTENT_REMOVED_EARLY})
    found = {}
    for item in (yield listing(KEYS.shards_of(task.target))):
        named = KEYS.shard_of(item.key)
        if named is not None and named[2] == intent.revision and isinstance(item.content, Manifest):
            found[named[1]] = (item.key, item.content)
    again = Become(committing, (task, attempt, intent, beat_s))
    over = Become(writing, (task, attempt + 1)) if attempt + 1 < task.attempts_max else None
    if len(found) < task.world_size:
        there = yield read(place)
        if isinstance(there, StoredSnapshot):
            return Become(ending, (key,))
        if there is not None or not is_there:
            return over
        yield sleep(task.ttl_s / 8)
        return again
    record = record_of(task.target, intent.revision, intent.write_id, found)
    known = BeforeCommit(
        keys=KEYS,
        intent_key=key,
        intent_is_there=is_there,
        condemned=keys_of(lists),
        shard_keys=[entry.key for entry in record.shards],
        packs=record.packs,
        packs_there=None,
        age_s=(yield CLOCK) - now_s,
    )
    go, _ = check_before_commit(known, round_s=task.round_s)
    if go is Go.LOOK_AGAIN:
        return again
    if go is Go.START_OVER:
        return over
    there = yield (put if TierBug.COMMIT_REPLACES in bugs else create)(place, record)
    return Become(ending, (key,)) if isinstance(there, StoredSnapshot) else over


def ending(key: str) -> Program:
    yield delete(key)
    return None


# A rewriter of packs


@dataclass(frozen=True, slots=True)
class Rewriting:
    number: int
    target: SnapshotId
    bugs: Bugs = frozenset()


def rewriting(task: Rewriting) -> Program:
    """New packs, new manifests, and the commit record one revision higher."""
    record = newest_record((yield listing(KEYS.snapshots)), task.target)
    if record is None:
        return None
    write_id = f"{task.number * 100:032x}"
    revision = record.revision + 1
    intent = Intent(JOB, write_id, "collector", task.target, (task.target,), revision=revision)
    yield put(KEYS.intent(write_id), intent)
    condemned = keys_of((yield listing(KEYS.condemned)))
    there = yield listing(KEYS.snapshots)
    now = newest_record(there, task.target)
    if (
        now != record
        or KEYS.snapshot(record.id, record.revision) in condemned
        or revision in places(there, task.target)
    ):
        return Become(ending, (KEYS.intent(write_id),))
    pack = pack_name(write_id, 0)
    yield create(KEYS.pack(pack), Pack())
    manifests = {}
    for entry in record.shards:
        key, manifest = KEYS.shard(task.target, entry.rank, revision), Manifest(frozenset({pack}))
        yield create(key, manifest)
        manifests[entry.rank] = (key, manifest)
    if (yield read(KEYS.intent(write_id))) is None:
        return None
    yield create(
        KEYS.snapshot(task.target, revision), record_of(task.target, revision, write_id, manifests, 1.0)
    )
    return Become(ending, (KEYS.intent(write_id),))


# Somebody who pins


def pinning(name: str, target: SnapshotId, bugs: Bugs) -> Program:
    """Ends by `promised` if the pin is a promise."""
    yield put(KEYS.pin(name), Pin(JOB, name, target))
    if TierBug.PIN_NOT_CHECKED not in bugs:
        condemned = keys_of((yield listing(KEYS.condemned)))
    else:
        condemned = frozenset()
    record = newest_record((yield listing(KEYS.snapshots)), target)
    if record is None or KEYS.snapshot(target, record.revision) in condemned:
        return None
    return Become(promised, (target,))


def promised(target: SnapshotId) -> Program:
    """A state to be seen by the checker: the snapshot stays from now on."""
    while True:
        yield sleep(1e9)
