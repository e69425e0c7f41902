"""The collector as a program for every interleaving; it decides by core/condemning.py. See tier_model.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from snapd.core.condemning import (
    CollectRules,
    Deletion,
    Garbage,
    Judgement,
    judge,
    next_round_number,
    to_condemn,
    to_delete,
)
from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, Intent, Pin, StoredSnapshot, VoidRecord
from snapd.core.tier_sight import SeenIntent, SeenPack, SeenRecord, SeenRound, SeenShard, Sight
from snapd.sim.tier_bugs import TierBug
from snapd.sim.tier_model import (
    CLOCK,
    JOB,
    KEYS,
    Become,
    Item,
    Manifest,
    Program,
    Store,
    create,
    delete,
    listing,
    read,
    sleep,
    standing,
)
from snapd.sim.tier_programs import record_of


@dataclass(frozen=True, slots=True)
class Collecting:
    """`passes`: how often it looks. `pause_s`: between looks."""

    number: int
    rules: CollectRules
    passes: int = 3
    pause_s: float = 900.0
    bugs: frozenset[TierBug] = frozenset()


Void = tuple[SnapshotId, int, bool]


@dataclass(frozen=True, slots=True)
class Todo:
    """What a look led to."""

    voids: tuple[Void, ...]
    keys: tuple[str, ...]
    retire: tuple[str, ...]
    condemn: tuple[str, ...]
    round: int


Items = tuple[Item, ...]


def collecting(task: Collecting, number: int) -> Program:
    """One look at everything."""
    if number >= task.passes:
        return None
    now_s = yield CLOCK
    late = TierBug.LISTS_READ_LAST in task.bugs
    rounds: Items = () if late else (yield listing(KEYS.condemned))
    packs = yield listing(KEYS.packs)
    shards = yield listing(KEYS.shards)
    intents = yield listing(KEYS.intents)
    records = yield listing(KEYS.snapshots)
    found = {item.key for item in (*packs, *shards)}
    missing = set()
    for key in sorted({key for item in records for key in _named(item)} - found):
        if (yield read(key)) is None:
            missing.add(key)
    pins = yield listing(KEYS.pins)
    if late:
        rounds = yield listing(KEYS.condemned)
    todo = decide(task, now_s, rounds, packs, shards, intents, records, frozenset(missing), pins)
    return Become(acting, (task, number, todo))


def acting(task: Collecting, number: int, todo: Todo) -> Program:
    """Do what the look led to: voids, deletions in order, then the new list."""
    bugs = task.bugs
    again = Become(collecting, (task, number + 1))
    collector = f"{task.number * 100 + number:032x}"
    for snapshot, revision, is_dropped in todo.voids:
        key = KEYS.snapshot(snapshot, revision)
        there = yield create(key, VoidRecord(JOB, snapshot, revision, is_dropped, collector))
        if isinstance(there, StoredSnapshot):
            return again
    condemned = Condemned(JOB, todo.round, collector, todo.condemn)
    if TierBug.SAME_ROUND in bugs and todo.condemn:
        yield create(KEYS.condemned_round(todo.round), condemned)
        for key in todo.condemn:
            yield delete(key)
        yield delete(KEYS.condemned_round(todo.round))
    if TierBug.LIST_REMOVED_FIRST in bugs:
        for key in todo.retire:
            yield delete(key)
    for key in todo.keys:
        yield delete(key)
    for key in todo.retire:
        yield delete(key)
    if todo.condemn and TierBug.SAME_ROUND not in bugs:
        yield create(KEYS.condemned_round(todo.round), condemned)
    yield sleep(task.pause_s)
    return again


def _named(item: Item) -> list[str]:
    if not isinstance(item.content, StoredSnapshot):
        return []
    return [*(entry.key for entry in item.content.shards), *map(KEYS.pack, item.content.packs)]


@functools.lru_cache(maxsize=200_000)
def decide(
    task: Collecting,
    now_s: float,
    rounds: Items,
    packs: Items,
    shards: Items,
    intents: Items,
    records: Items,
    missing: frozenset[str],
    pins: Items,
) -> Todo:
    """What follows from a look, by the core's rules, less the one that is broken."""
    bugs = task.bugs
    sight = sight_of(now_s, rounds, packs, shards, intents, records, missing, pins)
    shown = _distorted(sight, bugs)
    judgement = judge(shown, task.rules)
    deletion = to_delete(judgement, shown, task.rules)
    keys = [item.key for item in deletion.keys]
    voids = deletion.voids
    if TierBug.NO_SECOND_LOOK in bugs:
        keys, voids = _blindly(judgement, sight)
    if TierBug.PACKS_FIRST in bugs:
        keys.reverse()
    if TierBug.NO_VOID in bugs:
        voids = tuple(void for void in voids if void[2])
    if bugs & {TierBug.NO_DROP_VOID, TierBug.LIST_REMOVED_FIRST, TierBug.PACKS_FIRST}:
        voids = tuple(void for void in voids if not void[2])
    retire = deletion.retire
    fresh = tuple(item.key for item in to_condemn(judgement, shown))
    # The number is told apart by the collector too: the model's clock may stand still.
    return Todo(voids, tuple(keys), retire, fresh, next_round_number(sight) + task.number)


