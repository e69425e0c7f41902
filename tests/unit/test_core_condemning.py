"""What a collector condemns, deletes and leaves; what a writer must know. The interleavings are in tests/sim."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapd.core.committing import (
    BeforeCommit,
    Go,
    Place,
    attempt_of,
    check_base,
    check_before_commit,
)
from snapd.core.condemning import (
    CollectRules,
    Order,
    current_record,
    judge,
    next_round_number,
    shards_to_read,
    to_condemn,
    to_delete,
)
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.core.stored import Intent, ShardEntry, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.core.tier_sight import (
    SeenIntent,
    SeenPack,
    SeenRecord,
    SeenRound,
    SeenShard,
    SeenUpload,
    Sight,
)

KEYS = TierKeys("job")
NOW_S = 100_000.0
OLD_S, YOUNG_S = NOW_S - 5_000.0, NOW_S - 10.0
RULES = CollectRules(keep=KeepRules(last=1), round_s=1000.0, intent_ttl_s=1000.0, void_ttl_s=50_000.0)
ONE, TWO, THREE = (SnapshotId(1, step) for step in (1, 2, 3))


def write_id(number: int) -> str:
    return f"{number:032x}"


def pack(number: int) -> str:
    return pack_name(write_id(number), 0)


def record(snapshot: SnapshotId, *packs: int, revision: int = 0, at_s: float = OLD_S) -> SeenRecord:
    key = KEYS.shard(snapshot, 0, revision)
    entry = ShardEntry(0, key, 1, bytes(16), bytes(16), 1)
    names = tuple(sorted(map(pack, packs)))
    stored = StoredSnapshot("job", snapshot, 1, revision, None, write_id(99), (entry,), names, 0.0)
    return SeenRecord(KEYS.snapshot(snapshot, revision), snapshot, revision, at_s, record=stored)


def void(snapshot: SnapshotId, revision: int, *, is_dropped: bool = False, at_s: float = OLD_S) -> SeenRecord:
    found = VoidRecord("job", snapshot, revision, is_dropped, write_id(98))
    return SeenRecord(KEYS.snapshot(snapshot, revision), snapshot, revision, at_s, void=found)


def shard(snapshot: SnapshotId, *packs: int, revision: int = 0, at_s: float = OLD_S) -> SeenShard:
    return SeenShard(
        KEYS.shard(snapshot, 0, revision), snapshot, revision, 1, at_s, frozenset(map(pack, packs))
    )


def intent(number: int, target: SnapshotId, *bases: SnapshotId, at_s: float = YOUNG_S) -> SeenIntent:
    found = Intent("job", write_id(number), "node", target, bases)
    return SeenIntent(KEYS.intent(write_id(number)), write_id(number), at_s, found)


def sight(
    *records: SeenRecord,
    packs: tuple[int, ...] = (),
    shards: tuple[SeenShard, ...] = (),
    intents: tuple[SeenIntent, ...] = (),
    rounds: tuple[SeenRound, ...] = (),
    pins: dict[str, SnapshotId] | None = None,
    uploads: tuple[SeenUpload, ...] = (),
    packs_at_s: float = OLD_S,
) -> Sight:
    own = [shard(r.snapshot, revision=r.revision) for r in records if r.record is not None]
    return Sight(
        keys=KEYS,
        now_s=NOW_S,
        packs={pack(number): SeenPack(pack(number), 10, packs_at_s) for number in packs},
        shards={each.key: each for each in (*own, *shards)},
        intents=intents,
        records=records,
        pins=pins or {},
        rounds=rounds,
        uploads=uploads,
    )


def condemned(seen: Sight) -> dict[str, str]:
    return {item.key: item.reason for item in to_condemn(judge(seen, RULES), seen)}


def listed(*keys: str, age_s: float = 1500.0, number: int = 5) -> SeenRound:
    return SeenRound(KEYS.condemned_round(number), number, NOW_S - age_s, keys)


def test_a_dropped_snapshot_goes_with_what_only_it_names() -> None:
    seen = sight(record(ONE, 1, 2), record(TWO, 2, 3), packs=(1, 2, 3))
    found = condemned(seen)
    assert set(found) == {KEYS.snapshot(ONE), KEYS.shard(ONE, 0), KEYS.pack(pack(1))}
    assert found[KEYS.snapshot(ONE)] == "retention: not kept by the last 1"
    assert [item.order for item in to_condemn(judge(seen, RULES), seen)] == [
        Order.RECORD,
        Order.SHARD,
        Order.PACK,
    ]


def test_what_nobody_names_is_left_alone_while_it_is_young() -> None:
    assert condemned(sight(record(TWO, 2), packs=(2, 7))) == {
        KEYS.pack(pack(7)): "nothing that stays names it"
    }
    assert not condemned(sight(record(TWO, 2), packs=(2, 7), packs_at_s=YOUNG_S))


def test_a_living_writer_keeps_its_packs_its_attempt_and_its_bases() -> None:
    seen = sight(
        record(ONE, 1),
        record(TWO, 2),
        packs=(1, 2, 7, 8, 9),
        shards=(shard(THREE, 8),),
        intents=(intent(7, THREE, ONE),),
    )
    assert set(condemned(seen)) == {KEYS.pack(pack(9))}
    assert judge(seen, RULES).held == {ONE: "a writer builds upon it"}
    late = sight(record(ONE, 1), record(TWO, 2), packs=(1, 2), intents=(intent(7, ONE),))
    assert judge(late, RULES).held == {ONE: "a writer of it has not finished"}


def test_an_old_intent_is_condemned_and_protects_until_it_is_deleted() -> None:
    seen = sight(
        record(TWO, 2),
        packs=(2, 7, 8),
        shards=(shard(THREE, 8),),
        intents=(intent(7, THREE, at_s=OLD_S),),
    )
    assert condemned(seen) == {KEYS.intent(write_id(7)): "no sign of life for 5000 s"}
    due = replace(seen, rounds=(listed(KEYS.intent(write_id(7))),))
    deletion = to_delete(judge(due, RULES), due, RULES)
    assert deletion.voids == ((THREE, 0, False),)
    assert [item.key for item in deletion.keys] == [KEYS.intent(write_id(7))]
    alive = replace(due, intents=(intent(7, THREE),))
    assert not to_delete(judge(alive, RULES), alive, RULES).keys


def test_manifests_that_nobody_works_at_go_after_their_attempt_was_voided() -> None:
    seen = sight(record(TWO, 2), packs=(2, 8), shards=(shard(THREE, 8),))
    keys = (KEYS.shard(THREE, 0), KEYS.pack(pack(8)))
    assert set(condemned(seen)) == set(keys)
    due = replace(seen, rounds=(listed(*keys),))
    deletion = to_delete(judge(due, RULES), due, RULES)
    assert deletion.voids == ((THREE, 0, False),)
    assert [item.key for item in deletion.keys] == list(keys)
    only_pack = replace(seen, rounds=(listed(keys[1]),))  # its manifest was not condemned yet
    assert not to_delete(judge(only_pack, RULES), only_pack, RULES).keys


def test_nothing_is_deleted_of_what_a_record_names_that_stays() -> None:
    """It was condemned before the record was there."""
    seen = sight(
        record(ONE, 1),
        record(TWO, 2),
        packs=(1, 2),
        rounds=(listed(KEYS.pack(pack(1)), KEYS.shard(ONE, 0)),),
    )
    assert not to_delete(judge(seen, RULES), seen, RULES).keys
    all_of_it = replace(seen, rounds=(listed(KEYS.pack(pack(1)), KEYS.shard(ONE, 0), KEYS.snapshot(ONE)),))
    deletion = to_delete(judge(all_of_it, RULES), all_of_it, RULES)
    assert deletion.voids == ((ONE, 1, True),)
    assert [item.order for item in deletion.keys] == [Order.RECORD, Order.SHARD, Order.PACK]


def test_a_list_is_due_after_a_round_and_removed_after_two() -> None:
    keys = (KEYS.snapshot(ONE), KEYS.shard(ONE, 0), KEYS.pack(pack(1)))
    seen = sight(record(ONE, 1), record(TWO, 2), packs=(1, 2))
    ages = {900.0: (0, 0, 100.0), 1000.0: (3, 0, 1000.0), 2000.0: (3, 1, None)}
    for age_s, (deleted, retired, next_s) in ages.items():
        at = replace(seen, rounds=(listed(*keys, age_s=age_s),))
        deletion = to_delete(judge(at, RULES), at, RULES)
        assert (len(deletion.keys), len(deletion.retire), deletion.next_s) == (deleted, retired, next_s)


def test_a_list_stays_while_something_of_it_does() -> None:
    pinned = sight(record(ONE, 1), record(TWO, 2), packs=(1, 2), pins={"best": ONE})
    for age_s, is_removed in ((2000.0, False), (49_000.0, False), (51_000.0, True)):
        at = replace(pinned, rounds=(listed(KEYS.snapshot(ONE), age_s=age_s),))
        deletion = to_delete(judge(at, RULES), at, RULES)
        assert not deletion.keys and bool(deletion.retire) == is_removed


def test_older_revisions_go_when_the_newer_one_is_whole() -> None:
    seen = sight(record(TWO, 1), record(TWO, 2, revision=1), packs=(1, 2))
    found = condemned(seen)
    assert set(found) == {KEYS.snapshot(TWO), KEYS.shard(TWO, 0), KEYS.pack(pack(1))}
    assert found[KEYS.snapshot(TWO)] == "revision 1 has taken its place"
    broken = replace(seen.records[1], missing=(KEYS.pack(pack(2)),))
    assert not condemned(replace(seen, records=(seen.records[0], broken)))
    used = replace(seen, intents=(intent(7, THREE, TWO),))
    assert not condemned(used)


def test_the_record_that_counts() -> None:
    assert current_record([]) is None
    one, two = record(TWO, 1), record(TWO, 2, revision=1)
    assert current_record([one, two]) == two
    assert current_record([one, void(TWO, 1)]) == one  # a rewriting was given up
    assert current_record([one, two, void(TWO, 2, is_dropped=True)]) is None
    assert current_record([one, replace(two, problem="changed")]) == one
    assert current_record([replace(one, problem="changed")]) == replace(one, problem="changed")


def test_what_is_left_of_a_void_snapshot_goes() -> None:
    seen = sight(record(ONE, 1), void(ONE, 1, is_dropped=True), record(TWO, 2), packs=(1, 2))
    assert condemned(seen)[KEYS.snapshot(ONE)] == "its snapshot is void"
    gone = sight(void(ONE, 1, is_dropped=True), record(TWO, 2), packs=(2,))
    assert not condemned(gone)  # it must outlive every request
    old = sight(void(ONE, 1, is_dropped=True, at_s=NOW_S - 60_000), record(TWO, 2), packs=(2,))
    assert set(condemned(old)) == {KEYS.snapshot(ONE, 1)}


def test_an_unreadable_record_keeps_what_it_may_name() -> None:
    bad = replace(record(TWO, 2), record=None, problem="changed")
    readable = sight(record(ONE, 1), bad, packs=(1, 2, 9), shards=(shard(TWO, 2),))
    assert set(condemned(readable)) == {KEYS.pack(pack(9))}
    assert shards_to_read(replace(readable, shards={})) == []
    blind = sight(
        record(ONE, 1), bad, packs=(1, 2, 9), shards=(replace(shard(TWO), packs=None, problem="changed"),)
    )
    judgement = judge(blind, RULES)
    assert judgement.blind and not condemned(blind) and judgement.problems


def test_an_unreadable_young_intent_stops_everything() -> None:
    unreadable = replace(intent(7, THREE), intent=None, problem="changed")
    seen = sight(record(ONE, 1), record(TWO, 2), packs=(1, 2), intents=(unreadable,))
    assert not condemned(seen) and "nothing is judged" in judge(seen, RULES).problems[-1]
    old = replace(unreadable, modified_s=OLD_S)
    assert KEYS.intent(write_id(7)) in condemned(replace(seen, intents=(old,)))


def test_unfinished_uploads_of_the_dead_are_aborted() -> None:
    uploads = (
        SeenUpload(KEYS.pack(pack(7)), "living", OLD_S),
        SeenUpload(KEYS.pack(pack(8)), "dead", OLD_S),
        SeenUpload(KEYS.pack(pack(9)), "young", YOUNG_S),
        SeenUpload("jobs/other/packs/x", "another job's", OLD_S),
    )
    seen = sight(record(TWO, 2), packs=(2,), uploads=uploads, intents=(intent(7, THREE),))
    assert [upload.token for upload in judge(seen, RULES).uploads] == ["dead"]


def test_numbers_of_rounds_only_grow() -> None:
    assert next_round_number(sight()) == int(NOW_S)
    assert next_round_number(sight(rounds=(listed(number=10**9),))) == 10**9 + 1


# writers


def test_which_revision_an_attempt_is_written_as() -> None:
    assert attempt_of({}).revision == 0
    assert attempt_of({0: Place.VOID}).revision == 1
    assert attempt_of({0: Place.VOID, 1: Place.VOID}).revision == 2
    for places in ({0: Place.RECORD}, {0: Place.RECORD, 1: Place.VOID}, {0: Place.VOID, 1: Place.DROPPED}):
        assert attempt_of(places).revision is None


def test_what_may_be_built_upon() -> None:
    key = KEYS.snapshot(ONE)
    assert not check_base(ONE, [key], [])
    assert "not there" in check_base(ONE, [], [])
    assert "condemned" in check_base(ONE, [key], [key])


KNOWN = BeforeCommit(
    keys=KEYS,
    intent_key="i",
    intent_is_there=True,
    condemned=(),
    shard_keys=(KEYS.shard(ONE, 0),),
    packs=(pack(1),),
    packs_there=(pack(1),),
    age_s=1.0,
)


@pytest.mark.parametrize(
    ("change", "go"),
    [
        ({}, Go.COMMIT),
        ({"packs_there": None}, Go.COMMIT),
        ({"age_s": 501.0}, Go.LOOK_AGAIN),
        ({"intent_is_there": False}, Go.START_OVER),
        ({"condemned": (KEYS.pack(pack(1)),)}, Go.START_OVER),
        ({"condemned": (KEYS.shard(ONE, 0),)}, Go.START_OVER),
        ({"packs_there": ()}, Go.START_OVER),
    ],
)
def test_before_the_commit(change: dict[str, object], go: Go) -> None:
    found, reason = check_before_commit(replace(KNOWN, **change), round_s=1000.0)
    assert found is go and reason