def _blindly(judgement: Judgement, sight: Sight) -> tuple[list[str], tuple[Void, ...]]:
    everything = [key for seen in sight.rounds for key in seen.keys or ()]
    items: list[Garbage] = [judgement.garbage[key] for key in everything if key in judgement.garbage]
    voids = {item.void: None for item in items if item.void is not None}
    return everything, Deletion(tuple(voids)).voids


def _distorted(sight: Sight, bugs: frozenset[TierBug]) -> Sight:
    """What a collector sees that overlooks something."""
    if TierBug.INTENTS_IGNORED in bugs:
        sight = replace(sight, intents=())
    if TierBug.OLD_REVISION_DROPPED in bugs:
        kept = [
            replace(seen, intent=replace(seen.intent, bases=())) if seen.intent else seen
            for seen in sight.intents
        ]
        sight = replace(sight, intents=tuple(kept))
    if TierBug.MANIFESTS_IGNORED in bugs:
        shards = {key: replace(seen, packs=frozenset()) for key, seen in sight.shards.items()}
        sight = replace(sight, shards=shards)
    if TierBug.NEWEST_NOT_KEPT in bugs:
        # It believes in a newer one that is not there.
        newer = record_of(SnapshotId(9, 9), 0, f"{9:032x}", {})
        seen = SeenRecord(KEYS.snapshot(newer.id), newer.id, 0, sight.now_s, record=newer)
        sight = replace(sight, records=(*sight.records, seen))
    return sight


def sight_of(
    now_s: float,
    rounds: Items,
    packs: Items,
    shards: Items,
    intents: Items,
    records: Items,
    missing: frozenset[str],
    pins: Items,
) -> Sight:
    """The model's contents as the core sees a tier."""
    seen_packs = {
        name: SeenPack(name, 1, item.modified_s)
        for item in packs
        if (name := KEYS.pack_name(item.key)) is not None
    }
    seen_shards = {}
    for item in shards:
        named = KEYS.shard_of(item.key)
        assert named is not None and isinstance(item.content, Manifest)
        seen_shards[item.key] = SeenShard(
            item.key, named[0], named[2], 1, item.modified_s, item.content.packs
        )
    seen_intents = []
    for item in intents:
        assert isinstance(item.content, Intent)
        seen_intents.append(SeenIntent(item.key, item.content.write_id, item.modified_s, item.content))
    seen_rounds = []
    for item in rounds:
        assert isinstance(item.content, Condemned)
        seen_rounds.append(SeenRound(item.key, item.content.round, item.modified_s, item.content.keys))
    return Sight(
        keys=KEYS,
        now_s=now_s,
        packs=seen_packs,
        shards=seen_shards,
        intents=tuple(seen_intents),
        records=tuple(_seen_record(item, missing) for item in records),
        pins={item.key: item.content.id for item in pins if isinstance(item.content, Pin)},
        rounds=tuple(seen_rounds),
    )


def _seen_record(item: Item, missing: frozenset[str]) -> SeenRecord:
    named = KEYS.snapshot_of(item.key)
    assert named is not None
    return SeenRecord(
        item.key,
        named[0],
        named[1],
        item.modified_s,
        record=item.content if isinstance(item.content, StoredSnapshot) else None,
        void=item.content if isinstance(item.content, VoidRecord) else None,
        missing=tuple(key for key in _named(item) if key in missing),
    )


# Tidying up when nobody else works


def tidied(store: Store, task: Collecting, now_s: float, passes: int = 6) -> Store:
    """The store after so many whole passes, one after the other."""
    for number in range(passes):
        place: Become | None = Become(collecting, (replace(task, passes=passes + 1), number))
        while place is not None and place.arguments[1] == number:
            program = place.program(*place.arguments)
            place = None
            try:
                op = next(program)
                while True:
                    store, answer = store.apply(op, now_s)
                    op = program.send(answer)
            except StopIteration as end:
                place = end.value
    return store


def unnamed(store: Store) -> list[str]:
    """What no snapshot that a reader finds names; void records, pins, and lists of which something stayed are no
    garbage.
    """
    named: set[str] = set()
    for snapshot, record in standing(store):
        named.add(KEYS.snapshot(snapshot, record.revision))
        named.update(entry.key for entry in record.shards)
        named.update(map(KEYS.pack, record.packs))
    for item in store.items:
        if isinstance(item.content, Condemned) and named.intersection(item.content.keys):
            named.add(item.key)
    return [
        item.key
        for item in store.items
        if item.key not in named and not isinstance(item.content, VoidRecord | Pin)
    ]
